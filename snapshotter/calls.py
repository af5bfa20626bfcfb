"""Threads for the calls that block, and an answer in time for those that hang.

A system call that hangs holds its thread until the kernel lets it go. Its client is answered UNAVAILABLE once the
thread, and whom it waits for, has not got on for a while (progress.py); long work that gets on is never cut off. What
the thread brings in the end is logged. So that few threads are lost, one call at a time works on a snapshot, which its
claim sees to, and calls that name what many lost calls named are refused at once, as are all when no thread is left.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

import structlog

from snapshotter.claims import Busy
from snapshotter.errors import Unavailable, quote
from snapshotter.progress import Watch, look_s, where

log = structlog.get_logger()

T = TypeVar("T")

_LOST_PER_NAME = 4
"""Threads of a pool that calls which name the same snapshot may lose."""
_ADVICE = (
    "is the file system of the root frozen, or its disk hung? What was asked for may still happen; call again later"
)


class _Job(Generic[T]):
    """What a thread does, will do, or has done."""

    def __init__(self, act: Callable[[], T], about: tuple[str, ...], answer: asyncio.Future[T]) -> None:
        self._act = act
        self.about = about
        self.answer = answer
        self.began_s = time.monotonic()
        self.thread: int | None = None
        """gettid(2), once a thread has it."""
        self.is_lost = False
        self.future: Future[T]
        self.timer: asyncio.TimerHandle

    def run(self) -> T:
        self.thread = threading.get_native_id()
        return self._act()


class Pool:
    """Some threads. All methods but `close` are the event loop's. `close` it."""

    def __init__(self, name: str, threads: int, watch: Watch, hang_s: float) -> None:
        self.name = name
        self._size = threads
        self._threads = ThreadPoolExecutor(threads, name)
        self._watch = watch
        self._hang_s = hang_s
        self._jobs: set[_Job[Any]] = set()

    def close(self) -> None:
        """Waits for no thread."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(
        self,
        act: Callable[..., T],
        *arguments: Any,
        about: tuple[str, ...] = (),
        unwanted: Callable[[T], object] | None = None,
    ) -> T:
        """What `act` returns, or raises; `about`: the snapshots that it is about, or "". `unwanted` gets, on some
        thread, what `act` returned to nobody: its client has gone, or was answered before.

        While another call has the snapshot (Busy), waits without a thread. Raises Unavailable when it hangs, or would.
        """
        while True:
            self._refuse_if_lost(about)
            job = self._start(lambda: act(*arguments), about)
            try:
                return await job.answer
            except Busy as busy:
                await self._released(busy)
            except BaseException:
                if unwanted:
                    job.future.add_done_callback(partial(_hand_over, unwanted))
                raise

    def leave(self, act: Callable[[], object]) -> None:
        """Has it done some time."""
        self._threads.submit(act)

    def _refuse_if_lost(self, about: tuple[str, ...]) -> None:
        lost = [job for job in self._jobs if job.is_lost]
        if len(lost) == self._size:
            raise Unavailable(f"all {self._size} threads for such calls hang in the kernel; {_ADVICE}")
        for name in filter(None, about):
            if sum(name in job.about for job in lost) >= _LOST_PER_NAME:
                raise Unavailable(f"{_LOST_PER_NAME} calls about snapshot {quote(name)} hang in the kernel; {_ADVICE}")

    def _start(self, act: Callable[[], T], about: tuple[str, ...]) -> _Job[T]:
        loop = asyncio.get_running_loop()
        job = _Job(act, about, loop.create_future())
        job.future = self._threads.submit(job.run)
        job.timer = loop.call_later(look_s(self._hang_s), self._look, job)
        self._jobs.add(job)
        job.future.add_done_callback(lambda _: _soon(loop, self._done, job))
        # A client that went away needs no thread.
        job.answer.add_done_callback(lambda answer: answer.cancelled() and job.future.cancel())
        return job

    def _look(self, job: _Job[Any]) -> None:
        """Now and then, also when the client has gone."""
        if job.future.done():
            return
        if self._idle_s(job) < self._hang_s:
            job.timer = asyncio.get_running_loop().call_later(look_s(self._hang_s), self._look, job)
        elif job.future.cancel():
            _fail(job.answer, f"the call did not begin: all {self._size} threads for such calls hang in the kernel")
        else:
            job.is_lost = True
            log.error("call.hangs", pool=self.name, about=job.about, kernel=where(job.thread or 0))
            _fail(job.answer, f"the call has not got on for {self._hang_s:g} s")

    def _idle_s(self, job: _Job[Any]) -> float:
        """One that waits for a thread gets on when any of those does that have one."""
        threads = [job.thread] if job.thread else [other.thread for other in self._jobs if other.thread]
        return min((self._watch.idle_s(thread) for thread in threads), default=0.0)

    def _done(self, job: _Job[Any]) -> None:
        job.timer.cancel()
        self._jobs.discard(job)
        if job.future.cancelled():
            job.answer.cancel()
            return
        error = job.future.exception()
        if job.is_lost:
            took_s = round(time.monotonic() - job.began_s, 1)
            log.warning("call.goes_on", pool=self.name, about=job.about, took_s=took_s, error=error and str(error))
        if job.answer.done():
            return
        if error is None:
            job.answer.set_result(job.future.result())
        else:
            job.answer.set_exception(error)

    async def _released(self, busy: Busy) -> None:
        loop = asyncio.get_running_loop()
        released = loop.create_future()

        def look() -> None:
            if released.done():
                return
            if self._watch.idle_s(busy.holder) < self._hang_s:
                loop.call_later(look_s(self._hang_s), look)
            else:
                _fail(released, f"another call has the snapshot, and has not got on for {self._hang_s:g} s")

        look()
        busy.released.add_done_callback(lambda _: _soon(loop, _succeed, released))
        await released


class Pools:
    """Threads by what they may wait for, so that what hangs keeps no others. `close` them."""

    def __init__(self, hang_s: float = 60.0) -> None:
        """A thread hangs when it has not got on for `hang_s`."""
        watch = Watch()

        def pool(name: str, threads: int) -> Pool:
            return Pool(name, threads, watch, hang_s)

        self.read = pool("read", 16)
        """For what changes nothing, and reads but metadata and the mount table."""
        self.change = pool("change", 32)
        self.commit = pool("commit", 16)
        self.scan = pool("scan", 4)
        self.list = pool("list", 4)
        self.store = pool("store", 2)
        self.check = pool("check", 2)

    def close(self) -> None:
        for pool in (self.read, self.change, self.commit, self.scan, self.list, self.store, self.check):
            pool.close()


def _soon(loop: asyncio.AbstractEventLoop, act: Callable[..., None], argument: Any) -> None:
    """From a thread; nobody waits any more when the loop is closed."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(act, argument)


def _hand_over(take: Callable[[T], object], future: Future[T]) -> None:
    """What a call returned, if it did."""
    if not future.cancelled() and future.exception() is None:
        take(future.result())


def _succeed(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _fail(answer: asyncio.Future[Any], what: str) -> None:
    if not answer.done():
        answer.set_exception(Unavailable(f"{what}; {_ADVICE}"))
