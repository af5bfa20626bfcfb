"""One pass over a directory tree that may be hostile, and may change meanwhile.

Goes by descriptors, so that no path is too long and no symlink is followed; never enters what is mounted on
a directory of the tree, nor leaves the tree when a directory is moved under it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from snapshotter.linux import open_beneath

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_OPEN = 64
_PATH_MAX = 4096
_NOT_OURS = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV}
"""Gone or no directory by now; or something is mounted there."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name. `directory_fd` is valid until the next one is asked for."""

    directory_fd: int
    directory: bytes
    """As in Name."""
    name: bytes
    status: os.stat_result

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.status.st_mode)


class Name(NamedTuple):
    """One name, as the directory has it (readdir(3)). `directory_fd` is valid until the next one is asked for."""

    directory_fd: int
    directory: bytes
    """The path of the directory below the top: empty, or ending with a slash. What is longer than PATH_MAX, and good
    for no system call, is that of a directory above: else a tree that is deep enough would fill the memory."""
    name: bytes
    inode: int
    is_directory: bool
    is_file: bool


@dataclass(slots=True)
class _Level:
    fd: int
    """-1 while closed, to hold few descriptors in a deep tree."""
    status: os.stat_result
    path: bytes
    remaining: list[tuple[bytes, int, bool, bool]]


def walk(top_fd: int, number: int = 0, count: int = 1) -> Iterator[Entry]:
    """Every entry below an open directory, a directory before what is in it; `top_fd` stays the caller's.

    Of a tree that does not change, `count` walks together find everything once: each the inodes of its `number`.
    What vanishes before it is looked at is left out. Raises OSError, also (ESTALE) when a directory of a very deep
    tree was moved away while the walk was below it.
    """
    for found in walk_names(top_fd):
        if found.inode % count != number:
            continue
        try:
            status = os.stat(found.name, dir_fd=found.directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        yield Entry(found.directory_fd, found.directory, found.name, status)


def walk_names(top_fd: int) -> Iterator[Name]:
    """As `walk`, without looking at the inodes. A directory is read as a whole before its first name is handed out."""
    status = os.fstat(top_fd)
    levels = [_Level(os.dup(top_fd), status, b"", _read(top_fd))]
    try:
        while levels:
            level = levels[-1]
            if not level.remaining:
                _leave(levels)
                continue
            name, inode, is_directory, is_file = level.remaining.pop()
            yield Name(level.fd, level.path, name, inode, is_directory, is_file)
            if is_directory:
                _enter(levels, name)
    finally:
        for level in levels:
            if level.fd >= 0:
                os.close(level.fd)


def join(path: bytes, name: bytes) -> bytes:
    """The path of a directory `name`, as Name has it."""
    return path if is_cut(path) else path + name + b"/"


def is_cut(path: bytes) -> bool:
    """Whether the path of a directory, as Name has it, may be that of one above."""
    return len(path) > _PATH_MAX


def _read(fd: int) -> list[tuple[bytes, int, bool, bool]]:
    with os.scandir(fd) as entries:
        return [
            (os.fsencode(e.name), e.inode(), e.is_dir(follow_symlinks=False), e.is_file(follow_symlinks=False))
            for e in entries
        ]


def _enter(levels: list[_Level], name: bytes) -> None:
    try:
        fd = open_beneath(levels[-1].fd, name, OPEN_DIRECTORY)
    except OSError as error:
        if error.errno in _NOT_OURS:
            return
        raise
    levels.append(_Level(fd, os.fstat(fd), join(levels[-1].path, name), []))
    levels[-1].remaining = _read(fd)
    if len(levels) > _MAX_OPEN:
        outer = levels[-_MAX_OPEN]
        os.close(outer.fd)
        outer.fd = -1


def _leave(levels: list[_Level]) -> None:
    inner = levels.pop()
    try:
        if levels and levels[-1].fd < 0:
            levels[-1].fd = open_parent(inner.fd, levels[-1].status)
    finally:
        os.close(inner.fd)


def open_file(directory_fd: int, name: bytes, flags: int) -> int:
    """Opens a regular file. Raises OSError: ENXIO for anything else, which is never opened, be it exchanged for a file
    this moment: opening a device can be all it takes (a watchdog, a tape)."""
    handle = open_beneath(directory_fd, name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.ENXIO, "no regular file any more", os.fsdecode(name))
        return os.open(f"/proc/self/fd/{handle}", flags | os.O_CLOEXEC)
    finally:
        os.close(handle)


def open_parent(below_fd: int, expected: os.stat_result) -> int:
    """Opens the directory above; ESTALE if it is not the `expected` one."""
    fd = os.open("..", OPEN_DIRECTORY, dir_fd=below_fd)
    if not os.path.samestat(os.fstat(fd), expected):
        os.close(fd)
        raise OSError(errno.ESTALE, "a directory was moved while the tree was read")
    return fd
