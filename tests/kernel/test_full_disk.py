"""A disk without space, without inodes, or read-only.

Every call succeeds, or is refused with RESOURCE_EXHAUSTED and has changed nothing; once there is space the same call
succeeds. What frees space works without any. The daemon never dies.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from snapshotter import mountinfo
from snapshotter.errors import ResourceExhausted, Unavailable
from snapshotter.model import Info, Kind
from tests.rig.filesystem import MAKE, filesystem, fill_up
from tests.rig.host import Host, upper_of
from tests.rig.roots import unmount_below
from tests.rig.seen import Seen, seen

pytestmark = pytest.mark.root

SIZE_BYTES = {"ext4": 64 << 20, "xfs": 320 << 20, "btrfs": 128 << 20}
OPTIONS = {"ext4": ("-N", "1000"), "xfs": (), "btrfs": ()}
"""So few inodes that they can be used up."""
STEPS = {"ext4": 20, "xfs": 20, "btrfs": 4}
"""btrfs takes seconds to be sure that it is full."""
SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(2, 30))]

Tree = dict[str, Seen]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", MAKE)
def test_a_call_succeeds_or_changes_nothing(base: Path, kind: str, seed: int) -> None:
    with a_host(kind, base) as (disk, host):
        pid = host.daemon.pid
        with ExitStack() as mounts:
            run = _Run(host, disk, mounts, random.Random(seed))
            run.unpack("base", "")
            for _ in range(STEPS[kind]):
                run.step()
            assert run.outcomes == {"succeeded", "refused"} or kind == "btrfs"
            run.check_contents()
        assert host.daemon.pid == pid
        host.client.list()
        host.restart(kill=True)
        run.check_contents()


@contextmanager
def a_host(kind: str, base: Path, *options: str) -> Iterator[tuple[Path, Host]]:
    """A small disk, and a daemon whose root is on it."""
    with (
        filesystem(kind, base, SIZE_BYTES[kind], *OPTIONS[kind], *options) as disk,
        Host(base, root=disk / "root") as host,
    ):
        yield disk, host


@pytest.mark.parametrize("kind", MAKE)
def test_what_frees_space_needs_none(base: Path, kind: str) -> None:
    """And who wants to free it sees all there is, however long the answer."""
    keys = [f"{number}" for number in range(30)]
    with a_host(kind, base) as (disk, host):
        pid = host.daemon.pid
        for key in keys:
            host.client.prepare(key, "", {"label": "x" * 20_000})
        fill_up(disk, 0)
        with suppress(ResourceExhausted):
            for number in range(1000):
                host.client.update_labels(keys[0], {"label": f"{number}" * 5000})
        assert {info.name for info in host.client.list()} == set(keys)
        for key in keys:
            host.client.remove(key)
        assert not list(host.client.list())
        host.client.cleanup()
        (disk / "filler").unlink()
        host.client.prepare("again")
        assert host.daemon.pid == pid


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_commit_in_place_needs_no_space(base: Path, kind: str) -> None:
    """Its files stay private, that is all."""
    with a_host(kind, base) as (disk, host):
        upper = upper_of(host.client.prepare("extract-1 image"))
        (upper / "file").write_bytes(b"unpacked" * 1000)
        with host.running("key") as merged:
            (merged / "file").write_bytes(b"changed" * 1000)
        fill_up(disk, 0)
        _use_up_inodes(disk / "inodes", left=0)
        host.client.commit("image", "extract-1 image")
        host.client.commit("layer", "key")
        (disk / "filler").unlink()
        shutil.rmtree(disk / "inodes", ignore_errors=True)
        for name, content in (("image", b"unpacked"), ("layer", b"changed")):
            with host.viewed(name) as merged:
                assert (merged / "file").read_bytes() == content * 1000


@pytest.mark.parametrize("kind", MAKE)
def test_a_commit_without_space_for_a_copy_is_taken_back(base: Path, kind: str) -> None:
    """The snapshot goes on as it was, under whatever mounts it has, and is committed once there is space."""
    with a_host(kind, base) as (disk, host), host.running("key") as merged:
        (merged / "file").write_bytes(os.urandom(1 << 20))
        expected = seen(merged)
        fill_up(disk, 0)
        with pytest.raises(ResourceExhausted):
            host.client.commit("layer", "key")
        if kind != "btrfs":  # which has no space for the commit point
            assert "mount.put_back" in host.daemon.log_text()
        assert [(info.name, info.kind) for info in host.client.list()] == [("key", Kind.ACTIVE)]
        assert seen(merged) == expected
        (disk / "filler").unlink()
        (merged / "later").write_text("written")
        assert (host.materialized("key") / "later").read_text() == "written"
        host.client.commit("layer", "key")
        with host.viewed("layer") as again:
            assert seen(again).keys() == {*expected, "later"}


def test_a_mountpoint_that_cannot_be_removed_fails_no_call(base: Path) -> None:
    """On btrfs that takes space. What was asked for is done, and the next start removes it."""
    with Host(base, environment={"DEDUP_FAILPOINTS": "mount.detached=enospc"}) as host:
        host.client.prepare("removed")
        host.client.remove("removed")
        with host.running("key") as merged:
            (merged / "file").write_text("written")
        host.client.commit("layer", "key")
        assert [(info.name, info.kind) for info in host.client.list()] == [("layer", Kind.COMMITTED)]
        assert len(os.listdir(host.root / "mounts")) == 2
        host.stop()
        host.daemon.environment = {}
        host.start()
        assert os.listdir(host.root / "mounts") == []


def test_a_filesystem_that_became_read_only_is_read(base: Path) -> None:
    """As ext4 does after an error. Nothing can make it writable again but an unmount."""
    with a_host("ext4", base, "-e", "remount-ro") as (disk, host):
        pid = host.daemon.pid
        host.unpack("image", fill=lambda tree: (tree / "file").write_text("content"))
        host.client.prepare("key", "image")
        before = list(host.client.list())
        os.sync()
        _fail(disk)
        writes: list[Callable[[], object]] = [
            lambda: host.client.prepare("other", "image"),
            lambda: host.client.view("view", "image"),
            lambda: host.client.commit("layer", "key"),
            lambda: host.client.update_labels("key", {"label": "value"}),
            lambda: host.client.remove("key"),
        ]
        for write in writes:
            with pytest.raises(Unavailable, match="remount it read-write"):
                write()
        assert list(host.client.list()) == before
        assert host.client.stat("key").kind is Kind.ACTIVE
        assert (host.materialized("key") / "file").read_text() == "content"
        assert host.client.usage("image").inodes
        assert host.daemon.pid == pid
        host.stop()
        unmount_below(disk)
        subprocess.run(["mount", "-t", "ext4", "-o", "loop", base / "ext4.img", disk], check=True)
        host.start()
        assert list(host.client.list()) == before
        with host.again("key") as merged:
            (merged / "new").touch()


def _fail(disk: Path) -> None:
    """Makes ext4 believe that it has found an error (ext4(5), /sys/fs/ext4)."""
    device = disk.stat().st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    Path("/sys/fs/ext4", name, "trigger_fs_error").write_text("a test")


@dataclass
class _Run:
    """What was done on the host, and what must be there."""

    host: Host
    disk: Path
    mounts: ExitStack
    rng: random.Random
    active: dict[str, tuple[Path, ExitStack]] = field(default_factory=dict)
    """Where a client has it mounted, and what unmounts it there."""
    layers: dict[str, Tree] = field(default_factory=dict)
    outcomes: set[str] = field(default_factory=set)
    count: int = 0

    def step(self) -> None:
        twice = [self.prepare, self.commit] * 2
        self.rng.choice([*twice, self.unpack_some, self.remove, self.update, self.view])()

    def name(self, what: str) -> str:
        self.count += 1
        return f"{what} {self.count}"

    def some_layer(self) -> str:
        return self.rng.choice(list(self.layers))

    def unpack_some(self) -> None:
        self.unpack(self.name("image"), self.some_layer())

    def unpack(self, name: str, parent: str) -> None:
        key = f"extract-1 {name}"
        upper = upper_of(self.host.client.prepare(key, parent))
        self.write(upper)
        written = seen(upper)
        self.attempt(lambda: self.host.client.commit(name, key))
        below = self.layers[parent] if parent else {}
        self.layers[name] = {**below, **written}

    def prepare(self) -> None:
        key, parent = self.name("key"), self.some_layer()
        self.attempt(lambda: self.host.client.prepare(key, parent))
        mount = self.mounts.enter_context(ExitStack())
        self.active[key] = mount.enter_context(self.host.again(key)), mount
        self.write(self.active[key][0])

    def commit(self) -> None:
        """With the client's mount still there, which takes a copy, or without."""
        if not self.active:
            return
        key = self.rng.choice(list(self.active))
        merged, mount = self.active[key]
        content = seen(merged)
        name = self.name("layer")
        if self.rng.random() < 0.5:
            mount.close()
        self.attempt(lambda: self.host.client.commit(name, key))
        self.active.pop(key)
        self.layers[name] = content

    def remove(self) -> None:
        """Never refused."""
        if self.active:
            key = self.rng.choice(list(self.active))
            self.attempt(lambda: self.host.client.remove(key), must_succeed=True)
            self.active.pop(key)

    def update(self) -> None:
        name, labels = self.some_layer(), {"label": "x" * self.rng.randrange(4000)}
        self.attempt(lambda: self.host.client.update_labels(name, labels))

    def view(self) -> None:
        key, parent = self.name("view"), self.some_layer()
        self.attempt(lambda: self.host.client.view(key, parent))
        self.attempt(lambda: self.host.client.remove(key), must_succeed=True)

    def write(self, top: Path) -> None:
        for number in range(self.rng.randrange(1, 6)):
            place = top / f"d{self.rng.randrange(3)}"
            place.mkdir(exist_ok=True)
            content = self.rng.choice([b"same" * 2000, self.rng.randbytes(self.rng.randrange(1, 30_000))])
            (place / f"f{number}").write_bytes(content)

    def attempt(self, call: Callable[[], object], must_succeed: bool = False) -> None:
        """Makes the call on a disk that is full, or nearly; and again with space."""
        with _full(self.disk, self.rng):
            before = self.look()
            try:
                call()
            except ResourceExhausted:
                assert not must_succeed
                assert self.look() == before
                self.outcomes.add("refused")
            else:
                self.outcomes.add("succeeded")
                return
        call()

    def look(self) -> object:
        """All that a client can see without changing anything, and whether containers can write."""
        infos: dict[str, Info] = {info.name: info for info in self.host.client.list()}
        assert infos.keys() >= self.active.keys() | self.layers.keys()
        usages = {name: self.host.client.usage(name) for name, info in infos.items() if info.kind is Kind.COMMITTED}
        mounted = {key: Path(self.host.client.mounts(key)[0].source) for key in self.active}
        frozen = [key for key, merged in mounted.items() if os.statvfs(merged).f_flag & os.ST_RDONLY]
        assert not frozen
        return infos, usages, {key: seen(merged) for key, merged in mounted.items()}, self.host.mounts()

    def check_contents(self) -> None:
        for name, tree in self.layers.items():
            with self.host.viewed(name) as merged:
                assert _comparable(seen(merged)) == _comparable(tree), name


def _comparable(tree: Tree) -> dict[str, tuple[int, bytes]]:
    return {path: (entry.mode, entry.content) for path, entry in tree.items() if path != "."}


@contextmanager
def _full(disk: Path, rng: random.Random) -> Iterator[None]:
    inodes = disk / "inodes"
    if mountinfo.filesystem_of(disk) == "ext4" and rng.random() < 0.3:  # others make more of them
        _use_up_inodes(inodes, left=rng.choice([0, 0, 1, 2, 3, 5, 10]))
    else:
        fill_up(disk, rng.choice([0, 0, 1, 2, 4, 8, 16, 64, 300]) * 4096)
    try:
        yield
    finally:
        (disk / "filler").unlink(missing_ok=True)
        shutil.rmtree(inodes, ignore_errors=True)


def _use_up_inodes(directory: Path, left: int) -> None:
    made: list[Path] = []
    with suppress(OSError):
        directory.mkdir()
        while True:
            made.append(directory / f"{len(made)}")
            made[-1].touch()
    for path in made[:left]:
        path.unlink(missing_ok=True)
