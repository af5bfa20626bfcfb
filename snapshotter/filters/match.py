"""Tells whether a snapshot satisfies one of many filters without trying each of them.

A filter with an equality or a presence among its selectors is found by that, in a dictionary; filters that
differ only in a regular expression become one. What remains is tried one after the other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from snapshotter.filters.parser import Operator, Selector
from snapshotter.filters.regex import RegexCompiler, Search
from snapshotter.model import Info

_Field = tuple[str, str]
"""What a path leads to: `("labels", KEY)`, or a name and nothing."""
_Facts = dict[_Field, str]
"""The fields that a snapshot has."""
_Test = Callable[[_Facts], bool]
_Filter = tuple[Selector, ...]

_NAME, _PARENT, _KIND = ("name", ""), ("parent", ""), ("kind", "")
_NOWHERE = ("", "")


class Matcher:
    """Called with a snapshot, says whether all selectors of any filter hold; of no filter at all, yes."""

    def __init__(self, filters: Sequence[_Filter]) -> None:
        self._by_fact: defaultdict[tuple[_Field, str], list[list[_Test]]] = defaultdict(list)
        self._by_field: defaultdict[_Field, list[list[_Test]]] = defaultdict(list)
        self._others: list[list[_Test]] = []
        self._always = not filters or () in filters
        with RegexCompiler() as regexes:
            self._add(list(dict.fromkeys(filters)), regexes)

    def __call__(self, info: Info) -> bool:
        if self._always:
            return True
        facts = _facts(info)
        return (
            any(_any_holds(self._by_fact.get(fact), facts) for fact in facts.items())
            or (bool(self._by_field) and any(_any_holds(self._by_field.get(field), facts) for field in facts))
            or _any_holds(self._others, facts)
        )

    def _add(self, filters: list[_Filter], regexes: RegexCompiler) -> None:
        equalities = Counter(s for selectors in filters for s in selectors if s.operator is Operator.EQUAL)
        for (selectors, field), patterns in _by_all_but_regex(filters).items():
            key = _key(selectors, equalities)
            tests = _tests([s for s in selectors if s != key], regexes)
            place = self._place(key)
            if field is None:
                place.append(tests)
            else:
                place += [[*tests, _found(field, search)] for search in regexes.compile_union(patterns)]

    def _place(self, key: Selector | None) -> list[list[_Test]]:
        if key is None:
            return self._others
        if key.operator is Operator.EQUAL:
            return self._by_fact[_field(key.path), key.value]
        return self._by_field[_field(key.path)]


def _by_all_but_regex(filters: Iterable[_Filter]) -> dict[tuple[_Filter, _Field | None], list[str]]:
    """The expressions of the filters that differ in nothing else, by their other selectors and the field
    that they search; a filter without an expression, or with several, as it is, by no field."""
    groups: defaultdict[tuple[_Filter, _Field | None], list[str]] = defaultdict(list)
    for selectors in filters:
        searching = [s for s in selectors if s.operator is Operator.MATCHES]
        if len(searching) == 1:
            others = tuple(s for s in selectors if s.operator is not Operator.MATCHES)
            groups[others, _field(searching[0].path)].append(searching[0].value)
        elif selectors:
            groups[selectors, None] = []
    return groups


def _key(selectors: _Filter, equalities: Counter[Selector]) -> Selector | None:
    """By which selector the filter is found: the equality that fewest filters have, or else a presence."""
    candidates = [s for s in selectors if s.operator is Operator.EQUAL]
    if candidates:
        return min(candidates, key=equalities.__getitem__)
    return next((s for s in selectors if s.operator is Operator.PRESENT), None)


def _tests(selectors: Iterable[Selector], regexes: RegexCompiler) -> list[_Test]:
    """The selectors as functions, cheap ones first, all inequalities of a field as one."""
    cheap: list[_Test] = []
    searching: list[_Test] = []
    unequal: defaultdict[_Field, set[str]] = defaultdict(set)
    for selector in dict.fromkeys(selectors):
        field = _field(selector.path)
        if selector.operator is Operator.MATCHES:
            searching.append(_found(field, regexes.compile(selector.value)))
        elif selector.operator is Operator.NOT_EQUAL:
            unequal[field].add(selector.value)
        elif selector.operator is Operator.EQUAL:
            cheap.append(_equal(field, selector.value))
        else:
            cheap.append(_present(field))
    return cheap + [_none_of(field, values) for field, values in unequal.items()] + searching


def _present(field: _Field) -> _Test:
    return lambda facts: field in facts


def _equal(field: _Field, value: str) -> _Test:
    return lambda facts: facts.get(field) == value


def _none_of(field: _Field, values: set[str]) -> _Test:
    return lambda facts: facts.get(field, "") not in values


def _found(field: _Field, search: Search) -> _Test:
    return lambda facts: search(facts.get(field, "").encode()) is not None


def _any_holds(filters: Iterable[list[_Test]] | None, facts: _Facts) -> bool:
    return bool(filters) and any(all(test(facts) for test in tests) for tests in filters or ())


def _facts(info: Info) -> _Facts:
    facts = {_NAME: info.name, _PARENT: info.parent, _KIND: info.kind.name.lower()}
    for key, value in info.labels.items():
        facts["labels", key] = value
    return facts


def _field(path: tuple[str, ...]) -> _Field:
    """Only labels look at what follows the first field; a field that no snapshot has leads nowhere."""
    first = path[0]
    if first == "labels":
        return "labels", ".".join(path[1:])
    return (first, "") if first in ("name", "parent", "kind") else _NOWHERE
