"""Taking mounts out of the namespace without waiting for what the kernel then writes.

The last reference to an overlay that goes syncs its upper's whole filesystem, other users' dirty pages
included. So the mount is held open while it is detached, and the last reference is dropped by
threads on which nobody waits: several, so that one that hangs does not keep all mounts of the host.
"""

from __future__ import annotations

import os
import queue
import threading
from pathlib import Path

from snapshotter import failpoint, linux
from snapshotter.progress import join_until

_THREADS = 4
_WAITING = 1000
"""Mounts that may wait for the threads; beyond that, who detaches one waits for the kernel."""


class Detacher:
    """Owns the threads. `close` it."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name="detacher", daemon=True) for _ in range(_THREADS)]
        for thread in self._threads:
            thread.start()

    def detach(self, mountpoint: Path) -> None:
        """umount2(MNT_DETACH): gone from the namespace when this returns, whoever still uses it. Raises OSError."""
        fd = os.open(mountpoint, os.O_PATH | os.O_CLOEXEC)
        try:
            linux.umount2(str(mountpoint), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        finally:
            if self._queue.qsize() < _WAITING:
                self._queue.put(fd)
            else:
                os.close(fd)

    def close(self, deadline_s: float) -> None:
        """Waits until `deadline_s` (time.monotonic) at most; what is still open the kernel closes with the process."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            join_until(thread, deadline_s)

    def _run(self) -> None:
        while (fd := self._queue.get()) is not None:
            failpoint.hit("detach.close")
            os.close(fd)
