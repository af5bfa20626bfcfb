"""Answers on their way to clients that may read slowly: whole messages, first all written, then read.

They are in memory, so that a List needs no filesystem that may hang; in a memfd (memfd_create(2)) and not in the
interpreter's memory, which grows and does not shrink. What is more than _MEMORY_BYTES for all together is on disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

_MEMORY_BYTES = 128 << 20
_LENGTH_BYTES = 4


class Spools:
    """The answers of one daemon. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        """`directory`: for what is too much for memory."""
        self.directory = directory
        self._lock = threading.Lock()
        self._used_bytes = 0

    def take(self, size_bytes: int) -> bool:
        """Whether so much more fits into memory; whoever took it gives it back."""
        with self._lock:
            if fits := self._used_bytes + size_bytes <= _MEMORY_BYTES:
                self._used_bytes += size_bytes
            return fits

    def give_back(self, size_bytes: int) -> None:
        with self._lock:
            self._used_bytes -= size_bytes


class Spool:
    """One answer. A context manager that removes it."""

    def __init__(self, spools: Spools) -> None:
        self._spools = spools
        self._taken_bytes = 0
        self._file: IO[bytes] = os.fdopen(os.memfd_create("answer", os.MFD_CLOEXEC), "w+b")
        self._is_on_disk = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def write(self, message: bytes) -> None:
        size_bytes = _LENGTH_BYTES + len(message)
        if not self._is_on_disk:
            if self._spools.take(size_bytes):
                self._taken_bytes += size_bytes
            else:
                self._move_to_disk()
        self._file.write(len(message).to_bytes(_LENGTH_BYTES, "little"))
        self._file.write(message)

    def rewind(self) -> None:
        """After the last `write`, before `messages`. Raises OSError."""
        self._file.seek(0)

    def messages(self) -> Iterator[bytes]:
        while length := self._file.read(_LENGTH_BYTES):
            yield self._file.read(int.from_bytes(length, "little"))

    def _move_to_disk(self) -> None:
        on_disk = tempfile.TemporaryFile(dir=self._spools.directory)  # noqa: SIM115
        self._file.seek(0)
        shutil.copyfileobj(self._file, on_disk)
        self.close()
        self._file, self._is_on_disk = on_disk, True

    def close(self) -> None:
        """Idempotent."""
        self._file.close()
        self._spools.give_back(self._taken_bytes)
        self._taken_bytes = 0
