"""The trash: trees are renamed into it and deleted by one background thread.

A rename takes a tree out of use at once and survives a kill as what it is; whatever is in the trash
at a start is deleted then.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path

import structlog

from snapshotter.durable import Stopped, remove_tree
from snapshotter.errors import Internal, Unavailable

log = structlog.get_logger()

_STOPPING = "the daemon is stopping; it goes on deleting when it runs again"


class Trash:
    """Owns the directory and the thread. `close` it."""

    def __init__(self, directory: Path) -> None:
        """Queues what an earlier run left."""
        self._directory = directory
        self._wake = threading.Condition()
        self._stopping = False
        # A name to delete, or a waiter to answer once all before it has been tried.
        self._queue: deque[str | Future[None]] = deque(sorted(entry.name for entry in directory.iterdir()))
        self._failed: dict[str, str] = {}
        self._busy = 0
        self._thread = threading.Thread(target=self._run, name="trash", daemon=True)
        self._thread.start()

    def discard(self, tree: Path, label: str) -> bool:
        """Takes a tree out of the way; False if it was not there. The name in the trash begins with `label`.
        Raises OSError."""
        name = f"{label}.{time.time_ns()}"
        try:
            tree.rename(self._directory / name)
        except FileNotFoundError:
            return False
        with self._wake:
            self._queue.append(name)
            self._wake.notify()
        return True

    def drained(self) -> Future[None]:
        """Completes when all that is in the trash now has been deleted.

        It then holds Internal if something could not be, Unavailable if the daemon stops first.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # nobody who waits can cancel it
        with self._wake:
            if self._stopping:
                raise Unavailable(_STOPPING)
            self._queue.extend(self._failed)
            self._failed.clear()
            self._queue.append(future)
            self._wake.notify()
        return future

    def pending(self) -> int:
        """Trees still to be deleted."""
        with self._wake:
            return self._busy + len(self._failed) + sum(isinstance(item, str) for item in self._queue)

    def stop(self) -> None:
        """Stops deleting, in the middle of a tree if need be, and answers who waits; the next start goes on."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def close(self, timeout_s: float) -> None:
        self.stop()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (item := self._next()) is not None:
            if isinstance(item, str):
                self._delete(item)
            else:
                self._answer(item)
        for item in self._queue:
            if isinstance(item, Future):
                item.set_exception(Unavailable(_STOPPING))

    def _next(self) -> str | Future[None] | None:
        with self._wake:
            self._busy = 0
            while not self._queue and not self._stopping:
                self._wake.wait()
            if self._stopping:
                return None
            item = self._queue.popleft()
            self._busy = int(isinstance(item, str))
            return item

    def _delete(self, name: str) -> None:
        try:
            remove_tree(self._directory, name, lambda: self._stopping)
        except Stopped:
            return
        except OSError as error:
            log.error("trash.delete_failed", tree=str(self._directory / name), reason=str(error))
            with self._wake:
                self._failed[name] = str(error)

    def _answer(self, waiter: Future[None]) -> None:
        with self._wake:
            failed = dict(self._failed)
        if failed:
            name, reason = next(iter(failed.items()))
            waiter.set_exception(
                Internal(f"{len(failed)} trees in {self._directory} cannot be deleted, first {name}: {reason}")
            )
        else:
            waiter.set_result(None)
