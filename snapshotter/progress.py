"""Whether a thread gets on, or hangs in the kernel.

A system call that hangs (a frozen filesystem, a disk that does not answer) cannot be interrupted, and to who waits it
looks like one that takes long. But a task that works is run by the scheduler now and then, however long the work is,
and one that hangs is not: so the kernel itself tells them apart (hung_task_timeout_secs, sysctl/kernel.rst). Who waits
for other threads or processes gets on when one of them does.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

_LOOKS = 4
"""How often to look at a task in the time after which it counts as hung."""

_awaited: dict[int, Callable[[], Collection[int]]] = {}
"""Of a thread that waits: for which tasks."""


@contextmanager
def waiting_for(tasks: Callable[[], Collection[int]]) -> Iterator[None]:
    """In the block, this thread does nothing but wait for others: threads of this process, or processes, as their ids
    say (gettid(2)). `tasks` is called by any thread."""
    me = threading.get_native_id()
    _awaited[me] = tasks
    try:
        yield
    finally:
        del _awaited[me]


def ended(thread: threading.Thread, watch: Watch, hang_s: float, stopping: Callable[[], bool]) -> bool:
    """Waits until a thread has ended. False when it has not got on for so long, or `stopping()` says so."""
    with waiting_for(lambda: [thread.native_id] if thread.native_id else []):
        while True:
            thread.join(look_s(hang_s))
            if not thread.is_alive():
                watch.forget(thread.native_id or 0)
                return True
            if stopping() or watch.idle_s(thread.native_id or 0) >= hang_s:
                return False


@contextmanager
def reported(hang_s: float, report: Callable[[str], object]) -> Iterator[None]:
    """In the block, calls `report` once, from another thread, when this thread hangs; with what `where` says."""
    me, over = threading.get_native_id(), threading.Event()

    def look() -> None:
        watch = Watch()
        while not over.wait(look_s(hang_s)):
            if watch.idle_s(me) >= hang_s:
                report(where(me))
                return

    reporter = threading.Thread(target=look, name="reporter", daemon=True)
    reporter.start()
    try:
        yield
    finally:
        over.set()
        reporter.join()


def look_s(hang_s: float) -> float:
    """The time between two looks at a task."""
    return hang_s / _LOOKS


def join_until(thread: threading.Thread, deadline_s: float) -> None:
    """Waits for the end of a thread, until `deadline_s` (time.monotonic) at most."""
    thread.join(None if deadline_s == math.inf else max(0.0, deadline_s - time.monotonic()))


class Watch:
    """Remembers since when each task has not got on. Not thread-safe."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[frozenset[tuple[int, bytes]], float]] = {}

    def idle_s(self, task: int) -> float:
        """For how long it has not got on, as far as was looked: 0 at the first time."""
        state, now_s = frozenset((leaf, _scheduled(leaf)) for leaf in _leaves(task)), time.monotonic()
        before, since_s = self._seen.get(task, (None, now_s))
        if before != state:
            since_s = now_s
            self._seen[task] = state, now_s
        return now_s - since_s

    def forget(self, task: int) -> None:
        """It is gone."""
        self._seen.pop(task, None)


def where(task: int) -> str:
    """For a person: the kernel functions in which a task, or whom it waits for, sleeps (proc_pid_wchan(5))."""
    return ", ".join(sorted({_read(leaf, "wchan").decode() or "gone" for leaf in _leaves(task)}))


def _leaves(task: int) -> set[int]:
    """The task, or whom it waits for, and so on. Somebody who waits for nobody any more counts himself."""
    seen, leaves, pending = set[int](), set[int](), [task]
    while pending:
        if (one := pending.pop()) in seen:
            continue
        seen.add(one)
        awaited = _awaited.get(one)
        if others := awaited() if awaited else ():
            pending.extend(others)
        else:
            leaves.add(one)
    return leaves


def _scheduled(task: int) -> bytes:
    """Changes whenever the task runs (scheduler/sched-stats.rst). One that is gone, or a kernel that does not count,
    is never taken for hung."""
    counts = _read(task, "schedstat")
    return counts if counts.strip(b"0 \n") else str(time.monotonic_ns()).encode()


def _read(task: int, name: str) -> bytes:
    try:
        return Path("/proc", str(task), name).read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
