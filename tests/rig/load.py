"""A mixed load on a daemon, by several clients, which all that they do repeat from a seed (but not the order in which
the daemon gets it): images are unpacked, containers change files and are committed, layers are removed, labelled and
viewed, and leftovers collected.

Each layer has a plain directory as its model, to which the same is done. The journal knows which calls were begun and
answered, and `layers` what each committed snapshot must read.

    load = Load(host, seed)
    with load.running() as running:
        load.journal.wait_for(500, running.stop)
    running.failures                        # none; or `running.stop` is set because the daemon is gone
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from snapshotter.errors import Unavailable
from snapshotter.model import Info, Kind
from tests.rig import random_tree
from tests.rig.aliases import Groups, links_of_tree
from tests.rig.host import Host, upper_of
from tests.rig.journal import Journal
from tests.rig.random_tree import Node
from tests.rig.seen import Seen, seen

LABEL = "note"
MOST_LAYERS = 24
_DEEPEST = 6
_SEEDS = 400

Reading = Mapping[str, Seen]

MIXED: Mapping[str, int] = {
    "unpack": 8,
    "change": 4,
    "change_bound": 1,
    "change_open": 1,
    "leave": 1,
    "give_up": 1,
    "view": 2,
    "label": 2,
    "remove": 4,
    "cleanup": 1,
    "collect": 1,
}
IMPORTS: Mapping[str, int] = {"unpack": 4, "remove": 1}
"""Nothing that freezes an upper, which writes out the whole filesystem and so hides what was not synced."""
COPIES: Mapping[str, int] = {"unpack": 2, "change_bound": 2, "change_open": 2, "remove": 1}


@dataclass(slots=True)
class Layer:
    """A committed snapshot."""

    parent: str
    reads: Reading
    """Whole: with all layers below."""
    links: Groups
    """The paths that are one file."""
    plain: Path
    depth: int
    users: int = 0
    """Of its children, and of calls that are under way."""


class Running:
    """One run of the load."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.failures: list[str] = []


class Load:
    """Goes on from run to run. What it mounts is below the host's base."""

    def __init__(
        self,
        host: Host,
        seed: int,
        shares: Mapping[str, int] = MIXED,
        committed: Callable[[random.Random], object] = lambda _choose: None,
        clients: int = 4,
    ) -> None:
        """`shares`: how often clients do what. `committed` is called by a client right after the answer to a Commit."""
        self.journal = Journal()
        self.layers: dict[str, Layer] = {}
        """All whose commit was ever begun, as long as nobody knows that they are gone."""
        self._host = host
        self._shares = shares
        self._committed = committed
        self._clients = clients
        self._choose = random.Random(seed)
        self._models = host.base / "models"
        self._models.mkdir()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._there: set[str] = set()
        """The layers on which something can be built."""
        self._left: dict[str, str] = {}
        """Active snapshots, or views, in which nobody is interested any more, and their parents."""
        self._unpacked: deque[tuple[Node, ...]] = deque(maxlen=8)

    @contextmanager
    def running(self) -> Iterator[Running]:
        """With its clients at work while the block lasts, unless the daemon dies."""
        run = Running()
        _ = self._host.client  # one for all
        threads = [
            threading.Thread(target=self._work, args=(run, random.Random(self._choose.random())))
            for _ in range(self._clients)
        ]
        for thread in threads:
            thread.start()
        try:
            yield run
        finally:
            run.stop.set()
            for thread in threads:
                thread.join()

    def settle(self, infos: Mapping[str, Info]) -> None:
        """After a kill: what there is. The load is not running."""
        self.journal.settle({name: info.labels.get(LABEL, "") for name, info in infos.items()})
        for name in self.layers.keys() - infos.keys():
            plain = self.layers.pop(name).plain
            if plain.exists():
                shutil.rmtree(plain)
        parents = [info.parent for info in infos.values()]
        for name, layer in self.layers.items():
            layer.users = parents.count(name)
        self._there = set(self.layers)
        self._left = {name: info.parent for name, info in infos.items() if info.kind is not Kind.COMMITTED}

    # -- what clients do

    def _work(self, run: Running, choose: random.Random) -> None:
        acts = list(self._shares)
        while not run.stop.is_set():
            act = choose.choices(acts, list(self._shares.values()))[0]
            try:
                getattr(self, f"_{act}")(choose)
            except Unavailable:
                run.stop.set()
            except Exception as error:
                run.failures.append(f"{act}: {type(error).__name__}: {error}")
                run.stop.set()

    def _unpack(self, choose: random.Random) -> None:
        layer = self._some_files(choose)
        with self._some_parent(choose) as parent, self._model_of(parent) as plain:
            key = self._new("extract")
            with self.journal.call(appears=key):
                upper = upper_of(self._host.client.prepare(key, parent))
            random_tree.unpack(layer, upper, plain)
            self._commit(choose, key, parent, plain)
        self._unpacked.append(layer)

    def _some_files(self, choose: random.Random) -> tuple[Node, ...]:
        """Often those of an image that there was, at the same paths or elsewhere."""
        if self._unpacked and choose.random() < 0.3:
            place = choose.choice(("", "again"))
            layer = choose.choice(list(self._unpacked))
            return tuple(replace(node, path=os.path.join(place, node.path)) for node in layer)
        return random_tree.some_layer(choose, _SEEDS)

    def _change(self, choose: random.Random) -> None:
        """In a container, which ends before the commit."""
        self._run_container(choose, lambda mount, *_: mount.close())

    def _change_bound(self, choose: random.Random) -> None:
        """Somebody forgets a mount."""
        self._run_container(choose, lambda *_: None)

    def _change_open(self, choose: random.Random) -> None:
        """Somebody has a file open for writing."""
        self._run_container(choose, lambda mount, *where: mount.enter_context(self._left_open(*where)))

    def _run_container(self, choose: random.Random, at_the_end: Callable[[ExitStack, Path, Path, int], object]) -> None:
        with self._some_parent(choose) as parent, self._model_of(parent) as plain, ExitStack() as mount:
            key = self._prepare(parent)
            merged = mount.enter_context(self._host.again(key))
            clock = random_tree.clock()
            now_ns = next(clock)
            for top in (merged, plain):
                os.utime(top, ns=(now_ns, now_ns))
            for _ in range(choose.randint(1, 3)):
                random_tree.perform(random_tree.some_acts(choose, _SEEDS), merged, plain, clock)
            at_the_end(mount, merged, plain, next(clock))
            self._commit(choose, key, parent, plain)

    def _left_open(self, merged: Path, plain: Path, now_ns: int) -> BinaryIO:
        """A new file, open for writing in the container."""
        name = self._new("open")
        for top in (merged, plain):
            (top / name).touch()
        stream = (merged / name).open("r+b")
        for top, path in itertools.product((merged, plain), (name, ".")):
            os.utime(top / path, ns=(now_ns, now_ns))
        return stream

    def _leave(self, choose: random.Random) -> None:
        """A container that stays."""
        with self._some_parent(choose) as parent:
            key = self._prepare(parent)
            with self._host.again(key) as merged:
                (merged / "left").write_bytes(random_tree.data(choose.randrange(_SEEDS), 70_000))
            with self._lock:
                self._use(parent)
                self._left[key] = parent

    def _give_up(self, choose: random.Random) -> None:
        with self._lock:
            if not self._left:
                return
            key = choose.choice(sorted(self._left))
            parent = self._left.pop(key)
        with self.journal.call(leaves=key):
            self._host.client.remove(key)
        with self._lock:
            self._use(parent, -1)

    def _view(self, choose: random.Random) -> None:
        with self._some_parent(choose) as parent:
            key = self._new("view")
            with self.journal.call(appears=key):
                mounts = self._host.client.view(key, parent)
            with self._host.mounted(mounts) as merged:
                os.listdir(merged)
            with self.journal.call(leaves=key):
                self._host.client.remove(key)

    def _label(self, choose: random.Random) -> None:
        with self._some_parent(choose) as name:
            if name:
                label = self._new("label")
                with self.journal.call(appears=name, label=label):
                    self._host.client.update_labels(name, {LABEL: label})

    def _remove(self, choose: random.Random) -> None:
        """A layer on which nothing stands; seldom while there are few."""
        if choose.randrange(MOST_LAYERS) > len(self._there):
            return
        with self._lock:
            unused = sorted(name for name in self._there if not self.layers[name].users)
            if not unused:
                return
            name = choose.choice(unused)
            self._there.remove(name)
        with self.journal.call(leaves=name):
            self._host.client.remove(name)
        with self._lock:
            layer = self.layers[name]
            self._use(layer.parent, -1)
        shutil.rmtree(layer.plain)

    def _cleanup(self, _choose: random.Random) -> None:
        self._host.client.cleanup()

    def _collect(self, _choose: random.Random) -> None:
        self._host.client.collect()

    # -- what these are made of

    def _new(self, what: str) -> str:
        return f"{what} {next(self._numbers):06}" if what != "extract" else f"extract-{next(self._numbers)} layer"

    @contextmanager
    def _some_parent(self, choose: random.Random) -> Iterator[str]:
        """A layer that nobody removes meanwhile, or none."""
        with self._lock:
            names = sorted(name for name in self._there if self.layers[name].depth < _DEEPEST)
            name = choose.choice(["", *names])
            self._use(name)
        try:
            yield name
        finally:
            with self._lock:
                self._use(name, -1)

    def _use(self, name: str, more: int = 1) -> None:
        """Under the lock."""
        if name:
            self.layers[name].users += more

    @contextmanager
    def _model_of(self, parent: str) -> Iterator[Path]:
        """A copy of the parent's, the caller's to change; it goes with the block unless a layer has it."""
        plain = self._models / self._new("model")
        if parent:
            subprocess.run(["cp", "--archive", self.layers[parent].plain, plain], check=True)
        else:
            plain.mkdir(mode=0o755)
        try:
            yield plain
        finally:
            with self._lock:
                is_used = any(layer.plain == plain for layer in self.layers.values())
            if not is_used:
                shutil.rmtree(plain)

    def _prepare(self, parent: str) -> str:
        key = self._new("container")
        with self.journal.call(appears=key):
            self._host.client.prepare(key, parent)
        return key

    def _commit(self, choose: random.Random, key: str, parent: str, plain: Path) -> None:
        name = self._new("layer")
        with self._lock:
            self._use(parent)
            depth = self.layers[parent].depth + 1 if parent else 0
            self.layers[name] = Layer(parent, reading(plain), links_of_tree(plain), plain, depth)
        with self.journal.call(appears=name, leaves=key):
            self._host.client.commit(name, key)
        self._committed(choose)
        with self._lock:
            self._there.add(name)


def reading(top: Path) -> Reading:
    """What a tree shows. Contents as their hashes; without link counts, in which objects and what is hidden count, and
    without what only some filesystems show."""
    return {path: _comparable(entry) for path, entry in seen(top).items()}


def _comparable(entry: Seen) -> Seen:
    xattrs = tuple((name, value) for name, value in entry.xattrs if not name.startswith(random_tree.TWINS))
    return replace(entry, links=0, xattrs=xattrs, content=blake3(entry.content).digest())
