"""Sharing the files of a layer happens once or not at all, whatever it meets.

SIGKILL of the daemon and its workers at each point of it, and once more while the next start goes on; a worker that
dies alone; and calls that fail. Whenever a layer is there, then

- it reads what a plain copy made before reads: modes, owners, times of files and of directories, all attributes, which
  names are one file; so do all other layers;
- no two paths of a chain are one inode that the image did not link;
- each stub has its object, and each object a layer that refers to it;
- nothing that sharing needed is left, and once all layers are removed, no object is.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
from blake3 import blake3

from snapshotter import failpoint as failpoints
from snapshotter.content.files import File as Found
from snapshotter.content.files import Place, Stage, finish_swaps
from snapshotter.content.objects import Objects
from snapshotter.content.stubs import Stubs
from snapshotter.errors import AlreadyExists, ResourceExhausted, SnapshotterError
from snapshotter.model import Kind
from snapshotter.root import SHARDS_OF_OBJECTS
from tests.rig.aliases import Groups, links_of_tree
from tests.rig.chains import alias_findings, stored
from tests.rig.filesystem import filesystem, fill_up
from tests.rig.host import Host, upper_of
from tests.rig.random_tree import ACL, CAPABILITY, data
from tests.rig.roots import tear_down
from tests.rig.seen import Seen, seen, xattrs_of

pytestmark = pytest.mark.root

TIME_NS = 1_500_000_000_123_456_789
DIGEST = "trusted.dedup.blake3"
METACOPY, REDIRECT = "trusted.overlay.metacopy", "trusted.overlay.redirect"
SIGKILLED = -9

Tree = dict[str, Seen]


# -- the layers


@dataclass(frozen=True)
class File:
    """One file with all its names. Equal seeds are equal contents."""

    names: tuple[str, ...]
    seed: int
    size_bytes: int = 5000
    hole_bytes: int = 0
    mode: int = 0o644
    owner: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[str, bytes], ...] = ()

    def write(self, top: Path) -> None:
        first = top / self.names[0]
        for name in self.names:
            (top / name).parent.mkdir(parents=True, exist_ok=True)
        with first.open("xb") as stream:
            stream.seek(self.hole_bytes)
            stream.write(data(self.seed, self.size_bytes))
        os.chown(first, *self.owner)
        first.chmod(self.mode)
        for key, value in self.xattrs:
            os.setxattr(first, key, value)
        os.utime(first, ns=(TIME_NS, TIME_NS + self.seed))
        for name in self.names[1:]:
            os.link(first, top / name)


KNOWN = (
    File(("known/a",), 20),
    File(("other/b",), 21),
    File(("known/2", "other/2"), 22),
    File(("known/3", "other/3", "other/deep/3"), 23),
    File(("4", "known/4", "other/4", "other/deep/4"), 24),
    File(("known/capable",), 25, mode=0o755, xattrs=(("security.capability", CAPABILITY),)),
    File(("known/own",), 26, owner=(1000, 1001), mode=0o4750),
    File(("known/c",), 27),
)
"""Another image has them already."""

LAYER = (
    *KNOWN,
    File(("new/a",), 1),
    File(("new/b",), 2),
    File(("new/twice",), 3),
    File(("other/twice",), 3),
    *(File((f"new/thrice{number}",), 4) for number in range(3)),
    File(("new/2", "other/new2"), 5),
    File(("new/3", "other/new3", "other/deep/new3"), 6),
    File(("new4", "new/4", "other/new4", "other/deep/new4"), 7),
    File(("new/linked twice", "other/linked twice"), 3),
    File(("new/linked known", "other/linked known"), 27, mode=0o600),
    File(("in the parent too",), 10),
    File(("odd/note",), 30, xattrs=(("user.note", b"x"), ("trusted.note", b"y"))),
    File(("odd/capable",), 31, mode=0o755, xattrs=(("security.capability", CAPABILITY),)),
    File(("odd/acl",), 32, xattrs=(("system.posix_acl_access", ACL),)),
    File(("odd/setuid",), 33, mode=0o6755, owner=(12, 34)),
    File(("odd/none",), 34, mode=0),
    File(("odd/empty",), 35, size_bytes=0),
    File(("odd/small",), 36, size_bytes=100),
    File(("odd/sparse",), 37, hole_bytes=1 << 20),
)

BASE = (
    File(("base/in the child too",), 10),
    File(("base/known",), 20),
    File(("base/changed",), 11),
    File(("base/2", "base/second"), 12),
)


def write_files(top: Path, files: Sequence[File]) -> None:
    """And gives each directory above one of them a time of its own."""
    for file in files:
        file.write(top)
    directories = {parent for file in files for name in file.names for parent in Path(name).parents}
    for number, directory in enumerate(sorted(directories)):
        os.utime(top / directory, ns=(TIME_NS, TIME_NS - 10**18 + number))


def write_base(top: Path) -> None:
    write_files(top, BASE)


def write_other(top: Path) -> None:
    write_files(top, [replace(file, names=(f"place/{number}",)) for number, file in enumerate(KNOWN)])


def write_layer(top: Path) -> None:
    write_files(top, LAYER)


def change(top: Path) -> None:
    """What only a container does."""
    (top / "base/changed").chmod(0o600)
    write_layer(top)


# -- the stores


@dataclass(frozen=True)
class How:
    """The strategy, who mounts, how the layer is made, and what of it is synced."""

    strategy: str
    mode: str = "daemon"
    is_unpacked: bool = True
    durability: str = "full"

    def __str__(self) -> str:
        return f"{self.strategy}-{self.mode}-{'unpacked' if self.is_unpacked else 'changed'}-{self.durability}"


STUB, LINK, CLIENT = How("stub"), How("hardlink"), How("hardlink", "client")
CHANGED_STUB, CHANGED_LINK = How("stub", is_unpacked=False), How("hardlink", is_unpacked=False)
UNSYNCED_STUB, UNSYNCED_LINK = How("stub", durability="none"), How("hardlink", durability="none")
HOWS = (STUB, LINK, CLIENT, CHANGED_STUB, CHANGED_LINK)


class Prepared:
    """Made once for all tests: what the layers must read, and stores with two layers."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @cached_property
    def base(self) -> tuple[Tree, Groups]:
        return self._plain("base", write_base)

    @cached_property
    def other(self) -> tuple[Tree, Groups]:
        return self._plain("other", write_other)

    @cached_property
    def unpacked(self) -> tuple[Tree, Groups]:
        return self._plain("unpacked", write_base, write_layer)

    @cached_property
    def changed(self) -> tuple[Tree, Groups]:
        return self._plain("changed", write_base, change)

    def wanted(self, how: How) -> dict[str, tuple[Tree, Groups]]:
        return {"base": self.base, "other": self.other, "layer": self.unpacked if how.is_unpacked else self.changed}

    def copy(self, how: How, root: Path) -> None:
        """A store with the layers "base" and "other"."""
        home = self._directory / f"{how.strategy}-{how.mode}"
        if not home.exists():
            home.mkdir()
            with host_of(home, how) as host:
                host.unpack("base", fill=write_base)
                host.unpack("other", fill=write_other)
        subprocess.run(["cp", "--archive", home / "root", root], check=True)

    def _plain(self, name: str, *fills: Callable[[Path], None]) -> tuple[Tree, Groups]:
        top = self._directory / name
        top.mkdir()
        top.chmod(0o755)
        for fill in fills:
            fill(top)
        return seen(top), links_of_tree(top)


@pytest.fixture(scope="module")
def prepared() -> Iterator[Prepared]:
    directory = Path(tempfile.mkdtemp(prefix="dds-", dir="/var/tmp"))
    yield Prepared(directory)
    tear_down(directory)


def host_of(base: Path, how: How, root: Path | None = None) -> Host:
    return Host(base, root=root, mode=how.mode, dedup={"strategy": how.strategy}, durability=how.durability)


@contextmanager
def one_cpu() -> Iterator[None]:
    """So that one worker does all the work of a commit, and the number of a hit says how far it is."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def armed(
    base: Path,
    how: How,
    prepared: Prepared,
    failpoints: str,
    cpus: Callable[[], AbstractContextManager[None]] = one_cpu,
) -> Iterator[Host]:
    """A daemon with these failpoints, on a store with the layers "base" and "other"."""
    prepared.copy(how, base / "root")
    host = host_of(base, how)
    host.daemon.environment["DEDUP_FAILPOINTS"] = failpoints
    with cpus(), host:
        yield host


KEY = "extract-1 layer"


def fill(host: Host, how: How) -> str:
    """Makes what is to be committed as "layer"; its key."""
    if how.is_unpacked:
        write_layer(upper_of(host.client.prepare(KEY, "base")))
        return KEY
    with host.running("container", "base") as merged:
        change(merged)
    return "container"


def die_in_commit(host: Host, how: How) -> str:
    key = fill(host, how)
    with pytest.raises(SnapshotterError):
        host.client.commit("layer", key)
    expect_killed(host)
    return key


def expect_killed(host: Host) -> None:
    assert host.daemon.process
    assert host.daemon.process.wait(20) == SIGKILLED, "the failpoint was never reached"


def disarm(host: Host) -> None:
    host.daemon.environment.clear()
    host.restart(kill=True)


# -- what must hold


def check(host: Host, how: How, prepared: Prepared, *names: str) -> None:
    """Of a store that has these layers."""
    wanted = {name: prepared.wanted(how)[name] for name in names}
    for name in wanted:
        with host.viewed(name) as merged:
            assert comparable(seen(merged), how) == comparable(wanted[name][0], how), name
    host.client.cleanup()
    assert {info.name for info in host.client.list()} == set(names)
    assert alias_findings(host.client, host.root, {name: groups for name, (_, groups) in wanted.items()}) == []
    check_references(host)
    host.client.cleanup()
    for directory in (host.root / "snapshots").iterdir():
        assert {entry.name for entry in directory.iterdir()} <= {"fs", "refs"}
    for name in ("trash", "spool", "busy"):
        assert not list((host.root / name).iterdir()), name


def comparable(tree: Tree, how: How) -> Tree:
    """An object's links count in st_nlink."""
    return tree if how.strategy == "stub" else {path: replace(entry, links=0) for path, entry in tree.items()}


def check_references(host: Host) -> None:
    """Each ref is an object, each stub has its ref, and each link of an object is accounted for."""
    links = {path: path.lstat().st_nlink - 1 for path in objects(host.root)}
    inodes = {path.lstat().st_ino: path for path in links}
    for tree in stored(host.client, host.root).names:
        refs = tree.parent / "refs"
        for ref in refs.iterdir() if refs.exists() else ():
            target = host.root / "objects" / ref.name[:2] / ref.name[2:]
            assert target.exists(), f"{ref} refers to no object"
            assert target.samefile(ref)
            links[target] -= 1
        for path in tree.rglob("*"):
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                continue
            if status.st_ino in inodes:
                links[inodes[status.st_ino]] -= 1
            xattrs = xattrs_of(path)
            redirect = xattrs.get(REDIRECT, b"")
            if METACOPY in xattrs and redirect.count(b"/") == 2:
                assert (refs / os.fsdecode(redirect).replace("/", "")).exists(), f"{path} has no ref"
    assert links == dict.fromkeys(links, 0), "each link of an object is a ref or a file of a layer"


def objects(root: Path) -> list[Path]:
    return sorted((root / "objects").glob("*/*"))


def check_nothing_leaks(host: Host, *names: str) -> None:
    """When these layers, which are all, are removed in this order."""
    for name in names:
        host.client.remove(name)
    host.client.cleanup()
    assert objects(host.root) == []
    assert not list((host.root / "snapshots").iterdir())
    assert not list((host.root / "trash").iterdir())


def check_committed(host: Host, how: How, prepared: Prepared, key: str) -> None:
    with pytest.raises(AlreadyExists):
        host.client.commit("layer", key)
    check(host, how, prepared, "layer", "base", "other")
    check_nothing_leaks(host, "layer", "base", "other")


# -- kills


OF_A_COMMIT = (
    "seal.sharing", "share.referred", "share.linked", "share.made-object", "share.before-swap", "share.staged",
    "share.half-swapped", "share.swapped", "seal.shared", "seal.settled", "seal.done", "seal.after-transaction",
)  # fmt: skip
OF_A_WORKER = tuple(name for name in OF_A_COMMIT if name.startswith("share."))
OF_A_REMOVAL = ("collect.object", "collect.ref")
NAMES = frozenset({*OF_A_COMMIT, *OF_A_REMOVAL})
"""The failpoints at which this file kills."""

_AT = {
    "share.referred": (3, 1, 2, 4, 5, 6, 7),
    "share.linked": (5, 1, 2, 3, 7, 9, 13),
    "share.made-object": (6, 1, 2, 4, 8, 11, 13),
    "share.before-swap": (4, 1, 2, 3, 5, 6, 7),
    "share.staged": (3, 1, 2, 4, 5, 6, 7),
    "share.half-swapped": (2, 1, 3, 4, 5, 6),
    "share.swapped": (9, 1, 5, 14, 20, 27),
    "collect.object": (4, 1, 2, 9),
    "collect.ref": (5, 1, 2, 9),
}
"""At which time to kill. The first is the one for every day; each is reached."""


def armed_names(names: Sequence[str]) -> list[str]:
    return [f"{name}=kill@{_AT.get(name, (1,))[0]}" for name in names]


EVERY_DAY = [
    *((STUB, armed) for armed in armed_names(OF_A_COMMIT)),
    *((LINK, armed) for armed in armed_names(OF_A_WORKER)),
    *((CLIENT, armed) for armed in armed_names(("share.half-swapped", "seal.done"))),
    (CHANGED_LINK, "share.linked=kill@1"),
    (UNSYNCED_STUB, "share.linked=kill@5"),
    (UNSYNCED_LINK, "share.linked=kill@5"),
    (UNSYNCED_STUB, "share.half-swapped=kill@2"),
    (CHANGED_STUB, "share.half-swapped=kill@2"),
]
ALL = [(how, f"{name}=kill@{at}") for how in HOWS for name in OF_A_COMMIT for at in _AT.get(name, (1,))]
CASES = [*EVERY_DAY, *(pytest.param(*case, marks=pytest.mark.nightly) for case in ALL if case not in EVERY_DAY)]


@pytest.mark.parametrize(("how", "failpoint"), CASES, ids=str)
def test_a_kill_leaves_a_layer_that_the_next_start_finishes(
    base: Path, prepared: Prepared, how: How, failpoint: str
) -> None:
    with armed(base, how, prepared, failpoint) as host:
        key = die_in_commit(host, how)
        disarm(host)
        check_committed(host, how, prepared, key)


@pytest.mark.parametrize("how", [STUB, LINK], ids=str)
def test_a_kill_of_many_workers(base: Path, prepared: Prepared, how: How) -> None:
    with armed(base, how, prepared, "share.half-swapped=kill", contextlib.nullcontext) as host:
        key = die_in_commit(host, how)
        disarm(host)
        check_committed(host, how, prepared, key)


AGAIN_EVERY_DAY = [
    (STUB, "share.half-swapped=kill@2", "share.half-swapped=kill@2"),
    (LINK, "share.half-swapped=kill@1", "share.staged=kill@2"),
    (STUB, "share.linked=kill@3", "seal.shared=kill"),
    (CHANGED_STUB, "share.made-object=kill@3", "share.made-object=kill@3"),
    (CHANGED_LINK, "share.linked=kill@3", "share.linked=kill@3"),
    (CLIENT, "seal.shared=kill", "seal.settled=kill"),
]
_FIRST = ("share.linked=kill@3", "share.made-object=kill@2", "share.half-swapped=kill@1", "share.swapped=kill@2")
_SECOND = (
    "seal.sharing=kill", "share.linked=kill@2", "share.made-object=kill@2", "share.staged=kill@2",
    "share.half-swapped=kill@2", "share.swapped=kill@3", "seal.shared=kill", "seal.settled=kill", "seal.done=kill",
    "seal.after-transaction=kill",
)  # fmt: skip
AGAIN_ALL = [(how, first, second) for how in HOWS for first in _FIRST for second in _SECOND]
AGAIN = [
    *AGAIN_EVERY_DAY,
    *(pytest.param(*case, marks=pytest.mark.nightly) for case in AGAIN_ALL if case not in AGAIN_EVERY_DAY),
]


@pytest.mark.parametrize(("how", "first", "second"), AGAIN, ids=str)
def test_a_second_kill_while_the_next_start_goes_on(
    base: Path, prepared: Prepared, how: How, first: str, second: str
) -> None:
    with armed(base, how, prepared, first) as host:
        key = die_in_commit(host, how)
        spawn(host, second)
        expect_killed(host)
        disarm(host)
        check_committed(host, how, prepared, key)


def spawn(host: Host, failpoints: str) -> None:
    """Starts the daemon once more, and does not wait for it to serve."""
    host.daemon.kill()
    host.daemon.environment["DEDUP_FAILPOINTS"] = failpoints
    host.daemon.spawn()


@pytest.mark.parametrize("how", [STUB, LINK], ids=str)
def test_a_fault_while_the_next_start_goes_on(base: Path, prepared: Prepared, how: How) -> None:
    """What a kill left half done, is undone when it cannot be finished."""
    for number, killed in enumerate(("share.linked=kill@4", "share.made-object=kill@4", "share.half-swapped=kill@2")):
        directory = base / str(number)
        directory.mkdir()
        with armed(directory, how, prepared, killed) as host:
            key = die_in_commit(host, how)
            host.daemon.environment["DEDUP_FAILPOINTS"] = "share.before-swap=enospc;share.linked=enospc"
            host.restart(kill=True)
            check_committed(host, how, prepared, key)


def test_removed_before_a_kill_was_made_good(base: Path, prepared: Prepared) -> None:
    with armed(base, STUB, prepared, "share.half-swapped=kill@3") as host:
        die_in_commit(host, STUB)
        host.daemon.environment["DEDUP_FAILPOINTS"] = "seal.unmounted=error"
        host.restart(kill=True)
        host.client.remove("layer")
        check(host, STUB, prepared, "base", "other")
        check_nothing_leaks(host, "base", "other")


def test_another_layer_has_made_the_object_before_a_kill_was_made_good(base: Path, prepared: Prepared) -> None:
    """The killed one had a ref, but no object yet: it must refer to the other's."""
    for how in (STUB, LINK):
        directory = base / str(how)
        directory.mkdir()
        with armed(directory, how, prepared, "share.linked=kill@1") as host:
            write_one = replace(LAYER[len(KNOWN)], names=("one",)).write
            write_one(upper_of(host.client.prepare(KEY)))
            with pytest.raises(SnapshotterError):
                host.client.commit("layer", KEY)
            expect_killed(host)
            # Only the first that is sealed by this daemon: what was interrupted.
            host.daemon.environment["DEDUP_FAILPOINTS"] = "seal.sharing=stall:2@1"
            host.restart(kill=True)
            host.unpack("faster", fill=write_one)
            with host.viewed("layer") as merged:
                before = comparable(seen(merged), how)
            host.client.remove("faster")
            host.client.cleanup()
            with host.viewed("layer") as merged:
                assert comparable(seen(merged), how) == before
                assert (merged / "one").read_bytes() == data(1, 5000)
            check_references(host)
            check_nothing_leaks(host, "layer", "base", "other")


def test_a_kill_after_the_tree_was_exchanged_for_a_copy(base: Path, prepared: Prepared) -> None:
    """What was set down for sharing the first tree means nothing to the other one, whose inodes are others."""
    with armed(base, CHANGED_STUB, prepared, "seal.exchanged=kill") as host:
        with host.running("container", "base") as merged:
            change(merged)
            with pytest.raises(SnapshotterError):
                host.client.commit("layer", "container")
            expect_killed(host)
        disarm(host)
        check_committed(host, CHANGED_STUB, prepared, "container")


def test_a_kill_while_a_kill_is_made_good(base: Path) -> None:
    """Between a link and its rename, where there is no failpoint."""
    tree, stage = base / "tree", base / "stage"
    tree.mkdir()
    stage.mkdir()
    (tree / "first").write_bytes(b"old")
    for name in ("second", "third"):
        os.link(tree / "first", tree / name)
    (stage / f"swapping-{(tree / 'first').stat().st_ino}").write_bytes(b"new")
    before = set(os.listdir(stage))
    (tree / "first").unlink()
    (new,) = stage.iterdir()
    os.link(new, tree / "first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="killed"):
            finish_swaps(tree, [stage])
    assert set(os.listdir(stage)) >= before
    finish_swaps(tree, [stage])
    assert len({path.stat().st_ino for path in tree.iterdir()}) == 1
    assert (tree / "third").read_bytes() == b"new"


def fail(*_arguments: object, **_more: object) -> None:
    raise OSError(errno.EIO, "killed")


# -- kills of a removal


REMOVAL_EVERY_DAY = [
    *((how, armed) for how in (STUB, LINK) for armed in armed_names(OF_A_REMOVAL)),
]
REMOVAL_ALL = [(how, f"{name}=kill@{at}") for how in HOWS for name in OF_A_REMOVAL for at in _AT[name]]
REMOVALS = [
    *REMOVAL_EVERY_DAY,
    *(pytest.param(*case, marks=pytest.mark.nightly) for case in REMOVAL_ALL if case not in REMOVAL_EVERY_DAY),
]


@pytest.mark.parametrize(("how", "failpoint"), REMOVALS, ids=str)
def test_a_kill_of_a_removal_leaves_no_object(base: Path, prepared: Prepared, how: How, failpoint: str) -> None:
    with armed(base, how, prepared, failpoint) as host:
        host.client.commit("layer", fill(host, how))
        with contextlib.suppress(SnapshotterError):  # killed before it answers, or behind its back
            host.client.remove("layer")
        expect_killed(host)
        disarm(host)
        host.client.cleanup()
        check(host, how, prepared, "base", "other")
        check_nothing_leaks(host, "other", "base")


# -- a worker dies alone


WORKER_DIES = [
    (STUB, "share.linked=die@13"),
    (LINK, "share.made-object=die@21"),
    (STUB, "share.half-swapped=die@2"),
    (CHANGED_LINK, "share.half-swapped=die@1"),
    (STUB, "share.linked=die"),
    (STUB, "share.swapped=die"),
    (LINK, "share.staged=die"),
]


@pytest.mark.parametrize(("how", "failpoint"), WORKER_DIES, ids=str)
def test_a_worker_that_dies_fails_no_commit(base: Path, prepared: Prepared, how: How, failpoint: str) -> None:
    """Once, or (without a number of times) whenever it is there, so that files stay private."""
    with armed(base, how, prepared, failpoint) as host:
        key = fill(host, how)
        host.client.commit("layer", key)
        check_committed(host, how, prepared, key)


@pytest.mark.nightly
@pytest.mark.parametrize("at", range(1, 7))
@pytest.mark.parametrize("name", OF_A_WORKER)
@pytest.mark.parametrize("how", [STUB, LINK, CHANGED_STUB], ids=str)
def test_a_worker_that_dies_anywhere_fails_no_commit(
    base: Path, prepared: Prepared, how: How, name: str, at: int
) -> None:
    test_a_worker_that_dies_fails_no_commit(base, prepared, how, f"{name}=die@{at}")


def test_a_worker_that_dies_in_a_removal(base: Path, prepared: Prepared) -> None:
    with armed(base, STUB, prepared, "collect.ref=die@9") as host:
        host.client.commit("layer", fill(host, STUB))
        host.client.remove("layer")
        for _ in range(20):
            with contextlib.suppress(SnapshotterError):
                host.client.cleanup()
                break
        check(host, STUB, prepared, "base", "other")


# -- calls that fail


REASONS = {"enospc": "no space", "error": "EIO", "emlink": ""}
"""Of files that stay private. Too many links of one object are no reason: there is another instance."""

FAULTS_EVERY_DAY = [
    *((STUB, f"{name}=enospc") for name in OF_A_WORKER),
    *((LINK, f"{name}=error") for name in ("share.referred", "share.linked", "share.made-object", "share.staged")),
    *((CHANGED_LINK, f"{name}=enospc@2") for name in ("share.before-swap", "share.half-swapped")),
    (STUB, "share.referred=emlink"),
    (LINK, "share.before-swap=emlink"),
    (CLIENT, "share.staged=emlink@3"),
]
FAULTS_ALL = [
    (how, f"{name}={action}{at}") for how in (STUB, LINK, CHANGED_STUB) for name in OF_A_WORKER for action in REASONS
    for at in ("", "@1", "@3", "@5")
]  # fmt: skip
FAULTS = [
    *FAULTS_EVERY_DAY,
    *(pytest.param(*case, marks=pytest.mark.nightly) for case in FAULTS_ALL if case not in FAULTS_EVERY_DAY),
]


@pytest.mark.parametrize(("how", "failpoint"), FAULTS, ids=str)
def test_a_fault_fails_no_commit(base: Path, prepared: Prepared, how: How, failpoint: str) -> None:
    name, action = failpoint.partition("@")[0].split("=")
    with armed(base, how, prepared, failpoint) as host:
        key = fill(host, how)
        host.client.commit("layer", key)
        if REASONS[action] and name not in ("share.half-swapped", "share.swapped"):
            found = next(entry for entry in host.client.space(now=True).snapshots if entry.name == "layer")
            assert found.private.get(REASONS[action])
            logged = next(line for line in host.daemon.log_text().splitlines() if "commit.shared name=layer" in line)
            assert re.search(rf"'{REASONS[action]}': {found.private[REASONS[action]]}\b", logged)
        check_committed(host, how, prepared, key)


@pytest.mark.parametrize("strategy", ["stub", "hardlink"])
def test_a_name_of_a_hard_link_in_an_immutable_directory(base: Path, strategy: str) -> None:
    """It cannot be given to another inode; so none of the file's names is."""
    names = ("a/1", "b/2", "c/3", "d/4")
    file = File(names, 1)

    def write(immutable: str) -> Callable[[Path], None]:
        def act(top: Path) -> None:
            file.write(top)
            subprocess.run(["chattr", "+i", top / immutable], check=True)

        return act

    with host_of(base, How(strategy)) as host:
        host.unpack("known", fill=replace(file, names=("one",)).write)
        for name in "abcd":
            host.unpack(name, fill=write(name))
        for name in "abcd":
            with host.viewed(name) as merged:
                assert len({(merged / path).stat().st_ino for path in names}) == 1
                assert {(merged / path).read_bytes() for path in names} == {data(1, 5000)}
                assert not os.listxattr(merged / "a/1")
        check_references(host)
        check_nothing_leaks(host, *"abcd", "known")


def test_what_one_worker_gives_up_another_goes_on_using(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers of one commit meet the same content, and only the second can share it."""
    for name in ("tree", "refs", "stages"):
        (base / name).mkdir()
    for shard in SHARDS_OF_OBJECTS:
        (base / "objects" / shard).mkdir(parents=True)
    content = data(1, 5000)
    for name in ("gives up", "goes on"):
        (base / "tree" / name).write_bytes(content)
    failed: list[BaseException] = []

    def go_on() -> None:
        try:
            share_one(base, "goes on", content)
        except BaseException as error:
            failed.append(error)

    other = threading.Thread(target=go_on)

    def fail_once(name: str) -> None:
        if name == "share.before-swap" and threading.current_thread() is not other:
            other.start()
            other.join(0.5)  # it may be waiting for the lock, too
            raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(failpoints, "hit", fail_once)
    with pytest.raises(OSError, match="no space"):
        share_one(base, "gives up", content)
    other.join(10)
    assert not failed
    redirect = xattrs_of(base / "tree/goes on")[REDIRECT]
    found = base / "objects" / os.fsdecode(redirect).lstrip("/")
    assert found.read_bytes() == content
    assert (base / "refs" / os.fsdecode(redirect).replace("/", "")).samefile(found)
    assert (base / "tree/gives up").read_bytes() == content
    assert not os.listxattr(base / "tree/gives up")
    assert (base / "tree/gives up").stat().st_nlink == 1


def share_one(base: Path, name: str, content: bytes) -> None:
    """What a worker does to one file of the tree."""
    objects_of_it, stage = Objects(base / "objects"), Stage(base / "stages" / name)
    tree_fd, refs_fd = (os.open(base / directory, os.O_RDONLY) for directory in ("tree", "refs"))
    fd = os.open(base / "tree" / name, os.O_RDONLY)
    try:
        place = Place(tree_fd, name.encode(), name.encode())
        Stubs(objects_of_it, refs_fd, stage, frozenset(), False).share(
            Found(fd, os.fstat(fd), {}, blake3(content).digest(), (place,))
        )
    finally:
        for descriptor in (fd, tree_fd, refs_fd):
            os.close(descriptor)
        stage.close()
        objects_of_it.close()


# -- a disk that is full


_MANY = 600


@pytest.mark.parametrize("how", [STUB, LINK, pytest.param(CHANGED_STUB, marks=pytest.mark.nightly)], ids=str)
def test_a_full_disk(base: Path, how: How) -> None:
    """With no space at all, and with more and more, until all that a commit takes fits."""

    def write_many(top: Path) -> None:
        write_files(top, many)

    # So many that directories grow.
    many = [
        File((f"{number % 20}/{'long name ' * 8}{number}", f"{number % 7}/link {number}"), 1000 + number)
        if number % 3
        else File((f"{number % 20}/{number}",), 1000 + number, xattrs=(("user.note", data(number, 300)),))
        for number in range(_MANY)
    ]
    with filesystem("ext4", base, 64 << 20) as disk, host_of(base, how, disk / "root") as host:
        host.unpack("base", fill=write_base)
        outcomes = []
        for blocks in itertools.chain((0, 4, 5, 6), itertools.count(24, 24)):
            key = f"extract-1 {blocks}" if how.is_unpacked else f"container {blocks}"
            made = host.client.prepare(key, "base")
            with contextlib.nullcontext(upper_of(made)) if how.is_unpacked else host.mounted(made) as top:
                write_many(top)
                wanted = {path: entry for path, entry in seen(top).items() if not path.startswith("base")}
            fill_up(disk, blocks * 4096)
            try:
                host.client.commit(str(blocks), key)
            except ResourceExhausted:
                assert host.client.stat(key).kind is Kind.ACTIVE
                outcomes.append("refused")
                (disk / "filler").unlink()
                host.client.commit(str(blocks), key)
            else:
                outcomes.append("all shared" if f"files={_MANY} " in last_shared(host) else "partly shared")
                (disk / "filler").unlink()
            with host.viewed(str(blocks)) as merged:
                got = {path: entry for path, entry in seen(merged).items() if not path.startswith("base")}
            assert comparable(got, how) == comparable(wanted, how)
            check_references(host)
            host.client.remove(str(blocks))
            host.client.cleanup()
            if outcomes[-1] == "all shared":
                break
        assert set(outcomes) >= {"partly shared", "all shared"}
        check_nothing_leaks(host, "base")


def last_shared(host: Host) -> str:
    return [line for line in host.daemon.log_text().splitlines() if "commit.shared" in line][-1]
