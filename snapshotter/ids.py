"""Numbers for snapshots' directories, each given out once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from snapshotter.model import SnapshotId
from snapshotter.root import Root


class Ids:
    """Counts from the lowest id that the metadata never knew."""

    def __init__(self, root: Root, first: SnapshotId) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._next = first
        self._in_flight: set[SnapshotId] = set()

    @contextmanager
    def reserve(self) -> Iterator[SnapshotId]:
        """An id that the sweep leaves alone until the block ends, by when the metadata knows it or its directory
        is gone."""
        with self._lock:
            while self._root.directory(self._next).exists():
                self._next = SnapshotId(self._next + 1)
            snapshot_id = self._next
            self._next = SnapshotId(snapshot_id + 1)
            self._in_flight.add(snapshot_id)
        try:
            yield snapshot_id
        finally:
            with self._lock:
                self._in_flight.discard(snapshot_id)

    def in_flight(self) -> frozenset[SnapshotId]:
        with self._lock:
            return frozenset(self._in_flight)
