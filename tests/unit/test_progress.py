"""Who gets on and who hangs, as the kernel tells."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from snapshotter.durable import Stopped
from snapshotter.progress import Watch, ended, waiting_for
from snapshotter.workers.pool import Workers

HANG_S = 0.5


@contextmanager
def running(act: Callable[[threading.Event], object]) -> Iterator[threading.Thread]:
    """A thread that does it until the event is set."""
    stop = threading.Event()
    thread = threading.Thread(target=act, args=(stop,))
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join()


def does_nothing(stop: threading.Event) -> None:
    stop.wait()


def computes(stop: threading.Event) -> None:
    while not stop.is_set():
        sum(range(1000))


def waits_for(other: threading.Thread) -> Callable[[threading.Event], None]:
    def wait(stop: threading.Event) -> None:
        with waiting_for(lambda: [other.native_id or 0]):
            stop.wait()

    return wait


def seems_hung(thread: threading.Thread, within_s: float = 3 * HANG_S) -> bool:
    """Before that time has passed, and the thread has not ended."""
    deadline_s = time.monotonic() + within_s
    return not ended(thread, Watch(), HANG_S, lambda: time.monotonic() > deadline_s) and time.monotonic() < deadline_s


def test_who_sleeps_hangs_and_who_computes_does_not() -> None:
    with running(does_nothing) as sleeper, running(computes) as worker:
        assert seems_hung(sleeper)
        assert not seems_hung(worker)


def test_who_waits_gets_on_when_whom_he_waits_for_does() -> None:
    with running(computes) as worker, running(waits_for(worker)) as waiting, running(waits_for(waiting)) as behind:
        assert not seems_hung(behind)
    with running(does_nothing) as sleeper, running(waits_for(sleeper)) as waiting:
        assert seems_hung(waiting)


@pytest.mark.parametrize(("seconds", "hangs"), [((100.0,), True), ((0.1,) * 20, False)])
def test_a_call_of_a_worker_process_gets_on_when_the_process_does(seconds: tuple[float, ...], hangs: bool) -> None:
    workers = Workers()
    calling = threading.Thread(target=lambda: _ignoring(lambda: workers.call(sleep_all, seconds)))
    calling.start()
    try:
        assert seems_hung(calling, within_s=30) is hangs
    finally:
        workers.close()
        calling.join()


def sleep_all(seconds: tuple[float, ...]) -> None:
    for some in seconds:
        time.sleep(some)


def _ignoring(act: Callable[[], object]) -> None:
    with suppress(Stopped):
        act()
