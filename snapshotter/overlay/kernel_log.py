"""What overlayfs writes into the kernel's log (/dev/kmsg, dmesg(1)): its only word on why options conflict."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_RECORD_BYTES = 8192
_PREFIX = "overlayfs: "


@contextmanager
def overlay_messages() -> Iterator[Callable[[], list[str]]]:
    """The function returns what overlayfs logged since the block began; nothing where the log cannot be read.

    Whoever else mounts overlays at the same time writes into the same log.
    """
    try:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield list
        return
    try:
        os.lseek(fd, 0, os.SEEK_END)
        yield lambda: list(_read(fd))
    finally:
        os.close(fd)


def _read(fd: int) -> Iterator[str]:
    """One record a read: "level,number,time,flags;text", and lines that begin with a space (dev-kmsg, kernel ABI)."""
    while True:
        try:
            record = os.read(fd, _RECORD_BYTES).decode(errors="replace")
        except BrokenPipeError:  # records were overwritten before we read them
            continue
        except OSError:
            return
        text = record.partition(";")[2].partition("\n")[0]
        if text.startswith(_PREFIX):
            yield text.removeprefix(_PREFIX)
