"""One pass over a directory tree that may be hostile, and may change meanwhile.

Goes by descriptors, so that no path is too long and no symlink is followed; never leaves the
filesystem that the tree is on, nor the tree itself when a directory is moved under it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_OPEN = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One name. `directory_fd` is valid until the next one is asked for."""

    directory_fd: int
    name: bytes
    status: os.stat_result

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.status.st_mode)


@dataclass(slots=True)
class _Level:
    fd: int
    """-1 while closed, to hold few descriptors in a deep tree."""
    status: os.stat_result
    remaining: list[str]


def walk(top_fd: int) -> Iterator[Entry]:
    """Every entry below an open directory, a directory before what is in it; `top_fd` stays the caller's.

    What vanishes before it is looked at is left out. Raises OSError, also (ESTALE) when a directory
    of a very deep tree was moved away while the walk was below it.
    """
    status = os.fstat(top_fd)
    levels = [_Level(os.dup(top_fd), status, os.listdir(top_fd))]
    device = status.st_dev
    try:
        while levels:
            level = levels[-1]
            if not level.remaining:
                _leave(levels)
                continue
            name = os.fsencode(level.remaining.pop())
            try:
                status = os.stat(name, dir_fd=level.fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield Entry(level.fd, name, status)
            if stat.S_ISDIR(status.st_mode) and status.st_dev == device:
                _enter(levels, name)
    finally:
        for level in levels:
            if level.fd >= 0:
                os.close(level.fd)


def _enter(levels: list[_Level], name: bytes) -> None:
    try:
        fd = os.open(name, OPEN_DIRECTORY, dir_fd=levels[-1].fd)
    except (FileNotFoundError, NotADirectoryError):
        return
    levels.append(_Level(fd, os.fstat(fd), []))
    levels[-1].remaining = os.listdir(fd)
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


def open_parent(below_fd: int, expected: os.stat_result) -> int:
    """Opens the directory above; ESTALE if it is not the `expected` one."""
    fd = os.open("..", OPEN_DIRECTORY, dir_fd=below_fd)
    if not os.path.samestat(os.fstat(fd), expected):
        os.close(fd)
        raise OSError(errno.ESTALE, "a directory was moved while the tree was read")
    return fd
