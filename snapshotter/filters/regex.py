"""Regular expressions as Go's: RE2's syntax, time linear in the text, matched anywhere in it.

Known differences from Go's regexp: RE2 knows `\\C` (any byte) and names groups `(?<name>…)` as Go does since
1.22, it refuses an expression that needs more than MAX_MEM_BYTES, and the versions of Unicode may differ.
Unlike containerd, which logs an expression that does not compile and lets it match nothing, we refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import re2

from snapshotter.errors import InvalidArgument, quote

Search = Callable[[bytes], object]
"""Looks for an expression in UTF-8; None when it is not there."""

MAX_MEM_BYTES = 8 << 20
"""For one expression: a third of it for the program, the rest for the automaton, which is thrown away
and begun anew when it is full."""
MAX_PATTERN_CHARS = 1 << 18
"""In one expression: parsing takes forty times its length, before RE2 finds that the program does not fit."""
MAX_INSTRUCTIONS = 1 << 21
"""In the programs of all expressions of a call; they take about 16 bytes each."""
_UNION_INSTRUCTIONS = 1 << 14
"""Larger unions take longer to match, their automaton being thrown away too often."""


class RegexCompiler:
    """Compiles the expressions of one call, each distinct one once. A context manager, because re2 keeps
    the last 128 that it compiled, with their memory, until it is told not to."""

    def __init__(self) -> None:
        self._options = re2.Options()
        self._options.log_errors = False
        self._options.never_capture = True
        self._options.max_mem = MAX_MEM_BYTES
        self._instructions = 0
        self._compiled: dict[str, re2._Regexp] = {}

    def __enter__(self) -> RegexCompiler:
        return self

    def __exit__(self, *_: object) -> None:
        re2.purge()

    def compile(self, pattern: str) -> Search:
        """Raises InvalidArgument for a wrong expression or one too many."""
        search: Search = self._regexp(pattern).search
        return search

    def compile_union(self, patterns: Iterable[str]) -> list[Search]:
        """A few searches, one of which finds something where one of `patterns` does: thousands of expressions
        take hardly longer than one. Raises as `compile`."""
        searches: list[Search] = []
        batch: list[str] = []
        size = 0
        for pattern in patterns:
            regexp = self._regexp(pattern)
            if r"\Q" in pattern:  # may be open at the end, and would quote what follows
                searches.append(regexp.search)
                continue
            if size + regexp.programsize > _UNION_INSTRUCTIONS:
                searches += self._join(batch)
                batch, size = [], 0
            batch.append(pattern)
            size += regexp.programsize
        return searches + self._join(batch)

    def _join(self, patterns: list[str]) -> list[Search]:
        """One search for all if that compiles (it is a level deeper, and may be too large)."""
        if len(patterns) > 1:
            try:
                union = "|".join(f"(?:{pattern})" for pattern in patterns)
                joined = re2.compile(union.encode(), self._options)
            except re2.error:
                pass
            else:
                return [joined.search]
        return [self._compiled[pattern].search for pattern in patterns]

    def _regexp(self, pattern: str) -> re2._Regexp:
        if pattern not in self._compiled:
            if len(pattern) > MAX_PATTERN_CHARS:
                raise InvalidArgument(f"regular expression {quote(pattern)}: too large ({len(pattern)} characters)")
            try:
                # Checked by Python: RE2 takes the surrogates that UTF-8 forbids, Go does not.
                regexp = re2.compile(pattern.encode(), self._options)
            except UnicodeEncodeError:
                raise InvalidArgument(f"regular expression {quote(pattern)}: not UTF-8") from None
            except re2.error as error:
                raise InvalidArgument(f"regular expression {quote(pattern)}: {_reason(error)}") from error
            self._instructions += regexp.programsize
            if self._instructions > MAX_INSTRUCTIONS:
                raise InvalidArgument(f"regular expression {quote(pattern)}: too many before it, use several calls")
            self._compiled[pattern] = regexp
        return self._compiled[pattern]


def _reason(error: Exception) -> str:
    """RE2's message may repeat the whole expression."""
    message: str | bytes = error.args[0]
    text = message.decode(errors="replace") if isinstance(message, bytes) else message
    kind, colon, detail = text.partition(": ")
    return f"{kind}: {quote(detail, 40)}" if colon else kind
