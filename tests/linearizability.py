"""Is there an order of concurrent calls that a daemon serving one call at a time could have given?

The search is Wing and Gong's (Testing and Verifying Concurrent Objects, 1993) with Lowe's memory of what
was tried: of the calls that are not placed yet, any may come next that began before each other one
ended; a placed set of calls is never tried twice in the same state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests import model


@dataclass(frozen=True, slots=True)
class Event:
    """A call as its caller saw it. Times are of one monotonic clock."""

    began_ns: int
    ended_ns: int
    call: model.Call
    answer: model.Answer


def order(events: Sequence[Event], start: model.State | None = None) -> list[Event] | None:
    """An order that explains the history from `start`, or None. A call without an answer may have happened
    at any time after it began, or not at all, and is left out where it explains nothing."""
    forever = 1 << 63
    ends = [forever if isinstance(event.answer, model.Unknown) else event.ended_ns for event in events]
    answered = sum(1 << index for index, end in enumerate(ends) if end != forever)
    tried: set[tuple[int, object]] = set()
    # The way to the state that is looked at: what was placed, and what is still to try after it.
    path: list[int] = []
    state = start or model.State()
    stack = [(0, state, _next(events, ends, 0))]
    while stack:
        placed, state, candidates = stack[-1]
        if placed & answered == answered:
            return [events[index] for index in path]
        if not candidates:
            stack.pop()
            if path:
                path.pop()
            continue
        index = candidates.pop()
        try:
            after = model.step(state, events[index].call, events[index].answer)
        except model.Mismatch:
            continue
        now_placed = placed | 1 << index
        if (now_placed, after.frozen()) in tried:
            continue
        tried.add((now_placed, after.frozen()))
        path.append(index)
        stack.append((now_placed, after, _next(events, ends, now_placed)))
    return None


def _next(events: Sequence[Event], ends: Sequence[int], placed: int) -> list[int]:
    """The calls that may take effect next, the one to try first at the end."""
    left = [index for index in range(len(events)) if not placed >> index & 1]
    first_end = min((ends[index] for index in left), default=0)
    return sorted(
        (index for index in left if events[index].began_ns <= first_end),
        key=lambda index: ends[index],
        reverse=True,
    )
