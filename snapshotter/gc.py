"""The trash: trees are renamed into it and deleted one by one in the background, by worker processes.

A rename takes a tree out of use at once and survives a kill as what it is; whatever is in the trash at a start is
deleted then. Of a layer its refs/ goes last, with the objects that nobody else uses.

A deletion that hangs in the kernel is left to itself, and the next one begins: up to _MOST_HUNG times.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import structlog

from snapshotter.content.objects import release_all
from snapshotter.durable import Stopped, remove_tree
from snapshotter.errors import Internal, Unavailable, from_os_error, quote
from snapshotter.model import NO_EXTENT, Extent
from snapshotter.progress import Watch, ended, join_until, where
from snapshotter.walker import OPEN_DIRECTORY, walk_names
from snapshotter.workers.pool import Workers

_REFS = "refs"

log = structlog.get_logger()

_STOPPING = "the daemon is stopping; it goes on deleting when it runs again"
_MOST_HUNG = 3
"""Deletions that may hang, each on a thread and in a worker process; then no other one begins until one has ended."""


class _Question:
    """Somebody who waits for what deleting would free."""

    def __init__(self) -> None:
        self.answer: Future[Extent] = Future()
        self.answer.set_running_or_notify_cancel()


class Trash:
    """Owns the directory and the thread. `close` it."""

    def __init__(self, directory: Path, objects: Path, workers: Workers, hang_s: float) -> None:
        """Queues what an earlier run left. A deletion hangs when it has not got on for `hang_s`."""
        self._directory = directory
        self._objects = objects
        self._workers = workers
        self._hang_s = hang_s
        self._freed = NO_EXTENT
        self._wake = threading.Condition()
        self._stopping = False
        # A name to delete, a waiter to answer once all before it has been tried, or one who asks what would be freed.
        # Layers last: objects go with the last links to them.
        found = sorted((entry.name for entry in directory.iterdir()), key=lambda name: (_is_layer(name), name))
        self._queue: deque[str | Future[None] | _Question] = deque(found)
        self._failed: dict[str, Exception] = {}
        self._deleting: set[str] = set()
        self._hung: dict[str, threading.Thread] = {}
        """Some of those."""
        self._watch = Watch()
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

    def try_to_discard(self, tree: Path, label: str) -> None:
        """As `discard`, for what a sweep takes if this fails."""

        def act() -> None:
            self.discard(tree, label)

        attempt(act)

    def drained(self) -> Future[None]:
        """Completes when all that is in the trash now has been deleted.

        It then holds an error if something could not be (errors.from_os_error), Unavailable if a deletion hangs, or the
        daemon stops first.
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

    def would_free(self) -> Future[Extent]:
        """The objects that nobody would use any more after all this; counted between two deletions.

        It holds OSError if they could not be counted, Unavailable if that hangs, or the daemon stops first.
        """
        question = _Question()
        with self._wake:
            if self._stopping:
                raise Unavailable(_STOPPING)
            self._queue.appendleft(question)
            self._wake.notify()
        return question.answer

    def freed(self) -> Extent:
        """The objects that were deleted since the start."""
        with self._wake:
            return self._freed

    def pending(self) -> int:
        """Trees still to be deleted."""
        with self._wake:
            waiting = sum(isinstance(item, str) for item in self._queue)
            return len(self._deleting) + len(self._failed) + waiting

    def stop(self) -> None:
        """Stops deleting, in the middle of a tree if need be, and answers who waits; the next start goes on."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def close(self, deadline_s: float) -> None:
        self.stop()
        join_until(self._thread, deadline_s)

    @property
    def thread_id(self) -> int:
        """Of the thread that works for whoever waits (gettid(2))."""
        return self._thread.native_id or 0

    def _run(self) -> None:
        while (item := self._next()) is not None:
            if isinstance(item, str):
                self._delete_unless_hung(item)
            elif isinstance(item, _Question):
                self._count(item)
            else:
                self._answer(item)
        for item in self._queue:
            if not isinstance(item, str):
                waiter = item.answer if isinstance(item, _Question) else item
                waiter.set_exception(Unavailable(_STOPPING))

    def _count(self, question: _Question) -> None:
        found: list[Extent | Exception] = []

        def count() -> None:
            try:
                found.append(self._workers.call(would_free, self._directory, self._objects))
            except Exception as error:  # who asks must not wait for ever
                found.append(error)

        if not self._ends(threading.Thread(target=count, name="trash-count", daemon=True)):
            found.append(self._hangs("counting what is") if not self._stopping else Unavailable(_STOPPING))
        if isinstance(outcome := found[0], Exception):
            question.answer.set_exception(outcome)
        else:
            question.answer.set_result(outcome)

    def _next(self) -> str | Future[None] | _Question | None:
        with self._wake:
            while not self._stopping:
                # Who waits is answered even when nothing can be deleted.
                for place, item in enumerate(self._queue):
                    if not isinstance(item, str) or len(self._hung) < _MOST_HUNG:
                        del self._queue[place]
                        if isinstance(item, str):
                            self._deleting.add(item)
                        return item
                self._wake.wait()
        return None

    def _ends(self, thread: threading.Thread) -> bool:
        """Runs it. False when it hangs, or the daemon stops first."""
        thread.start()
        return self._has_ended(thread)

    def _has_ended(self, thread: threading.Thread) -> bool:
        """Waits for it, unless it hangs, as it may have done already, or the daemon stops."""
        return ended(thread, self._watch, self._hang_s, lambda: self._stopping)

    def _delete_unless_hung(self, name: str) -> None:
        thread = threading.Thread(target=self._delete, args=(name,), name="trash-delete", daemon=True)
        if self._ends(thread) or self._stopping:
            return
        with self._wake:
            if name not in self._deleting:  # it ended just now
                return
            self._hung[name] = thread
        log.error("trash.delete_hangs", tree=str(self._directory / name), kernel=where(thread.native_id or 0))

    def _delete(self, name: str) -> None:
        freed = NO_EXTENT
        failure: Exception | None = None
        try:
            freed = self._workers.call(delete, self._directory, name, self._objects)
        except Stopped:
            return
        except Exception as error:  # the others must go
            log.error("trash.delete_failed", tree=str(self._directory / name), reason=str(error))
            failure = error
        with self._wake:
            self._deleting.discard(name)
            self._freed += freed
            if failure is not None:
                self._failed[name] = failure
            if name in self._hung:
                log.info("trash.delete_ended", tree=str(self._directory / name))
                del self._hung[name]
                self._wake.notify()

    def _answer(self, waiter: Future[None]) -> None:
        with self._wake:
            waited = dict(self._hung)
        hung = {name: thread for name, thread in waited.items() if not self._has_ended(thread)}
        with self._wake:
            failed = dict(self._failed)
            if waited and not hung:
                # Trees before it in the queue, which could not be begun, can be now.
                self._queue.append(waiter)
                return
        if failed:
            name, reason = next(iter(failed.items()))
            what = f"{len(failed)} trees in {self._directory} cannot be deleted, first {name}"
            if isinstance(reason, OSError):
                waiter.set_exception(from_os_error(what, reason))
            else:
                waiter.set_exception(Internal(f"{what}: {quote(str(reason))}"))
        elif hung:
            waiter.set_exception(Unavailable(_STOPPING) if self._stopping else self._hangs(f"deleting {min(hung)}"))
        else:
            waiter.set_result(None)

    def _hangs(self, act: str) -> Unavailable:
        return Unavailable(
            f"{act} in {self._directory} has not got on for {self._hang_s:g} s: is the file system frozen, or its disk "
            "hung? It goes on when the kernel lets it"
        )


def delete(trash: Path, name: str, objects: Path) -> Extent:
    """Deletes one tree of the trash, and the objects that only it used. Can be repeated. Raises OSError."""
    tree = trash / name
    refs = tree / _REFS
    if _is_layer(name) and refs.is_dir():
        for entry in os.listdir(tree):
            if entry != _REFS:
                remove_tree(tree, entry, _never)
        freed = release_all(objects, refs)
    else:
        freed = NO_EXTENT
    remove_tree(trash, name, _never)
    return freed


def would_free(trash: Path, objects: Path) -> Extent:
    """The objects that deleting what is in the trash, and collecting what no layer uses, frees. Raises OSError."""
    links = Counter[int]()
    for name in filter(_is_layer, os.listdir(trash)):
        for tree in (trash / name / "fs", trash / name / _REFS):
            for inode in _files(tree):
                links[inode] += 1
    freed = NO_EXTENT
    for shard in os.listdir(objects):
        with os.scandir(objects / shard) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if status.st_nlink == 1 + links[status.st_ino]:
                    freed += Extent.of(status)
    return freed


def _files(tree: Path) -> Iterator[int]:
    """The inodes of all files below a directory, for each of their names; of none if it is not there."""
    try:
        fd = os.open(tree, OPEN_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        yield from (entry.inode for entry in walk_names(fd) if entry.is_file)
    finally:
        os.close(fd)


def attempt(act: Callable[[], None]) -> None:
    """One step of a sweep. A failure is logged and left to the next sweep; another sweep may have been faster."""
    try:
        act()
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("sweep.failed", reason=str(error))


def _is_layer(name: str) -> bool:
    """Other trees are called <id>.new.<time> or the like, and what is in them is somebody's."""
    return name.replace(".", "").isdecimal()


def _never() -> bool:
    return False
