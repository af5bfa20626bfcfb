"""A copy of a tree, with shared extents where the filesystem can.

For layers whose upper somebody else still uses. Hard links stay hard links, overlay's own entries
(whiteouts, metacopy files) stay what they are, and the attributes of the dead upper stay behind.

Goes by descriptors and holds few of them, however deep the tree is: who filled it may have meant harm.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from snapshotter import linux
from snapshotter.overlay.attributes import Names, by_name, living_attributes, set_attributes
from snapshotter.walker import OPEN_DIRECTORY, join, open_file, open_parent

_NO_CLONE = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ETXTBSY}
_CHANGED = {errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EINVAL}
"""From what opens a directory or a file, or reads a symlink (open(2), walker.open_file, readlink(2))."""
_ATTEMPTS = 100
_CHUNK = 1 << 20
_MAX_OPEN = 32
_MAX_PATH_BYTES = 4000
"""PATH_MAX is 4,096, the final NUL and a name included."""


def copy_tree(source: Path, target: Path, names: Names, reflink: bool) -> None:
    """Copies a tree that may change meanwhile: what vanishes is left out, what is written is copied as it was found.

    `target` must not exist. Raises OSError; what is there of `target` then is the caller's to remove. Runs in a worker
    process.
    """
    target.mkdir(mode=0o700)
    copier = _Copier(names, reflink)
    try:
        copier.run(os.open(source, OPEN_DIRECTORY), os.open(target, OPEN_DIRECTORY))
    finally:
        copier.close()


@dataclass(slots=True)
class _Level:
    """A directory on the way; both descriptors are -1 while they are closed."""

    source_fd: int
    target_fd: int
    source_status: os.stat_result
    target_status: os.stat_result
    path: bytes
    """Below the top."""
    remaining: list[str]


class _Copier:
    def __init__(self, names: Names, reflink: bool) -> None:
        self._names = names
        self._reflink = reflink
        self._levels: list[_Level] = []
        self._top_fd = -1
        self._first: dict[int, bytes] = {}
        """Inodes with several names: the path of the first one, below the top or of a descriptor."""
        self._kept: list[int] = []
        """Descriptors of first names that lie too deep for a path."""

    def run(self, source_fd: int, target_fd: int) -> None:
        self._top_fd = os.dup(target_fd)
        self._enter(source_fd, target_fd, b"")
        while self._levels:
            level = self._levels[-1]
            if not level.remaining:
                self._leave()
                continue
            name = os.fsencode(level.remaining.pop())
            self._entry_as_it_is(level, name)

    def close(self) -> None:
        for level in self._levels:
            _close(level)
        for fd in self._kept:
            os.close(fd)
        if self._top_fd >= 0:
            os.close(self._top_fd)

    def _entry_as_it_is(self, level: _Level, name: bytes) -> None:
        """Again if it has become something else since it was looked at."""
        for _ in range(_ATTEMPTS):
            try:
                self._entry(level, name)
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno not in _CHANGED or _exists(name, level.target_fd):
                    raise
            else:
                return
        raise OSError(errno.EAGAIN, "an entry keeps becoming something else", os.fsdecode(name))

    def _entry(self, level: _Level, name: bytes) -> None:
        status = os.stat(name, dir_fd=level.source_fd, follow_symlinks=False)
        path = level.path + name
        if stat.S_ISDIR(status.st_mode):
            source_fd = linux.open_beneath(level.source_fd, name, OPEN_DIRECTORY)
            try:
                os.mkdir(name, 0o700, dir_fd=level.target_fd)
                target_fd = os.open(name, OPEN_DIRECTORY, dir_fd=level.target_fd)
            except BaseException:
                os.close(source_fd)
                raise
            self._enter(source_fd, target_fd, join(level.path, name))
        elif first := self._first.get(status.st_ino):
            by_descriptor = first.startswith(b"/")
            os.link(
                first, name, src_dir_fd=None if by_descriptor else self._top_fd, dst_dir_fd=level.target_fd,
                follow_symlinks=by_descriptor,
            )  # fmt: skip
        else:
            self._copy(level, name, status)
            if status.st_nlink > 1:
                self._remember(level, name, path, status)

    def _remember(self, level: _Level, name: bytes, path: bytes, status: os.stat_result) -> None:
        if len(path) > _MAX_PATH_BYTES:
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=level.target_fd)
            self._kept.append(fd)
            path = b"/proc/self/fd/%d" % fd
        self._first[status.st_ino] = path

    def _copy(self, level: _Level, name: bytes, status: os.stat_result) -> None:
        """One entry that is no directory; owner before mode and attributes, since chown takes some of both away."""
        source_fd, target_fd = level.source_fd, level.target_fd
        # Before the data: a metacopy file whose data the kernel copies up meanwhile is still one for us.
        attributes = living_attributes(by_name(source_fd, name), self._names)
        if stat.S_ISREG(status.st_mode):
            with_data = self._names.metacopy not in attributes
            _copy_file(name, source_fd, target_fd, with_data=with_data, reflink=self._reflink)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source_fd), name, dir_fd=target_fd)
        else:
            os.mknod(name, status.st_mode, status.st_rdev, dir_fd=target_fd)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=target_fd, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=target_fd)
        set_attributes(by_name(target_fd, name), attributes)
        times = (status.st_atime_ns, status.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=target_fd, follow_symlinks=False)

    def _enter(self, source_fd: int, target_fd: int, path: bytes) -> None:
        level = _Level(source_fd, target_fd, os.fstat(source_fd), os.fstat(target_fd), path, os.listdir(source_fd))
        self._levels.append(level)
        if len(self._levels) > _MAX_OPEN:
            _close(self._levels[-_MAX_OPEN])

    def _leave(self) -> None:
        """Only now the directory gets its times, and a mode that may forbid writing."""
        inner = self._levels.pop()
        try:
            status = inner.source_status
            os.fchown(inner.target_fd, status.st_uid, status.st_gid)
            os.fchmod(inner.target_fd, stat.S_IMODE(status.st_mode))
            attributes = living_attributes(by_name(inner.source_fd, b"."), self._names)
            set_attributes(by_name(inner.target_fd, b"."), attributes)
            os.utime(inner.target_fd, ns=(status.st_atime_ns, status.st_mtime_ns))
            if self._levels and self._levels[-1].source_fd < 0:
                outer = self._levels[-1]
                outer.source_fd = open_parent(inner.source_fd, outer.source_status)
                outer.target_fd = open_parent(inner.target_fd, outer.target_status)
        finally:
            _close(inner)


def _exists(name: bytes, directory_fd: int) -> bool:
    try:
        os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _close(level: _Level) -> None:
    for fd in (level.source_fd, level.target_fd):
        if fd >= 0:
            os.close(fd)
    level.source_fd = level.target_fd = -1


def _copy_file(name: bytes, source_fd: int, target_fd: int, with_data: bool, reflink: bool) -> None:
    source = open_file(source_fd, name, os.O_RDONLY)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        target = os.open(name, flags, 0o600, dir_fd=target_fd)
        try:
            size_bytes = os.fstat(source).st_size
            if with_data:
                if not (reflink and _share_data(source, target)):
                    _copy_data(source, target, size_bytes)
            else:
                os.ftruncate(target, size_bytes)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _share_data(source: int, target: int) -> bool:
    """Whether the target now has the source's extents (ioctl_ficlonerange(2))."""
    try:
        fcntl.ioctl(target, linux.FICLONE, source)
    except OSError as error:
        if error.errno not in _NO_CLONE:
            raise
        return False
    return True


def _copy_data(source: int, target: int, size_bytes: int) -> None:
    os.ftruncate(target, size_bytes)
    at = 0
    while at < size_bytes:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(source, at, os.SEEK_HOLE)
        at = _copy_extent(source, target, at, end)


def _copy_extent(source: int, target: int, at: int, end: int) -> int:
    while at < end:
        data = os.pread(source, min(_CHUNK, end - at), at)
        if not data:
            return end  # it shrank
        at += os.pwrite(target, data, at)
    return at
