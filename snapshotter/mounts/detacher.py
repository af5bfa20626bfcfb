"""Taking mounts out of the namespace without waiting for what the kernel then writes.

The last reference to an overlay that goes syncs its upper's whole filesystem, other users' dirty pages
included. So the mount is held open while it is detached, and the last reference is dropped by a
thread on which nobody waits.
"""

from __future__ import annotations

import os
import queue
import threading
from pathlib import Path

from snapshotter import linux


class Detacher:
    """Owns the thread. `close` it."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="detacher", daemon=True)
        self._thread.start()

    def detach(self, mountpoint: Path) -> None:
        """umount2(MNT_DETACH): gone from the namespace when this returns, whoever still uses it. Raises OSError."""
        fd = os.open(mountpoint, os.O_PATH | os.O_CLOEXEC)
        try:
            linux.umount2(str(mountpoint), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        finally:
            self._queue.put(fd)

    def close(self, timeout_s: float = 1.0) -> None:
        """Waits a little; what is still open the kernel closes with the process."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (fd := self._queue.get()) is not None:
            os.close(fd)
