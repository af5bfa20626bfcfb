"""What clients have called and what was answered, and what a store must hold, given that.

Time is a count of calls begun and calls answered. A cut is two such times: before the first, what was answered had
happened; after the second, nothing that it shows was begun.

    with journal.call(appears="layer", leaves="key"):
        client.commit("layer", "key")
    before = journal.now()
    ...                                   # the instant
    expected = journal.at(Cut(before, journal.now()))
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

NEVER = 1 << 62
_LOOK_S = 0.005


@dataclass(frozen=True, slots=True)
class Cut:
    """The power was cut, or the daemon killed, between these two times."""

    before: int
    after: int


@dataclass(slots=True)
class Call:
    """One call. Keys and names are in one name space, and used once."""

    begun: int
    appears: str
    leaves: str
    label: str
    answered: int = NEVER
    """Stays so where nobody knows whether it happened."""


@dataclass(slots=True)
class Expected:
    """What a store must hold."""

    must: set[str] = field(default_factory=set)
    """These keys and names."""
    may: set[str] = field(default_factory=set)
    """These, or not; and no others."""
    one_of: list[tuple[str, str]] = field(default_factory=list)
    """Exactly one of these: what was being committed is there as an active snapshot or as a committed one."""
    labels: dict[str, set[str]] = field(default_factory=dict)
    """The values that the label may have, where it was ever set."""


class Journal:
    """Used by several threads."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._ticks = itertools.count(1)
        self._now = 0
        self._lock = threading.Lock()

    def now(self) -> int:
        with self._lock:
            return self._now

    def wait_for(self, time: int, stop: threading.Event) -> None:
        """Until so much has happened, or `stop` is set."""
        while self.now() < time and not stop.wait(_LOOK_S):
            pass

    @contextmanager
    def call(self, *, appears: str = "", leaves: str = "", label: str = "") -> Iterator[None]:
        """The block makes a call after which `appears` is there, and `leaves` is not; or `appears` has this label.
        If it raises, nobody knows."""
        with self._lock:
            call = Call(self._tick(), appears, leaves, label)
            self._calls.append(call)
        yield
        with self._lock:
            call.answered = self._tick()

    def at(self, cut: Cut) -> Expected:
        """What must be there after a cut."""
        with self._lock:
            calls = [call for call in self._calls if call.begun <= cut.after]
        expected = Expected()
        leaving = {call.leaves for call in calls if call.leaves}
        gone = {call.leaves for call in calls if call.answered <= cut.before}
        moves = [call for call in calls if not call.label]
        for call in moves:
            if not call.appears or call.appears in gone:
                continue
            is_certain = call.answered <= cut.before and call.appears not in leaving
            (expected.must if is_certain else expected.may).add(call.appears)
        for call in moves:
            if call.appears in expected.may and call.leaves and call.appears not in leaving:
                came = next((earlier for earlier in moves if earlier.appears == call.leaves), None)
                if came and came.answered <= cut.before and _is_last(call, moves):
                    expected.one_of.append((call.leaves, call.appears))
        for call in calls:
            if call.label and not _is_overwritten(call, calls, cut):
                expected.labels.setdefault(call.appears, set()).add(call.label)
        for name, labels in expected.labels.items():
            if all(call.answered > cut.before for call in calls if call.label and call.appears == name):
                labels.add("")
        return expected

    def settle(self, found: dict[str, str]) -> None:
        """From now on exactly these keys and names are there, with these labels."""
        with self._lock:
            self._calls = [Call(0, name, "", label, answered=0) for name in found for label in _with_none(found[name])]

    def _tick(self) -> int:
        self._now = next(self._ticks)
        return self._now


def _is_last(call: Call, moves: list[Call]) -> bool:
    """Whether nobody else takes away what it takes."""
    return all(other is call or other.leaves != call.leaves for other in moves)


def _is_overwritten(call: Call, calls: list[Call], cut: Cut) -> bool:
    return any(
        later.label and later.appears == call.appears and later.begun > call.answered and later.answered <= cut.before
        for later in calls
    )


def _with_none(label: str) -> list[str]:
    """Of a snapshot: that it appeared, and its label."""
    return ["", label] if label else [""]
