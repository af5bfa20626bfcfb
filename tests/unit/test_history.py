"""Calls from many threads over the socket: some order of one after the other explains all answers.

Invariant: the daemon is linearizable. A call takes effect at one moment between its begin and its
answer; one that a kill leaves without an answer took effect at one moment or not at all, and what was
answered before the kill is still so after it.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from snapshotter.model import Info, Kind, Mount
from tests import model
from tests.linearizability import Event, order
from tests.rig.calls import Caller
from tests.rig.daemon import CLIENT_MODE, Daemon

pytestmark = pytest.mark.root

THREADS, CALLS = 4, 6
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
ROUNDS = 2000 if NIGHTLY else 120
KILLED_ROUNDS = 100 if NIGHTLY else 8
KEYS = ("k", "l", "m/extract-1 x")


def random_call(source: random.Random, tag: str) -> model.Call:
    """Each that writes carries a label of its own, so that an answer tells whose effect it saw."""
    key, name, parent = source.choices(KEYS, k=3)
    labels = {"by": tag}
    makers: dict[Callable[[], model.Call], int] = {
        lambda: model.Prepare(key, source.choice(["", "", parent]), labels): 4,
        lambda: model.View(key, source.choice(["", parent]), labels): 1,
        lambda: model.Commit(name, key, source.choice(["", "", parent]), labels): 4,
        lambda: model.Remove(key): 3,
        lambda: model.Stat(key): 2,
        lambda: model.Mounts(key): 1,
        lambda: model.UsageOf(key): 1,
        lambda: model.Update(key, {tag: "x"}, (f"labels.{tag}",)): 2,
        lambda: model.List(((model.Selector("kind", "==", "committed"),),)): 1,
        lambda: model.List(): 2,
        lambda: model.Cleanup(): 1,
    }
    return source.choices(list(makers), list(makers.values()))[0]()


def record(daemon: Daemon, seed: int, kill_after_s: float | None = None) -> list[Event]:
    """What threads with a connection each, that start together, call and see."""
    events: list[Event] = []
    barrier = threading.Barrier(THREADS + 1)

    def run(number: int) -> None:
        source = random.Random(f"{seed}.{number}")
        with daemon.channel() as channel:
            caller = Caller(channel)
            caller(model.Stat("connected"))
            barrier.wait()
            for turn in range(CALLS):
                call = random_call(source, f"t{number}.{turn}")
                began_ns = time.monotonic_ns()
                answer = caller(call)
                events.append(Event(began_ns, time.monotonic_ns(), call, answer))
                if isinstance(answer, model.Unknown):
                    return

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    barrier.wait()
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        daemon.kill()
    for thread in threads:
        thread.join()
    return events


def seen_afterwards(daemon: Daemon) -> list[Event]:
    """The state that the calls left behind, as events of their own; then all is removed."""
    events = []
    with daemon.channel() as channel:
        caller = Caller(channel)

        def call(call: model.Call) -> model.Answer:
            began_ns = time.monotonic_ns()
            answer = caller(call)
            events.append(Event(began_ns, time.monotonic_ns(), call, answer))
            return answer

        for _ in range(2 * len(KEYS)):  # enough for any answers that make sense
            infos = call(model.List())
            assert isinstance(infos, tuple)
            for info in infos:
                assert isinstance(info, Info)
                if info.kind is not Kind.COMMITTED:
                    call(model.Mounts(info.name))
                call(model.UsageOf(info.name))
            parents = {info.parent for info in infos if isinstance(info, Info)}
            for info in infos:
                if isinstance(info, Info) and info.name not in parents:
                    call(model.Remove(info.name))
            if not infos:
                break
        call(model.Cleanup())
    return events


def check_empty(root: Path) -> None:
    assert not list((root / "snapshots").iterdir())
    assert not list((root / "trash").iterdir())


def check(events: Sequence[Event], seed: int) -> None:
    if order(events) is None:
        pytest.fail(f"no order explains this history (seed {seed}):\n{explain(events)}", pytrace=False)


def explain(events: Sequence[Event]) -> str:
    began = min(event.began_ns for event in events)
    lines = [
        f"{(e.began_ns - began) / 1e6:9.3f} {(e.ended_ns - began) / 1e6:9.3f}  {e.call} -> {e.answer}"
        for e in sorted(events, key=lambda event: event.began_ns)
    ]
    return "\n".join(lines)


def test_concurrent_calls_are_linearizable(daemon: Daemon) -> None:
    seed = random.randrange(1 << 32)
    together = 0
    for number in range(ROUNDS):
        events = record(daemon, seed + number)
        assert len(events) == THREADS * CALLS
        together += sum(a.began_ns < b.ended_ns and b.began_ns < a.ended_ns for a, b in itertools.pairwise(events))
        events += seen_afterwards(daemon)
        assert not any(isinstance(event.answer, model.Unknown) for event in events)
        check(events, seed + number)
        check_empty(daemon.root)
    assert together > ROUNDS, "the calls did not overlap"


def test_a_kill_loses_nothing_that_was_answered_and_does_nothing_by_half(base: Path) -> None:
    seed = random.randrange(1 << 32)
    unanswered = 0
    with Daemon(base / "root", base / "s.sock", log=base / "daemon.log", arguments=CLIENT_MODE) as daemon:
        for number in range(KILLED_ROUNDS):
            events = record(daemon, seed + number, kill_after_s=random.uniform(0.001, 0.02))
            unanswered += sum(isinstance(event.answer, model.Unknown) for event in events)
            daemon.start()
            events += seen_afterwards(daemon)
            check(events, seed + number)
            check_empty(daemon.root)
    assert unanswered, "no kill ever met a call"


# -- the search itself ------------------------------------------------------------------------------

BIND = (Mount("bind", "/1", ("rw",)),)
OTHER = (Mount("bind", "/2", ("rw",)),)
MISSING = model.Refused("NOT_FOUND", '"k"')
EXISTS = model.Refused("ALREADY_EXISTS", '"k"')
INFO = Info("k", "", Kind.ACTIVE, 5, 5)


@pytest.mark.parametrize(
    "events",
    [
        # Both began before either ended: each may be the first.
        [Event(0, 9, model.Prepare("k"), BIND), Event(1, 8, model.Stat("k"), MISSING)],
        [Event(0, 9, model.Prepare("k"), BIND), Event(1, 8, model.Stat("k"), INFO)],
        [Event(0, 9, model.Prepare("k"), EXISTS), Event(1, 8, model.Prepare("k"), BIND)],
        # Without an answer: it happened, long after its caller gave up, or never.
        [Event(0, 1, model.Prepare("k"), model.Unknown()), Event(2, 3, model.Stat("k"), INFO)],
        [Event(0, 1, model.Prepare("k"), model.Unknown()), Event(2, 3, model.Stat("k"), MISSING)],
        [
            Event(0, 1, model.Prepare("k"), model.Unknown()),
            Event(2, 3, model.Stat("k"), MISSING),
            Event(4, 5, model.Stat("k"), INFO),
        ],
    ],
)
def test_a_history_that_has_an_order_is_accepted(events: list[Event]) -> None:
    assert order(events) is not None


@pytest.mark.parametrize(
    "events",
    [
        # A read that misses what was answered before it began.
        [Event(0, 1, model.Prepare("k"), BIND), Event(2, 3, model.Stat("k"), MISSING)],
        # Both creations succeed.
        [Event(0, 9, model.Prepare("k"), BIND), Event(1, 8, model.Prepare("k"), OTHER)],
        # Both fail, and nobody made it.
        [Event(0, 9, model.Prepare("k"), EXISTS), Event(1, 8, model.Prepare("k"), EXISTS)],
        # Seen, then not seen again, and nobody removed it.
        [
            Event(0, 9, model.Prepare("k"), BIND),
            Event(1, 2, model.Stat("k"), INFO),
            Event(3, 4, model.Stat("k"), MISSING),
        ],
        # A directory that was another snapshot's before.
        [
            Event(0, 1, model.Prepare("k"), BIND),
            Event(2, 3, model.Remove("k"), None),
            Event(4, 5, model.Prepare("k"), BIND),
        ],
        # Without an answer, and twice: gone and back.
        [
            Event(0, 1, model.Prepare("k"), model.Unknown()),
            Event(2, 3, model.Stat("k"), INFO),
            Event(4, 5, model.Stat("k"), MISSING),
        ],
    ],
)
def test_a_history_without_an_order_is_refused(events: list[Event]) -> None:
    assert order(events) is None


def test_a_real_history_with_one_answer_changed_is_refused(daemon: Daemon) -> None:
    """Takes a Remove that succeeded as refused, in recorded histories of full length."""
    doctored = 0
    for seed in range(40):
        events = record(daemon, seed) + seen_afterwards(daemon)
        check(events, seed)
        for index, event in enumerate(events):
            if isinstance(event.call, model.Remove) and event.answer is None:
                lie = model.Refused("NOT_FOUND", f'"{event.call.key}"')
                changed = [*events[:index], dataclasses.replace(event, answer=lie), *events[index + 1 :]]
                assert order(changed) is None, explain(changed)
                doctored += 1
    assert doctored > 20
