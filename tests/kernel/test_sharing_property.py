"""Whatever is in the store, and whatever is done to other snapshots: a tree reads what a plain copy of it reads.

Layers of images and layers made by containers, in several chains, made under several strategies, in one store; the
daemon is stopped, killed and rebooted in between. Each layer and each container has a plain directory as its model, to
which the same is done. After every step all mounts that there are must read like their models: modes, owners, times,
attributes, link groups and contents. Further:
- no file of a chain has an inode in common with a file of another layer of the chain;
- a layer that is unpacked twice, reads the same twice;
- when all snapshots are removed, no object is left.
"""

from __future__ import annotations

import itertools
import os
import shutil
import stat
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
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

from snapshotter.errors import SnapshotterError
from tests.rig import random_tree
from tests.rig.host import Host, upper_of
from tests.rig.random_tree import Act, Node
from tests.rig.roots import tear_down
from tests.rig.seen import Seen, seen

pytestmark = pytest.mark.root

STRATEGIES = ("stub", "hardlink", "stub", "hardlink", "off")
MOST_LAYERS, MOST_CONTAINERS = 7, 3
_ALL = settings(
    deadline=None,
    print_blob=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
numbers = st.integers(0, 11)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One that is mounted. `reads`: what its model shows."""

    name: str
    parent: str
    plain: Path
    merged: Path
    mount: ExitStack
    reads: Mapping[str, Seen]


class Switched(Host):
    """A host that knows which strategy its daemon follows from its next start on."""

    strategy = ""

    def use(self, strategy: str) -> None:
        self.strategy = strategy
        self.configure(dedup={"strategy": strategy})


class Sharing(RuleBasedStateMachine):
    """Begins and ends with nothing stored."""

    def __init__(self, host: Switched) -> None:
        super().__init__()
        self.host = host
        self.models = host.base / "models"
        self.models.mkdir()
        self.clock = random_tree.clock()
        self.count = itertools.count()
        self.layers: dict[str, Snapshot] = {}
        self.containers: dict[str, Snapshot] = {}
        self.unpacked: list[tuple[Node, ...]] = []
        self.restarts_left = 0

    # Most examples do not restart the daemon: that takes half a second.
    @initialize(strategy=st.sampled_from(STRATEGIES), restarts=st.sampled_from([0, 0, 2]), layer=random_tree.layers)
    def begin(self, strategy: str, restarts: int, layer: tuple[Node, ...]) -> None:
        """Two images that begin alike."""
        self.restarts_left = restarts
        if self.host.strategy != strategy:
            self.host.use(strategy)
            self.host.restart()
        self.unpack_layer("", layer)
        self.unpack_layer("", layer)

    @precondition(lambda self: len(self.layers) < MOST_LAYERS)
    @rule(parent=numbers, layer=random_tree.layers)
    def unpack(self, parent: int, layer: tuple[Node, ...]) -> None:
        self.unpack_layer(self.some_layer(parent), layer)

    @precondition(lambda self: len(self.layers) < MOST_LAYERS)
    @rule(parent=numbers, which=numbers, place=st.sampled_from(["again", "again", ""]))
    def unpack_again(self, parent: int, which: int, place: str) -> None:
        """The same files, at other paths or at the same."""
        layer = self.unpacked[which % len(self.unpacked)]
        moved = tuple(replace(node, path=os.path.join(place, node.path)) for node in layer)
        self.unpack_layer(self.some_layer(parent), moved)

    @precondition(lambda self: len(self.containers) < MOST_CONTAINERS)
    @rule(parent=numbers)
    def run(self, parent: int) -> None:
        layer, key = self.some_layer(parent), f"key {next(self.count)}"
        mount = ExitStack()
        merged = mount.enter_context(self.host.running(key, layer))
        plain = self.model_of(layer)
        now_ns = next(self.clock)
        for top in (merged, plain):
            os.utime(top, ns=(now_ns, now_ns))
        self.containers[key] = Snapshot(key, layer, plain, merged, mount, reading(plain))

    @precondition(lambda self: self.containers)
    @rule(container=numbers, acts=random_tree.acts)
    def act(self, container: int, acts: tuple[Act, ...]) -> None:
        there = self.some_container(container)
        random_tree.perform(acts, there.merged, there.plain, self.clock)
        self.containers[there.name] = replace(there, reads=reading(there.plain))

    @precondition(lambda self: self.containers and len(self.layers) < MOST_LAYERS)
    @rule(container=numbers, stays_bound=st.sampled_from([False, False, False, True]))
    def commit(self, container: int, stays_bound: bool) -> None:
        """With `stays_bound`, somebody has forgotten a mount."""
        there, name = self.some_container(container), f"layer {next(self.count)}"
        if not stays_bound:
            there.mount.close()
        self.host.client.commit(name, there.name)
        if stays_bound:
            assert_reads(there)
        there.mount.close()
        del self.containers[there.name]
        self.layers[name] = self.viewed(Snapshot(name, there.parent, there.plain, Path(), ExitStack(), there.reads))

    @rule(which=numbers)
    def remove(self, which: int) -> None:
        leaves = self.leaves()
        if leaves:
            self.remove_one(leaves[which % len(leaves)])

    @rule()
    def cleanup(self) -> None:
        self.host.client.cleanup()

    @precondition(lambda self: self.restarts_left)
    @rule(how=st.sampled_from(["stop", "kill", "reboot"]), strategy=st.sampled_from(STRATEGIES))
    def restart(self, how: str, strategy: str) -> None:
        self.restarts_left -= 1
        if how == "reboot":
            for snapshot in (*self.layers.values(), *self.containers.values()):
                snapshot.mount.close()
        self.host.use(strategy)
        if how == "reboot":
            self.host.reboot()
            self.mount_all_again()
        else:
            self.host.restart(kill=how == "kill")

    @invariant()
    def everything_reads_like_its_model(self) -> None:
        for snapshot in (*self.layers.values(), *self.containers.values()):
            assert_reads(snapshot)

    def teardown(self) -> None:
        try:
            for name in self.layers:
                assert_no_alias(self.host.layers(name))
            while leaves := self.leaves():
                for name in leaves:
                    self.remove_one(name)
            self.host.client.cleanup()
            assert objects(self.host) == []
        finally:
            if self.layers or self.containers or objects(self.host):
                self.start_over()
            shutil.rmtree(self.models)

    # -- what the rules are made of

    def unpack_layer(self, parent: str, layer: tuple[Node, ...]) -> None:
        key, name = f"extract-{next(self.count)}", f"layer {next(self.count)}"
        upper, plain = upper_of(self.host.client.prepare(key, parent)), self.model_of(parent)
        random_tree.unpack(layer, upper, plain)
        self.host.client.commit(name, key)
        self.layers[name] = self.viewed(Snapshot(name, parent, plain, Path(), ExitStack(), reading(plain)))
        self.unpacked.append(layer)

    def viewed(self, layer: Snapshot) -> Snapshot:
        mount = ExitStack()
        return replace(layer, mount=mount, merged=mount.enter_context(self.host.viewed(layer.name)))

    def model_of(self, parent: str) -> Path:
        """A copy of the parent's."""
        plain = self.models / str(next(self.count))
        if parent:
            subprocess.run(["cp", "-a", self.layers[parent].plain, plain], check=True)
        else:
            plain.mkdir(mode=0o755)
        return plain

    def mount_all_again(self) -> None:
        for name, layer in self.layers.items():
            self.layers[name] = self.viewed(layer)
        for key, container in self.containers.items():
            mount = ExitStack()
            merged = mount.enter_context(self.host.again(key))
            self.containers[key] = replace(container, mount=mount, merged=merged)

    def some_layer(self, number: int) -> str:
        """A name, or none: each the same number of times."""
        return ["", *self.layers][number % (len(self.layers) + 1)]

    def some_container(self, number: int) -> Snapshot:
        return list(self.containers.values())[number % len(self.containers)]

    def leaves(self) -> list[str]:
        parents = {snapshot.parent for snapshot in (*self.layers.values(), *self.containers.values())}
        return [name for name in (*self.layers, *self.containers) if name not in parents]

    def remove_one(self, name: str) -> None:
        snapshot = self.containers.pop(name, None) or self.layers.pop(name)
        snapshot.mount.close()
        self.host.client.remove(name)

    def start_over(self) -> None:
        """However the example failed, the next one begins with nothing."""
        for snapshot in (*self.layers.values(), *self.containers.values()):
            try:
                snapshot.mount.close()
            except (OSError, SnapshotterError):
                continue  # it is what failed
        self.host.daemon.kill()
        tear_down(self.host.root)
        self.host.restart()


def reading(plain: Path) -> dict[str, Seen]:
    """Of what the kernel's link count says, nothing is left: overlays count a link for names that are hidden, and
    objects have links elsewhere."""
    return {path: replace(entry, links=0) for path, entry in seen(plain).items()}


def assert_reads(snapshot: Snapshot) -> None:
    found = reading(snapshot.merged)
    if found != snapshot.reads:
        pytest.fail(f"{snapshot.name!r} reads otherwise: " + "; ".join(differences(snapshot.reads, found)))


def differences(expected: Mapping[str, Seen], found: Mapping[str, Seen]) -> list[str]:
    lines = []
    for path in sorted(expected.keys() | found.keys()):
        one, other = expected.get(path), found.get(path)
        if one is None or other is None:
            lines.append(f"{path!r} is {'missing' if other is None else 'too much'}")
            continue
        for field in fields(Seen):
            want, have = getattr(one, field.name), getattr(other, field.name)
            if want != have:
                lines.append(f"{field.name} of {path!r} is {shown(have)}, not {shown(want)}")
    return lines


def shown(value: object) -> str:
    if isinstance(value, bytes) and len(value) > 40:
        return f"{value[:20]!r}… ({len(value)} bytes)"
    return oct(value) if isinstance(value, int) and 0 < value < 1 << 17 else repr(value)


def assert_no_alias(trees: Sequence[Path]) -> None:
    """A file of one layer is no file of another layer of the chain."""
    users: dict[int, Path] = {}
    for tree in trees:
        for path in tree.rglob("*"):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                user = users.setdefault(status.st_ino, tree)
                assert user == tree, f"{path} is also a file of {user}"


def objects(host: Host) -> list[Path]:
    return sorted((host.root / "objects").glob("*/*"))


# A failing example is made small for up to five minutes.
@pytest.mark.parametrize(
    "examples",
    [
        pytest.param(24, marks=pytest.mark.timeout(900)),
        pytest.param(400, marks=[pytest.mark.nightly, pytest.mark.timeout(3600)]),
    ],
)
def test_every_path_reads_what_a_plain_copy_reads(base: Path, examples: int) -> None:
    profile = settings(_ALL, max_examples=examples, stateful_step_count=15)
    with Switched(base) as host:
        run_state_machine_as_test(lambda: Sharing(host), settings=profile)
