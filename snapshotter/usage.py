"""What a tree costs: bytes allocated and inodes, each inode once."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from snapshotter.claims import Claims
from snapshotter.durable import Stopped
from snapshotter.model import SnapshotId, Usage, allocated_bytes
from snapshotter.walker import OPEN_DIRECTORY, walk


class Tally:
    """Adds up inodes."""

    def __init__(self) -> None:
        self._size_bytes = 0
        self.apparent_bytes = 0
        """The sizes of the files."""
        self.largest_bytes = 0
        """The size of the largest file."""
        self._inodes = 0
        self._linked: set[tuple[int, int]] = set()

    def add(self, status: os.stat_result) -> None:
        if status.st_nlink > 1 and not self._is_new(status):
            return
        if stat.S_ISREG(status.st_mode):
            self.apparent_bytes += status.st_size
            self.largest_bytes = max(self.largest_bytes, status.st_size)
        self._size_bytes += allocated_bytes(status)
        self._inodes += 1

    def usage(self) -> Usage:
        return Usage(self._size_bytes, self._inodes)

    def _is_new(self, status: os.stat_result) -> bool:
        identity = (status.st_dev, status.st_ino)
        if identity in self._linked:
            return False
        self._linked.add(identity)
        return True


def scan(trees: list[Path], stopping: Callable[[], bool]) -> Usage:
    """The usage of directory trees, their top directories included; one that is missing counts nothing.

    Raises Stopped when `stopping()` says so, and OSError.
    """
    tally = Tally()
    for tree in trees:
        try:
            fd = os.open(tree, OPEN_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            tally.add(os.fstat(fd))
            for entry in walk(fd):
                tally.add(entry.status)
                if stopping():
                    raise Stopped(str(tree))
        finally:
            os.close(fd)
    return tally.usage()


class UsageCache:
    """Remembers scans of active snapshots for a short time and lets callers share one that is running.

    The CRI asks for every container every ten seconds, and a scan can take longer than that. A result
    is kept for a second or ten times what the scan took, whichever is longer, at most a minute.
    """

    _KEEP_S = (1.0, 60.0)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scans = Claims()
        self._known: dict[SnapshotId, tuple[float, Usage]] = {}

    def known(self, snapshot_id: SnapshotId) -> Usage | None:
        """What was measured a short time ago, if it was."""
        with self._lock:
            expires_s, usage = self._known.get(snapshot_id, (0.0, None))
        return usage if time.monotonic() < expires_s else None

    def get(self, snapshot_id: SnapshotId, scan_now: Callable[[], Usage]) -> Usage:
        """The known usage, or that of `scan_now`. Raises Busy while another call scans, and what `scan_now` raises."""
        if (usage := self.known(snapshot_id)) is not None:
            return usage
        with self._scans.hold(snapshot_id):
            began_s = time.monotonic()
            usage = scan_now()
            now_s = time.monotonic()
            shortest_s, longest_s = self._KEEP_S
            keep_s = min(longest_s, max(shortest_s, 10 * (now_s - began_s)))
            with self._lock:
                self._known[snapshot_id] = (now_s + keep_s, usage)
        return usage

    def forget(self, snapshot_id: SnapshotId) -> None:
        with self._lock:
            self._known.pop(snapshot_id, None)
