"""Who is changing which snapshot: at most one call a snapshot, and none waits on a thread for another."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from snapshotter.model import SnapshotId


class Busy(Exception):
    """Another call, on the thread `holder` (gettid(2)), has the snapshot; try again when `released` is done."""

    def __init__(self, released: Future[None], holder: int) -> None:
        super().__init__("another call is changing the snapshot")
        self.released = released
        self.holder = holder


class Claims:
    """The claims of one daemon."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[SnapshotId, Busy] = {}

    @contextmanager
    def hold(self, snapshot_id: SnapshotId) -> Iterator[None]:
        """Raises Busy at once when another call holds it."""
        with self._lock:
            if (held := self._held.get(snapshot_id)) is not None:
                raise Busy(held.released, held.holder)
            mine: Future[None] = Future()
            mine.set_running_or_notify_cancel()  # nobody who waits can cancel it
            self._held[snapshot_id] = Busy(mine, threading.get_native_id())
        try:
            yield
        finally:
            with self._lock:
                del self._held[snapshot_id]
            mine.set_result(None)

    def all(self) -> frozenset[SnapshotId]:
        """What is claimed now."""
        with self._lock:
            return frozenset(self._held)
