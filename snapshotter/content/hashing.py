"""blake3 of open files.

By read, not by mmap: a file that shrinks under a mapping ends the process with SIGBUS. Memory is the same
for every size of file.
"""

from __future__ import annotations

import os
import queue
import threading
from typing import NamedTuple

from blake3 import blake3

_BIG_BYTES = 32 << 20
_CHUNK_BYTES = 1 << 20
_BIG_CHUNK_BYTES = 2 << 20
_CHUNKS_AHEAD = 3


class Hashed(NamedTuple):
    digest: bytes
    size_bytes: int
    """What was read."""


class Hasher:
    """Reads one file at a time into buffers of its own."""

    def __init__(self, threads: int) -> None:
        """`threads`: for one big file."""
        self._threads = threads
        self._buffer = bytearray(_CHUNK_BYTES)
        self._view = memoryview(self._buffer)

    def hash(self, fd: int, size_bytes: int) -> Hashed:
        """Reads from the descriptor's position to the end; `size_bytes` is about what is expected. Raises OSError."""
        if size_bytes >= _BIG_BYTES:
            return self._hash_big(fd)
        read_bytes = os.readv(fd, (self._buffer,))
        if read_bytes == size_bytes < _CHUNK_BYTES:
            return Hashed(blake3(self._view[:read_bytes]).digest(), read_bytes)
        state, total = blake3(), 0
        while read_bytes:
            state.update(self._view[:read_bytes])
            total += read_bytes
            read_bytes = os.readv(fd, (self._buffer,))
        return Hashed(state.digest(), total)

    def _hash_big(self, fd: int) -> Hashed:
        """One thread reads ahead while others hash."""
        free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        full: queue.SimpleQueue[memoryview | OSError] = queue.SimpleQueue()
        for _ in range(_CHUNKS_AHEAD):
            free.put(memoryview(bytearray(_BIG_CHUNK_BYTES)))
        reader = threading.Thread(target=_read_ahead, args=(fd, free, full))
        reader.start()
        state, total = blake3(max_threads=self._threads), 0
        try:
            while chunk := _checked(full.get()):
                state.update(chunk)
                total += len(chunk)
                whole = chunk.obj
                free.put(memoryview(whole))
        finally:
            free.put(None)
            reader.join()
        return Hashed(state.digest(), total)


def _checked(item: memoryview | OSError) -> memoryview:
    if isinstance(item, OSError):
        raise item
    return item


def _read_ahead(
    fd: int, free: queue.SimpleQueue[memoryview | None], full: queue.SimpleQueue[memoryview | OSError]
) -> None:
    """Until the end of the file, which is an empty chunk, or until there is None to read into."""
    while (buffer := free.get()) is not None:
        try:
            read_bytes = os.readv(fd, (buffer,))
        except OSError as error:
            full.put(error)
            return
        full.put(buffer[:read_bytes])
        if not read_bytes:
            return
