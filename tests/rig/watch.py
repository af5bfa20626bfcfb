"""Who opens, reads or changes a file, as the kernel tells: inotify(7).

with watched(secret, directory) as events:
    ...
assert events() == []
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_ALL = 0xFFF  # <sys/inotify.h>: IN_ALL_EVENTS
_WORDS = {
    0x1: "read", 0x2: "written", 0x4: "attributes", 0x8: "closed", 0x10: "closed", 0x20: "opened", 0x40: "moved from",
    0x80: "moved to", 0x100: "created", 0x200: "deleted", 0x400: "deleted itself", 0x800: "moved itself",
}  # fmt: skip
_HEAD = struct.Struct("iIII")

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def watched(*paths: Path) -> Iterator[Callable[[], list[str]]]:
    """What happened to the inodes that are at these paths now, as words: call it in the block. O_PATH is no opening."""
    fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        names = {_libc.inotify_add_watch(fd, os.fsencode(path), _ALL): path.name for path in paths}
        assert -1 not in names, os.strerror(ctypes.get_errno())
        yield lambda: list(_events(fd, names))
    finally:
        os.close(fd)


def _events(fd: int, names: dict[int, str]) -> Iterator[str]:
    try:
        raw = os.read(fd, 1 << 16)
    except BlockingIOError:
        return
    at = 0
    while at < len(raw):
        watch, mask, _, length = _HEAD.unpack_from(raw, at)
        at += _HEAD.size + length
        if watch in names:
            yield f"{names[watch]} {_WORDS.get(mask & _ALL, hex(mask))}"
