"""Which pages of a file are in the page cache, asked through a path of one's own choosing.

A file of an overlay is read through the page cache of the real file that it stands for (ovl_mmap, ovl_fadvise in
fs/overlayfs/file.c), so two mounts that show the same real file have the same pages.

    evict([one / name, other / name])
    read(one / name)
    assert resident_pages(other / name) == pages(other / name)
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]

_MAP_FAILED = ctypes.c_void_p(-1).value


def pages(path: Path) -> int:
    """How many pages the file has."""
    return -(-path.stat().st_size // mmap.PAGESIZE)


def resident_pages(path: Path) -> int:
    """How many of them are in memory. It reads none. mincore(2) tells the truth to the owner of a file and to root."""
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        return 0
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        address = _libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address == _MAP_FAILED:
            raise _error("mmap", path)
        try:
            vector = ctypes.create_string_buffer(pages(path))
            if _libc.mincore(address, size_bytes, vector) != 0:
                raise _error("mincore", path)
        finally:
            _libc.munmap(address, size_bytes)
    finally:
        os.close(fd)
    return sum(byte & 1 for byte in vector.raw)


def read(path: Path) -> None:
    """The whole file, so that all its pages are in memory."""
    path.read_bytes()


def evict(paths: Iterable[Path]) -> None:
    """Puts the files' pages out of memory: what is dirty is written first. A page that the kernel is busy with may
    stay."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _error(call: str, path: Path) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}", os.fspath(path))
