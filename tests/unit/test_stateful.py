"""All ten calls over the socket against the dictionary of tests.model.

Invariants: every answer, refusals and their messages included, is the model's; what was answered
survives a restart and a kill; after Cleanup the disk holds exactly the directories of the snapshots
that exist; once all are removed it holds nothing.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from snapshotter.model import Kind, Usage
from tests import model
from tests.model import Moment
from tests.rig.calls import Caller
from tests.rig.daemon import Daemon
from tests.rig.roots import tear_down

pytestmark = pytest.mark.root

_UNTIMED = settings(
    deadline=None,
    print_blob=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
settings.register_profile("default-stateful", _UNTIMED, max_examples=25, stateful_step_count=40)
settings.register_profile("nightly-stateful", _UNTIMED, max_examples=1000, stateful_step_count=80)
PROFILE = settings.get_profile(
    f"{'nightly' if os.environ.get('HYPOTHESIS_PROFILE') == 'nightly' else 'default'}-stateful"
)


class Long(str):
    """Text that reports show in a few characters."""

    def __repr__(self) -> str:
        return f"Long({self[0]!r} * {len(self) - 1} + {self[-1]!r})"


KEYS = [
    "a",
    "b",
    "default/1/extract-512-Zw== sha256:0f1e",
    "k8s.io/2/extract-not/the last component",
    "tab\tnewline\n\"quoted\" back\\slash 'single'",
    "ünïcödé-😀",
    "nul\0byte",
    "..",
    Long("x" * 65535 + "1"),
    Long("x" * 65535 + "2"),
    Long("😀" * 16384),
]
LABEL_KEYS = ["a", "containerd.io/gc.ref.snapshot.x", "with space", "é\n", 'quo"te']
LABEL_VALUES = ["", "1", "two words", 'quo"te\\', "ü😀", Long("v" * 4096)]
PATHS = ["labels", *(f"labels.{key}" for key in LABEL_KEYS), "labels.nowhere"]
WRONG_PATHS = ["name", "kind", "labelsx", "", "Labels"]
MALFORMED = ["name=x", 'name=="open', "==a", "name==a,,kind==view"]
PATTERNS = ["^a$", "^x+1", "extract-", "[0-9]", "ü|b", "", "^$", "."]


def existing(*kinds: Kind, otherwise: str = "missing") -> st.SearchStrategy[str]:
    """A name that is taken by a snapshot of one of these kinds."""
    return st.runner().flatmap(lambda api: st.sampled_from(api.state.of_kind(*kinds) or [otherwise]))


def mostly(usual: st.SearchStrategy[str], rare: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(usual, usual, usual, usual, rare)


labels = st.dictionaries(st.sampled_from(LABEL_KEYS), st.sampled_from(LABEL_VALUES), max_size=3)
keys = st.sampled_from([*KEYS, ""])
free = st.runner().flatmap(lambda api: st.sampled_from([key for key in KEYS if key not in api.state.snapshots] or KEYS))
taken = mostly(existing(*Kind), keys)
parents = mostly(st.one_of(st.just(""), existing(Kind.COMMITTED, otherwise="")), taken)
paths = st.lists(st.sampled_from(PATHS * 2 + WRONG_PATHS), max_size=3).map(tuple)
field_and_value = st.one_of(
    st.tuples(st.just("name"), taken, st.just("")),
    st.tuples(st.just("parent"), taken, st.just("")),
    st.tuples(st.just("kind"), st.sampled_from(["active", "view", "committed", "Active"]), st.just("")),
    st.tuples(st.just("labels"), st.sampled_from(LABEL_VALUES), st.sampled_from(LABEL_KEYS)),
)


@st.composite
def selectors(draw: st.DrawFn) -> model.Selector:
    field, value, label = draw(field_and_value)
    op = draw(st.sampled_from(["", "==", "==", "!=", "~="]))
    if op == "~=":
        value = draw(st.sampled_from(PATTERNS))
    return model.Selector(field, op, value if op else "", label, bare=draw(st.booleans()))


filters = st.lists(st.lists(selectors(), min_size=1, max_size=3).map(tuple), max_size=3).map(tuple)


class Api(RuleBasedStateMachine):
    """Makes calls one after the other; begins and ends with nothing stored."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__()
        self.daemon = daemon
        self.state = model.State()
        self.connect()

    def connect(self) -> None:
        self.channel = self.daemon.channel()
        self.caller = Caller(self.channel)

    def call(self, call: model.Call) -> model.Answer:
        began_ns = time.time_ns()
        answer = self.caller(call)
        assert not isinstance(answer, model.Unknown), f"{call} was not answered"
        self.state = model.step(self.state, call, answer, Moment(began_ns, time.time_ns()))
        return answer

    # Most examples do not restart the daemon: that takes half a second.
    @initialize(
        restarts=st.sampled_from([0, 0, 4]),
        names=st.permutations(KEYS),
        layers=st.integers(0, 4),
        others=st.integers(0, 3),
    )
    def begin(self, restarts: int, names: list[str], layers: int, others: int) -> None:
        """A chain, and actives and a view on it: Hypothesis leaves whole rules out of an example."""
        self.restarts_left = restarts
        parent = ""
        for name in names[:layers]:
            self.call(model.Prepare("tmp", parent))
            self.call(model.Commit(name, "tmp", labels=dict.fromkeys(LABEL_KEYS, "old")))
            parent = name
        for kind, name in zip((model.Prepare, model.View, model.Prepare)[:others], names[layers:], strict=False):
            self.call(kind(name, parent, dict.fromkeys(LABEL_KEYS, "old")))

    @rule(key=mostly(free, taken), parent=parents, labels=labels)
    def prepare(self, key: str, parent: str, labels: dict[str, str]) -> None:
        self.call(model.Prepare(key, parent, labels))

    @rule(key=mostly(free, taken), parent=parents, labels=labels)
    def view(self, key: str, parent: str, labels: dict[str, str]) -> None:
        self.call(model.View(key, parent, labels))

    @rule(key=taken)
    def mounts(self, key: str) -> None:
        self.call(model.Mounts(key))

    @precondition(lambda self: self.state.of_kind(Kind.ACTIVE))
    @rule(key=existing(Kind.ACTIVE), name=st.sampled_from("abc"), size_bytes=st.sampled_from([0, 1, 10_000]))
    def write(self, key: str, name: str, size_bytes: int) -> None:
        """As a client writes: into the snapshot's own directory, and with a second name for a file."""
        snapshot = self.state.snapshots[key]
        assert snapshot.tree and snapshot.mounts
        (mount,) = snapshot.mounts
        directory = Path(mount.source if mount.type == "bind" else snapshot.tree) / name
        directory.mkdir(exist_ok=True)
        (directory / "file").write_bytes(b"x" * size_bytes)
        (directory / "again").unlink(missing_ok=True)
        (directory / "again").hardlink_to(directory / "file")

    @rule(
        name=mostly(free, taken),
        key=mostly(existing(Kind.ACTIVE), taken),
        parent=st.one_of(st.just(""), parents),
        labels=labels,
    )
    def commit(self, name: str, key: str, parent: str, labels: dict[str, str]) -> None:
        active = self.state.snapshots.get(key)
        before = measure(Path(active.tree)) if active and active.tree else None
        answer = self.call(model.Commit(name, key, parent, labels))
        if answer is None:
            usage = self.call(model.UsageOf(name))
            # That files are shared does not count. Overlay's own attributes may have taken a block and are gone.
            assert before and usage.inodes == before.inodes
            assert before.size_bytes - 4096 * before.inodes <= usage.size_bytes <= before.size_bytes

    @rule(name=taken, labels=labels)
    def commit_under_its_own_key(self, name: str, labels: dict[str, str]) -> None:
        self.call(model.Commit(name, name, "", labels))

    @rule(key=taken)
    def remove(self, key: str) -> None:
        self.call(model.Remove(key))

    @rule(key=taken)
    def stat(self, key: str) -> None:
        self.call(model.Stat(key))

    @rule(name=taken, labels=labels, paths=paths)
    def update(self, name: str, labels: dict[str, str], paths: tuple[str, ...]) -> None:
        self.call(model.Update(name, labels, paths))

    @rule(name=existing(*Kind), label=st.sampled_from(LABEL_KEYS), labels=labels)
    def update_one_label(self, name: str, label: str, labels: dict[str, str]) -> None:
        self.call(model.Update(name, labels, (f"labels.{label}",)))

    @rule(filters=filters)
    def list_some(self, filters: tuple[tuple[model.Selector, ...], ...]) -> None:
        self.call(model.List(filters))

    @rule(filters=filters, malformed=st.sampled_from(MALFORMED))
    def list_wrongly(self, filters: tuple[tuple[model.Selector, ...], ...], malformed: str) -> None:
        self.call(model.List(filters, malformed))

    @rule(key=taken)
    def usage(self, key: str) -> None:
        self.call(model.UsageOf(key))

    @rule()
    def cleanup(self) -> None:
        self.call(model.Cleanup())
        snapshots = self.state.snapshots.values()
        trees = {Path(snapshot.tree) for snapshot in snapshots if snapshot.tree}
        assert set((self.daemon.root / "snapshots").iterdir()) == {tree.parent for tree in trees}
        assert all(tree.is_dir() for tree in trees)
        assert not list((self.daemon.root / "trash").iterdir())
        for snapshot in snapshots:
            if snapshot.kind is Kind.COMMITTED and snapshot.tree:
                assert set(os.listdir(Path(snapshot.tree).parent)) <= {"fs", "refs"}

    @precondition(lambda self: self.restarts_left)
    @rule(kill=st.booleans())
    def restart(self, kill: bool) -> None:
        self.restarts_left -= 1
        self.channel.close()
        self.daemon.restart(kill=kill)
        self.connect()

    @invariant()
    def nothing_else_changed(self) -> None:
        self.call(model.List())

    def teardown(self) -> None:
        try:
            while leaves := [key for key in self.state.snapshots if not self.state.children(key)]:
                for key in leaves:
                    self.call(model.Remove(key))
            self.cleanup()
        finally:
            self.channel.close()
            if sorted((self.daemon.root / "snapshots").iterdir()) or self.state.snapshots:
                self.start_over()

    def start_over(self) -> None:
        """However the example failed, the next one begins with nothing."""
        self.daemon.kill()
        tear_down(self.daemon.root)
        self.daemon.start()


def measure(tree: Path) -> Usage:
    """Bytes allocated and inodes of a tree, each once, its top included."""
    paths = [tree, *(Path(at, name) for at, dirs, files in os.walk(tree) for name in dirs + files)]
    blocks = {status.st_ino: status.st_blocks for status in map(os.lstat, paths)}
    return Usage(512 * sum(blocks.values()), len(blocks))


@pytest.mark.timeout(900)  # a failing example is made small for up to five minutes
@pytest.mark.parametrize("mode", ["daemon", "client"])
def test_the_api_agrees_with_a_dictionary(base: Path, mode: str) -> None:
    arguments = ["--mount-mode", mode]
    with Daemon(base / "root", base / "s.sock", log=base / "daemon.log", arguments=arguments) as daemon:
        run_state_machine_as_test(lambda: Api(daemon), settings=PROFILE)


def test_the_model_refuses_wrong_answers() -> None:
    """The specification itself must be able to fail."""
    state = model.step(model.State(), model.Prepare("k"), (model.Mount("bind", "/1", ("rw",)),))
    missing = model.Refused("NOT_FOUND", 'snapshot "k" does not exist')
    wrong: list[tuple[model.Call, model.Answer]] = [
        (model.Stat("k"), missing),
        (model.Stat("k"), model.Info("k", "", Kind.VIEW, 1, 1)),
        (model.Stat("k"), model.Info("k", "", Kind.ACTIVE, 1, 2)),
        (model.Stat("k"), model.Info("k", "", Kind.ACTIVE, 1, 1, {"a": ""})),
        (model.Remove("other"), missing),
        (model.Remove("other"), model.Refused("INTERNAL", "other")),
        (model.Remove("other"), None),
        (model.Mounts("k"), (model.Mount("bind", "/2", ("rw",)),)),
        (model.Prepare("l"), (model.Mount("bind", "/1", ("rw",)),)),
        (model.Prepare("l"), (model.Mount("bind", "/2", ("ro",)),)),
        (model.List(), ()),
        (model.List(), (model.Info("k", "", Kind.ACTIVE, 1, 1),) * 2),
    ]
    for call, answer in wrong:
        with pytest.raises(model.Mismatch):
            model.step(state, call, answer)
