"""The snapshot API as a dictionary: what each call may answer, and what it changes.

A specification to hold the daemon against, as containerd's interface documents the calls
(core/snapshots/snapshotter.go) and containerd 2.x's metadata answers them. `step` is a relation: it takes
the answer that was seen, raises Mismatch where no correct daemon could have given it, and learns from it
what the specification leaves open (times, directories, usage). So one model serves a single caller, who
knows each answer, and a search for the order in which calls from many threads took effect.

States are values: `step` returns a new one.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from snapshotter.model import Info, Kind, Mount, Usage


class Mismatch(AssertionError):
    """The answer is none that a correct daemon gives in this state."""

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"(.)\1{99,}", r"\1…\1", message))


# -- calls ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepare:
    key: str
    parent: str = ""
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class View:
    key: str
    parent: str = ""
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mounts:
    key: str


@dataclass(frozen=True, slots=True)
class Commit:
    name: str
    key: str
    parent: str = ""
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Remove:
    key: str


@dataclass(frozen=True, slots=True)
class Stat:
    key: str


@dataclass(frozen=True, slots=True)
class Update:
    name: str
    labels: dict[str, str] = field(default_factory=dict)
    paths: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Selector:
    """One term of a filter: `labels.KEY` or name, parent, kind; `op` is ==, !=, ~= or empty (presence)."""

    field: str
    op: str = ""
    value: str = ""
    label: str = ""
    bare: bool = False
    """Written without quotes where the grammar allows it."""

    def __str__(self) -> str:
        path = self.field
        if self.label:
            path += "." + (self.label if self.bare and _BARE_FIELD.fullmatch(self.label) else _go(self.label))
        value = self.value if self.bare and _BARE_VALUE.fullmatch(self.value) else _go(self.value)
        return path + (self.op + value if self.op else "")

    def matches(self, info: Info) -> bool:
        """A field that is absent has no value: it is unequal to every other, and matches as empty text."""
        values = {"name": info.name, "parent": info.parent, "kind": info.kind.name.lower()}
        found = info.labels.get(self.label) if self.field == "labels" else values[self.field]
        if not self.op:
            return found is not None
        if self.op == "==":
            return found == self.value
        if self.op == "!=":
            return (found or "") != self.value
        return re.search(self.value, found or "") is not None


@dataclass(frozen=True, slots=True)
class List:
    """Infos that satisfy all selectors of any filter; a `malformed` one besides makes the call wrong."""

    filters: tuple[tuple[Selector, ...], ...] = ()
    malformed: str = ""

    def texts(self) -> list[str]:
        texts = [",".join(map(str, selectors)) for selectors in self.filters]
        return [*texts, self.malformed] if self.malformed else texts

    def selects(self, info: Info) -> bool:
        return not self.filters or any(all(s.matches(info) for s in selectors) for selectors in self.filters)


@dataclass(frozen=True, slots=True)
class UsageOf:
    key: str


@dataclass(frozen=True, slots=True)
class Cleanup:
    pass


Call: TypeAlias = (
    Prepare | View | Mounts | Commit | Remove | Stat | Update | List | UsageOf | Cleanup
)  # fmt: skip


# -- answers ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Refused:
    """An error: the name of its gRPC code, and its message."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """No answer came, because the daemon died or went away: the call took effect, or it did not."""


Answer: TypeAlias = tuple[Mount, ...] | tuple[Info, ...] | Info | Usage | Refused | Unknown | None


# -- states -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Moment:
    """A time of which we know the earliest and the latest that it can be, in ns since the epoch."""

    low_ns: int = 0
    high_ns: int = 1 << 63

    def __contains__(self, time_ns: int) -> bool:
        return self.low_ns <= time_ns <= self.high_ns


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is known of one snapshot. `mounts`, `tree` and `usage` are None until an answer shows them."""

    kind: Kind
    parent: str
    labels: frozenset[tuple[str, str]]
    created: Moment
    updated: Moment
    untouched: bool = True
    """Whether it was never updated: both times are the same."""
    mounts: tuple[Mount, ...] | None = None
    tree: str | None = None
    """The directory that is its own."""
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class State:
    """All snapshots by key or name, and every directory that any of them ever had."""

    snapshots: Mapping[str, Snapshot] = field(default_factory=dict)
    trees: frozenset[str] = frozenset()

    def frozen(self) -> object:
        """Equal and hashable for equal states."""
        return frozenset(self.snapshots.items()), self.trees

    def children(self, name: str) -> list[str]:
        return [key for key, snapshot in self.snapshots.items() if snapshot.parent == name]

    def chain(self, name: str) -> list[str]:
        """`name` and its ancestors, nearest first; none for an empty name."""
        names = []
        while name:
            names.append(name)
            name = self.snapshots[name].parent
        return names

    def of_kind(self, *kinds: Kind) -> list[str]:
        return [key for key, snapshot in self.snapshots.items() if snapshot.kind in kinds]


def step(state: State, call: Call, answer: Answer, during: Moment | None = None) -> State:
    """The state after a call that was answered so, `during` that time. Raises Mismatch."""
    refusal = _refusal(state, call)
    if isinstance(answer, Unknown):
        return state if refusal else _effect(state, call, during or Moment())
    if refusal:
        _check_refusal(call, refusal, answer)
        return state
    if isinstance(answer, Refused):
        raise Mismatch(f"{call} was refused: {answer}")
    return _learn(_effect(state, call, during or Moment()), call, answer)


# -- errors, in the order in which they are found ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Refusal:
    code: str
    names: str = ""
    """The snapshot that the message names."""
    says: str = ""


def _refusal(state: State, call: Call) -> _Refusal | None:
    known = state.snapshots
    match call:
        case Cleanup():
            return None
        case List():
            return _Refusal("INVALID_ARGUMENT") if call.malformed else None
        case Prepare() | View():
            return _refusal_to_create(known, call)
        case Commit():
            return _refusal_to_commit(known, call)
        case Update():
            if early := _missing(known, call.name):
                return early
            if any(path != "labels" and not path.startswith("labels.") for path in call.paths):
                return _Refusal("INVALID_ARGUMENT", call.name)
            return None
        case _:
            if early := _missing(known, call.key):
                return early
    if isinstance(call, Mounts) and known[call.key].kind is Kind.COMMITTED:
        return _Refusal("FAILED_PRECONDITION", call.key)
    if isinstance(call, Remove) and state.children(call.key):
        return _Refusal("FAILED_PRECONDITION", call.key, says="remove")
    return None


def _missing(known: Mapping[str, Snapshot], key: str) -> _Refusal | None:
    if not key:
        return _Refusal("INVALID_ARGUMENT")
    return None if key in known else _Refusal("NOT_FOUND", key)


def _refusal_to_create(known: Mapping[str, Snapshot], call: Prepare | View) -> _Refusal | None:
    if not call.key:
        return _Refusal("INVALID_ARGUMENT")
    if call.parent:
        if call.parent not in known:
            return _Refusal("NOT_FOUND", call.parent)
        if known[call.parent].kind is not Kind.COMMITTED:
            return _Refusal("INVALID_ARGUMENT", call.parent)
    return _Refusal("ALREADY_EXISTS", call.key) if call.key in known else None


def _refusal_to_commit(known: Mapping[str, Snapshot], call: Commit) -> _Refusal | None:
    if not call.name or not call.key:
        return _Refusal("INVALID_ARGUMENT")
    if call.name in known:
        return _Refusal("ALREADY_EXISTS", call.name)
    if call.key not in known:
        return _Refusal("NOT_FOUND", call.key)
    active = known[call.key]
    if active.kind is not Kind.ACTIVE:
        return _Refusal("FAILED_PRECONDITION", call.key)
    if call.parent in ("", active.parent):
        return None
    if active.parent:
        return _Refusal("INVALID_ARGUMENT", call.key)
    if call.parent not in known:
        return _Refusal("NOT_FOUND", call.parent)
    if known[call.parent].kind is not Kind.COMMITTED:
        return _Refusal("FAILED_PRECONDITION", call.parent)
    if active.mounts and _MOUNTPOINT.search(active.mounts[0].source):
        return _Refusal("FAILED_PRECONDITION", call.key)
    return None


def _check_refusal(call: Call, expected: _Refusal, answer: Answer) -> None:
    if not isinstance(answer, Refused):
        raise Mismatch(f"{call} should be refused with {expected.code}, and was answered: {answer}")
    if answer.code != expected.code:
        raise Mismatch(f"{call} should be refused with {expected.code}, not with {answer}")
    if not names(answer.message, expected.names) or expected.says not in answer.message:
        raise Mismatch(f"{call}: the message does not name {expected.names!r}: {answer.message}")


def names(message: str, key: str) -> bool:
    """Whether a message names a snapshot: with all of its key, or with both ends of a long one."""
    ends = [key] if len(key) <= 200 else [key[:50], key[-50:]]
    return all(json.dumps(end)[1:-1] in message for end in ends)


# -- effects ----------------------------------------------------------------------------------------


def _effect(state: State, call: Call, during: Moment) -> State:
    known = dict(state.snapshots)
    match call:
        case Prepare() | View():
            kind = Kind.ACTIVE if isinstance(call, Prepare) else Kind.VIEW
            known[call.key] = Snapshot(kind, call.parent, _kept(call.labels), during, during)
        case Commit():
            active = known.pop(call.key)
            known[call.name] = Snapshot(
                Kind.COMMITTED,
                active.parent or call.parent,
                _kept(call.labels),
                during,
                during,
                tree=active.tree,
            )
        case Remove():
            del known[call.key]
        case Update():
            known[call.name] = dataclasses.replace(
                known[call.name],
                labels=_kept(_masked(dict(known[call.name].labels), call)),
                updated=during,
                untouched=False,
            )
        case _:
            return state
    return dataclasses.replace(state, snapshots=known)


def _kept(labels: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset((key, value) for key, value in labels.items() if value)


def _masked(labels: dict[str, str], call: Update) -> dict[str, str]:
    for path in call.paths or ("labels",):
        if path == "labels":
            labels = dict(call.labels)
        else:
            key = path.removeprefix("labels.")
            labels[key] = call.labels.get(key, "")
    return labels


# -- what an answer shows ---------------------------------------------------------------------------


def _learn(state: State, call: Call, answer: Answer) -> State:
    match call:
        case Prepare() | View() | Mounts():
            assert isinstance(answer, tuple)
            mounts = tuple(mount for mount in answer if isinstance(mount, Mount))
            return _learn_mounts(state, call.key, mounts, new=not isinstance(call, Mounts))
        case Stat() | Update():
            assert isinstance(answer, Info)
            return _learn_info(state, call.key if isinstance(call, Stat) else call.name, answer)
        case List():
            assert isinstance(answer, tuple)
            return _learn_list(state, call, tuple(info for info in answer if isinstance(info, Info)))
        case UsageOf():
            assert isinstance(answer, Usage)
            return _learn_usage(state, call.key, answer)
        case _:
            if answer is not None:
                raise Mismatch(f"{call} answered {answer}")
            return state


def _learn_info(state: State, key: str, info: Info) -> State:
    was = state.snapshots[key]
    seen = (info.name, info.kind, info.parent, frozenset(info.labels.items()))
    if seen != (key, was.kind, was.parent, was.labels):
        raise Mismatch(f"{info} is not {key!r}: {was}")
    if info.created_ns not in was.created or info.updated_ns not in was.updated:
        raise Mismatch(f"{info} has other times than {was}")
    if was.untouched != (info.created_ns == info.updated_ns) or info.updated_ns < info.created_ns:
        raise Mismatch(f"the times of {info} do not fit each other: {was}")
    created, updated = (Moment(ns, ns) for ns in (info.created_ns, info.updated_ns))
    return _with(state, key, created=created, updated=updated)


def _learn_list(state: State, call: List, infos: tuple[Info, ...]) -> State:
    listed = {info.name: info for info in infos}
    if len(listed) != len(infos):
        raise Mismatch(f"{call} answered a name twice: {[info.name for info in infos]}")
    expected = {
        key
        for key, was in state.snapshots.items()
        if call.selects(Info(key, was.parent, was.kind, 0, 0, dict(was.labels)))
    }
    if listed.keys() != expected:
        raise Mismatch(f"{call} answered {sorted(listed)}, not {sorted(expected)}")
    for key, info in listed.items():
        state = _learn_info(state, key, info)
    return state


def _learn_usage(state: State, key: str, usage: Usage) -> State:
    was = state.snapshots[key]
    if usage.size_bytes < 0 or usage.inodes < 0:
        raise Mismatch(f"{key!r} has usage {usage}")
    if was.kind is not Kind.COMMITTED:
        return state
    if was.usage not in (None, usage):
        raise Mismatch(f"the usage of committed {key!r} changed from {was.usage} to {usage}")
    return _with(state, key, usage=usage)


def _learn_mounts(state: State, key: str, mounts: tuple[Mount, ...], new: bool) -> State:
    was = state.snapshots[key]
    if was.mounts not in (None, mounts):
        raise Mismatch(f"the mounts of {key!r} changed from {was.mounts} to {mounts}")
    if len(mounts) != 1:
        raise Mismatch(f"{key!r} has mounts {mounts}")
    (mount,) = mounts
    values = dict(option.partition("=")[::2] for option in mount.options)
    writable = "upperdir" in values if mount.type == "overlay" else "rw" in values
    if writable != (was.kind is Kind.ACTIVE):
        raise Mismatch(f"{key!r} is a {was.kind.name} with {mount}")
    if mount.type == "overlay":
        _check_lowers(state, key, values["lowerdir"].split(":"))
    tree = was.tree or _own_tree(was, mount, values)
    if tree and new and tree in state.trees:
        raise Mismatch(f"{key!r} got {tree}, which another snapshot had before")
    state = _with(state, key, mounts=mounts, tree=tree)
    return dataclasses.replace(state, trees=state.trees | {tree}) if tree else state


_MOUNTPOINT = re.compile(r"/mounts/(\d+)$")
"""Where the daemon mounts a snapshot, for clients to bind."""


def _own_tree(was: Snapshot, mount: Mount, values: Mapping[str, str]) -> str | None:
    if mount.type == "overlay":
        return values.get("upperdir")
    if _MOUNTPOINT.search(mount.source):
        return _MOUNTPOINT.sub(r"/snapshots/\1/fs", mount.source) if was.kind is Kind.ACTIVE else None
    return None if was.parent else mount.source


def _check_lowers(state: State, key: str, lowers: list[str]) -> None:
    expected = [state.snapshots[name].tree for name in state.chain(state.snapshots[key].parent)]
    fits = len(lowers) == len(expected)
    if not fits or any(want not in (None, have) for want, have in zip(expected, lowers, strict=True)):
        raise Mismatch(f"{key!r} has lower directories {lowers}, not {expected}")


def _with(state: State, key: str, **changes: object) -> State:
    changed = dataclasses.replace(state.snapshots[key], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(state, snapshots={**state.snapshots, key: changed})


# -- the filters' text ------------------------------------------------------------------------------

_BARE_FIELD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_BARE_VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./:-]*")


def _go(text: str) -> str:
    """A Go string literal."""
    return json.dumps(text, ensure_ascii=False)
