"""Pools of threads: what hangs is answered, counted and, in the end, over; what it does not need goes on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any

import pytest

from snapshotter.calls import Pool
from snapshotter.errors import Unavailable
from snapshotter.progress import Watch

HANG_S = 0.2
THREADS = 6


class Gate:
    """What threads hang at until it opens."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.entered = 0
        self.open = self._open.set

    def __call__(self) -> str:
        self.entered += 1
        self._open.wait()
        return "through"


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open()


async def lose(pool: Pool, gate: Gate, count: int, about: str = "") -> None:
    """So many threads."""
    answers = await asyncio.gather(*(pool.run(gate, about=(about,)) for _ in range(count)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unavailable] * count


async def until_served(pool: Pool) -> None:
    while True:
        with suppress(Unavailable):
            return await pool.run(lambda: None)
        await asyncio.sleep(0.01)


def new_pool() -> Pool:
    return Pool("test", THREADS, Watch(), HANG_S)


def test_calls_that_name_what_lost_calls_named_are_refused_at_once_and_others_served(gate: Gate) -> None:
    async def scenario(pool: Pool) -> None:
        await lose(pool, gate, 4, "a")
        with pytest.raises(Unavailable, match='4 calls about snapshot "a" hang'):
            await pool.run(gate, about=("b", "a"))
        assert gate.entered == 4
        assert await pool.run(lambda: 1, about=("b", "")) == 1

    run(scenario, gate)


def test_calls_without_a_name_have_none_in_common(gate: Gate) -> None:
    async def scenario(pool: Pool) -> None:
        await lose(pool, gate, THREADS - 1)
        assert await pool.run(lambda: 1, about=("",)) == 1

    run(scenario, gate)


def test_when_all_threads_are_lost_nothing_begins_until_one_is_back(gate: Gate) -> None:
    async def scenario(pool: Pool) -> None:
        await lose(pool, gate, THREADS + 2)
        assert gate.entered == THREADS
        with pytest.raises(Unavailable, match=r"^all 6 threads"):
            await pool.run(gate)
        gate.open()
        await until_served(pool)
        assert gate.entered == THREADS

    run(scenario, gate)


def test_a_thread_is_lost_also_when_its_client_has_gone(gate: Gate) -> None:
    async def scenario(pool: Pool) -> None:
        calls = [asyncio.create_task(pool.run(gate)) for _ in range(THREADS)]
        while gate.entered < THREADS:
            await asyncio.sleep(0.01)
        for call in calls:
            call.cancel()
        with pytest.raises(Unavailable, match="hang in the kernel"):
            await pool.run(gate)
        assert gate.entered == THREADS

    run(scenario, gate)


@pytest.mark.parametrize("gone", [True, False])
def test_what_came_too_late_is_handed_over(gate: Gate, gone: bool) -> None:
    """What was opened for a client that went away, or whose call was lost, must be closed by somebody."""
    unwanted: list[str] = []

    async def scenario(pool: Pool) -> None:
        call = asyncio.create_task(pool.run(gate, unwanted=unwanted.append))
        while not gate.entered:
            await asyncio.sleep(0.01)
        if gone:
            call.cancel()
        with pytest.raises(asyncio.CancelledError if gone else Unavailable):
            await call
        assert unwanted == []
        gate.open()
        while not unwanted:
            await asyncio.sleep(0.01)

    run(scenario, gate)
    assert unwanted == ["through"]


def test_what_was_just_answered_to_who_goes_is_handed_over(gate: Gate) -> None:
    unwanted: list[str] = []
    gate.open()

    async def scenario(pool: Pool) -> None:
        call = asyncio.create_task(pool.run(gate, unwanted=unwanted.append))
        await asyncio.sleep(0)
        (job,) = pool._jobs
        job.future.result()
        pool._done(job)
        call.cancel()  # before it comes to know
        with pytest.raises(asyncio.CancelledError):
            await call
        assert unwanted == ["through"]

    run(scenario, gate)


def test_what_was_wanted_or_failed_is_not_handed_over(gate: Gate) -> None:
    unwanted: list[float] = []

    async def scenario(pool: Pool) -> None:
        assert await pool.run(lambda: 1.0, unwanted=unwanted.append) == 1
        with pytest.raises(ZeroDivisionError):
            await pool.run(lambda: 1 / 0, unwanted=unwanted.append)

    run(scenario, gate)
    assert unwanted == []


def test_what_takes_long_and_gets_on_is_answered(gate: Gate) -> None:
    def work() -> int:
        deadline = time.monotonic() + 5 * HANG_S
        while time.monotonic() < deadline:
            sum(range(1000))
        return 1

    async def scenario(pool: Pool) -> None:
        assert await pool.run(work) == 1

    run(scenario, gate)


def run(scenario: Callable[[Pool], Coroutine[Any, Any, None]], gate: Gate) -> None:
    pool = new_pool()
    try:
        asyncio.run(scenario(pool))
    finally:
        gate.open()
        pool.close()
