"""A file of a layer that might be shared, with all its names; and the places from which names are swapped.

The tree is one that nobody can write to and that no overlay uses.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from snapshotter import failpoint, linux
from snapshotter.walker import OPEN_DIRECTORY, walk_names

_SWAPPING = b"swapping-"
"""And the number of the old inode: in a stage, a link of the new one while their names are exchanged."""


_INHERITED = "system.posix_acl_default"
"""What is made in a directory that has it would get an ACL."""


class HalfSwapped(OSError):
    """Some names of a file are the replacement's now and others not: `finish_swaps` has to go on."""


class Private(Exception):
    """The file cannot be shared, and why: a few words that the administrator sees counted."""


class Place(NamedTuple):
    """One name of the file."""

    directory_fd: int
    name: bytes
    path: bytes
    """Below the top of the tree."""


class File(NamedTuple):
    """An open file, read to its end."""

    fd: int
    status: os.stat_result
    attributes: dict[str, bytes]
    digest: bytes
    places: tuple[Place, ...]
    """Every name that its inode has."""


class Stage:
    """A directory on the filesystem of the tree where replacements wait; what they replaced ends up there.

    `close` it; its content then goes to the trash.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        self.fd = os.open(directory, OPEN_DIRECTORY)
        for name in os.listxattr(self.fd):
            if name == _INHERITED:
                os.removexattr(self.fd, name)
        self._count = 0

    def close(self) -> None:
        os.close(self.fd)

    def new_name(self) -> bytes:
        self._count += 1
        return b"%x" % self._count

    def put(self, source_fd: int, source: str | bytes, file: File, keep_old: bool) -> None:
        """Makes every name of the file one of the inode at `source`, or none of them if that fails.

        All that may want space or links happens before the first name changes. `keep_old` moves the old inode's
        names here, since freeing its blocks takes a while. Raises OSError; HalfSwapped where that cannot be undone.
        """
        if len(file.places) == 1:
            self._put_one(source_fd, source, file.places[0], keep_old)
            return
        staged: list[bytes] = []
        swapped = 0
        try:
            names = [self.new_name() for _ in file.places]
            names.append(b"%s%d" % (_SWAPPING, file.status.st_ino))
            for name in names:
                os.link(source, name, src_dir_fd=source_fd, dst_dir_fd=self.fd, follow_symlinks=False)
                staged.append(name)
            failpoint.hit("share.staged")
            _check_changeable(file.places)
            for name, place in zip(names, file.places, strict=False):
                if swapped:
                    failpoint.hit("share.half-swapped")
                self.move(name, place, keep_old)
                staged.remove(name)
                swapped += 1
        except BaseException as error:
            if swapped:
                raise HalfSwapped(str(error)) from error
            self._unlink(staged)
            raise
        self._unlink(staged)

    def _put_one(self, source_fd: int, source: str | bytes, place: Place, keep_old: bool) -> None:
        name = self.new_name()
        os.link(source, name, src_dir_fd=source_fd, dst_dir_fd=self.fd, follow_symlinks=False)
        try:
            failpoint.hit("share.staged")
            self.move(name, place, keep_old)
        except BaseException:
            self._unlink([name])
            raise

    def move(self, name: bytes, place: Place, keep_old: bool) -> None:
        """Makes what is here as `name` the inode at one place. Raises OSError."""
        if keep_old:
            linux.renameat2(self.fd, name, place.directory_fd, place.name, linux.RENAME_EXCHANGE)
        else:
            os.rename(name, place.name, src_dir_fd=self.fd, dst_dir_fd=place.directory_fd)

    def _unlink(self, names: list[bytes]) -> None:
        for name in names:
            os.unlink(name, dir_fd=self.fd)


def _check_changeable(places: tuple[Place, ...]) -> None:
    """Raises OSError (EPERM) if a name is in a directory that cannot be changed."""
    for fd in {place.directory_fd for place in places}:
        try:
            flags = linux.get_inode_flags(fd)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
                return
            raise
        if flags & (linux.FS_IMMUTABLE_FL | linux.FS_APPEND_FL):
            raise OSError(errno.EPERM, "a directory is immutable or append-only")


def finish_swaps(tree: Path, stages: list[Path]) -> None:
    """After a kill: gives names that an inode kept to the one that has its other names now. Raises OSError."""
    with ExitStack() as stack:
        halves: dict[int, tuple[int, str]] = {}
        for directory in stages:
            fd = os.open(directory, OPEN_DIRECTORY)
            stack.callback(os.close, fd)
            for name in os.listdir(fd):
                if name.startswith(_SWAPPING.decode()):
                    halves[int(name.removeprefix(_SWAPPING.decode()))] = fd, name
        if not halves:
            return
        top_fd = os.open(tree, OPEN_DIRECTORY)
        stack.callback(os.close, top_fd)
        for found in walk_names(top_fd):
            if found.is_file and found.inode in halves:
                fd, name = halves[found.inode]
                with suppress(FileNotFoundError):  # left by another kill
                    os.unlink("next", dir_fd=fd)
                os.link(name, "next", src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False)
                os.rename("next", found.name, src_dir_fd=fd, dst_dir_fd=found.directory_fd)
