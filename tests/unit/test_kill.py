"""Every call happens once or not at all, whatever a kill interrupts.

For each failpoint, in each situation in which it can be reached: SIGKILL there, perhaps a reboot, start again.
Then
- what the metadata knows has its directory, and there is no other; trees that are still used wait in busy/ and
  go to the trash once they are free;
- mounts/ holds one mount for each active snapshot, none twice, and no other;
- every active snapshot can be written to through its mount, and reads what was written before;
- a child of every committed snapshot reads what was written into it;
- the call that was interrupted succeeds when it is made again, or says that it is done.
"""

from __future__ import annotations

import itertools
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from snapshotter import failpoint, linux
from snapshotter.api import snapshots_pb2, snapshots_pb2_grpc
from snapshotter.config import MountConfig, OverlayConfig
from snapshotter.engine import Engine
from snapshotter.model import Commitment, Creation, Kind, Mount
from snapshotter.root import claim
from tests.rig.daemon import Daemon
from tests.rig.namespace import mounts_below
from tests.rig.roots import unmount_below
from tests.unit import test_kill_sharing

pytestmark = pytest.mark.root

pb = snapshots_pb2

Call = Callable[[Any], None]
Tree = dict[str, tuple[int, bytes]]
"""What is below a directory: mode and content (of a symlink or a directory: nothing) of each path."""

ACTIVE, COMMITTED, VIEW = pb.ACTIVE, pb.COMMITTED, pb.VIEW

BEFORE = {"lowest": COMMITTED, "base": COMMITTED, "looked": VIEW, "other": ACTIVE, "active": ACTIVE}
PREPARED = {**BEFORE, "new": ACTIVE}
REMOVED = {name: kind for name, kind in BEFORE.items() if name != "active"}
DONE = {**REMOVED, "committed": COMMITTED}


# -- the calls that are interrupted


def prepare(stub: Any) -> None:
    stub.Prepare(pb.PrepareSnapshotRequest(key="new", parent="base"))


def mounts(stub: Any) -> None:
    stub.Mounts(pb.MountsRequest(key="active"))


def commit(stub: Any) -> None:
    stub.Commit(pb.CommitSnapshotRequest(name="committed", key="active"))


def remove(stub: Any) -> None:
    stub.Remove(pb.RemoveSnapshotRequest(key="active"))


def remove_and_clean(stub: Any) -> None:
    remove(stub)
    stub.Cleanup(pb.CleanupRequest())


# -- what else there is while they run: each goes on through the kill, and ends when its block does


@contextmanager
def nothing(_base: Path, _source: Path) -> Iterator[None]:
    yield


@contextmanager
def unmounted(_base: Path, source: Path) -> Iterator[None]:
    """Somebody unmounted what the daemon had mounted."""
    linux.umount2(str(source))
    yield


@contextmanager
def forgotten_bind(base: Path, source: Path) -> Iterator[None]:
    target = base / "bind"
    target.mkdir()
    linux.mount(str(source), str(target), None, linux.MS_BIND, None)
    try:
        yield
    finally:
        linux.umount2(str(target))


@contextmanager
def open_writer(_base: Path, source: Path) -> Iterator[None]:
    with (source / "fresh").open("ab"):
        yield


# -- which kills there are


@dataclass(frozen=True)
class Case:
    """The failpoints of `armed`, the last of which kills, are on the way of `call`."""

    armed: str
    call: Call
    after: dict[str, int]
    situation: Callable[[Path, Path], Any] = nothing
    busy: int = 0
    """How many trees wait in busy/ while the situation lasts."""

    def __str__(self) -> str:
        where = "" if self.situation is nothing else f"-{self.situation.__name__}"
        return f"{self.call.__name__}-{self.last}{where}"

    @property
    def names(self) -> list[str]:
        return [item.split("=")[0] for item in self.armed.split(";")]

    @property
    def last(self) -> str:
        return self.names[-1]


def kill_at(names: str, call: Call, after: dict[str, int], **more: Any) -> list[Case]:
    return [Case(f"{name}=kill", call, after, **more) for name in names.split()]


REFUSED = "commit.before-transaction=error;commit.refused=kill"

CLIENT_CASES = [
    *kill_at("prepare.after-directory prepare.mounted meta.before-batch", prepare, BEFORE),
    *kill_at("prepare.after-transaction", prepare, PREPARED),
    *kill_at("commit.before-transaction meta.before-batch", commit, BEFORE),
    *kill_at("commit.after-transaction", commit, DONE),
    *kill_at("remove.after-transaction mount.detached remove.detached remove.after-rename", remove, REMOVED),
    *kill_at("delete.entry", remove_and_clean, REMOVED),
]

CASES = [
    *CLIENT_CASES,
    *kill_at("mount.made-mountpoint mount.before-mount mount.mounted", prepare, BEFORE),
    *kill_at("mount.made-mountpoint mount.before-mount mount.mounted", mounts, BEFORE, situation=unmounted),
    *kill_at("mount.mounted commit.frozen", commit, BEFORE, situation=unmounted),
    *kill_at("commit.frozen", commit, BEFORE),
    Case(REFUSED, commit, BEFORE),
    *kill_at("mount.detached seal.unmounted trial.mounted seal.stripped seal.done", commit, DONE),
    *kill_at("commit.frozen commit.before-transaction", commit, BEFORE, situation=forgotten_bind),
    Case(REFUSED, commit, BEFORE, forgotten_bind),
    *kill_at(
        "commit.after-transaction seal.unmounted seal.copied seal.exchanged seal.moved-work seal.moved-tree seal.done",
        commit, DONE, situation=forgotten_bind, busy=1,
    ),
    Case("seal.copied=enospc;commit.taking-back=kill", commit, DONE, forgotten_bind, busy=1),
    Case("seal.copied=enospc;commit.taken-back=kill", commit, BEFORE, forgotten_bind),
    *kill_at("copy.made commit.before-transaction", commit, BEFORE, situation=open_writer),
    *kill_at(
        "copy.committed mount.detached copy.released commit.after-transaction",
        commit, DONE, situation=open_writer, busy=1,
    ),
    *kill_at("remove.after-transaction remove.detached", remove, REMOVED, situation=forgotten_bind, busy=1),
    *kill_at("detach.close", remove_and_clean, REMOVED),
]  # fmt: skip


def test_every_failpoint_has_a_case() -> None:
    """That of repairs is in tests/kernel/test_fsck.py."""
    assert {case.last for case in CASES} | test_kill_sharing.NAMES | {"fsck.step"} == failpoint.NAMES


# -- the test


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kill_leaves_all_or_nothing(base: Path, case: Case) -> None:
    run(base, case, "daemon", reboot=False)


# No situation outlives a reboot, and before a mount is made there is none to lose.
REBOOT_CASES = [case for case in CASES if case.situation is nothing and case.call in (commit, remove)]


@pytest.mark.parametrize("case", REBOOT_CASES, ids=str)
def test_a_kill_and_a_reboot_leave_all_or_nothing(base: Path, case: Case) -> None:
    run(base, case, "daemon", reboot=True)


@pytest.mark.parametrize("case", CLIENT_CASES, ids=str)
def test_a_kill_leaves_all_or_nothing_in_client_mode(base: Path, case: Case) -> None:
    run(base, case, "client", reboot=False)


def run(base: Path, case: Case, mode: str, reboot: bool) -> None:
    contents = set_up(base / "root", mode)
    daemon = Daemon(base / "root", base / "s.sock", log=base / "log", arguments=["--mount-mode", mode])
    with ExitStack() as stack:
        with case.situation(base, source(base / "root")):
            crash(daemon, case, reboot)
            stack.enter_context(daemon)
            check(base, daemon, case.after, contents, case.busy)
            if case.situation in (nothing, unmounted):
                retry(daemon, case.call)
        if case.situation in (nothing, unmounted):
            return
        check(base, daemon, case.after, contents, 0)
        retry(daemon, case.call)


def test_a_failed_case_shows_in_the_check(base: Path) -> None:
    """The check itself: a mount left read-only, a stray mount and a stray directory are each found."""
    contents = set_up(base / "root", "daemon")
    with Daemon(base / "root", base / "s.sock", log=base / "log") as daemon:
        check(base, daemon, BEFORE, contents, 0)
        linux.mount("", str(source(daemon.root)), None, linux.MS_REMOUNT | linux.MS_RDONLY, None)
        with pytest.raises(OSError, match="Read-only"):
            check(base, daemon, BEFORE, contents, 0)
        linux.mount("", str(source(daemon.root)), None, linux.MS_REMOUNT, None)
        stray = daemon.root / "mounts" / "99"
        stray.mkdir()
        linux.mount("none", str(stray), "tmpfs", 0, None)
        with pytest.raises(AssertionError):
            check(base, daemon, BEFORE, contents, 0)
        linux.umount2(str(stray))
        stray.rmdir()
        (daemon.root / "snapshots" / "stray").mkdir()
        with pytest.raises(AssertionError):
            check(base, daemon, BEFORE, contents, 0)


def crash(daemon: Daemon, case: Case, reboot: bool) -> None:
    daemon.environment["DEDUP_FAILPOINTS"] = case.armed
    daemon.start()
    assert daemon.process
    try:
        with daemon.channel() as channel, pytest.raises(grpc.RpcError):
            case.call(snapshots_pb2_grpc.SnapshotsStub(channel))
        assert daemon.process.wait(10) == -9, "the failpoint was never reached"
    finally:
        daemon.kill()
    del daemon.environment["DEDUP_FAILPOINTS"]
    if reboot:
        unmount_below(daemon.root)


def retry(daemon: Daemon, call: Call) -> None:
    """The caller calls again, as containerd does: it succeeds, or learns that it is done."""
    with daemon.channel() as channel:
        try:
            call(snapshots_pb2_grpc.SnapshotsStub(channel))
        except grpc.RpcError as error:
            code: Any = error.code()  # type: ignore[attr-defined]
            assert code in (grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.NOT_FOUND)


# -- before: two layers, a view of them, and two active snapshots, one of them with all that an upper can have


def set_up(root: Path, mode: str) -> dict[str, Tree]:
    """What each snapshot then shows, and what "committed" will."""
    claimed, lock = claim(root)
    engine = Engine(claimed, MountConfig(mode=mode), OverlayConfig())
    try:
        fill(engine, root.parent, "lowest", "", write_lowest)
        fill(engine, root.parent, "base", "lowest", write_base)
        engine.create(Creation(Kind.VIEW, "looked", "base", {}))
        contents = {}
        for key, write in (("other", write_nothing), ("active", change)):
            made = engine.create(Creation(Kind.ACTIVE, key, "base", {}))
            with mounted(root.parent, made) as top:
                contents[key] = contents.setdefault("looked", read(top))
                write(top)
                contents[key] = read(top)
        assert contents["active"] != contents["other"] == contents["looked"]
        engine.cleanup().result(30)  # or the daemon's own first deletion might be the one that kills it
        return {**contents, "committed": contents["active"], "base": contents["looked"]}
    finally:
        engine.close()
        lock.release()


def fill(engine: Engine, base: Path, name: str, parent: str, write: Callable[[Path], None]) -> None:
    with mounted(base, engine.create(Creation(Kind.ACTIVE, "tmp", parent, {}))) as top:
        write(top)
    engine.commit(Commitment(name, "tmp", "", {}))


def write_nothing(_top: Path) -> None:
    pass


def write_lowest(top: Path) -> None:
    (top / "first").write_bytes(b"old")
    (top / "second").hardlink_to(top / "first")
    (top / "directory").mkdir()
    (top / "directory" / "inside").write_bytes(b"inside")
    (top / "large").write_bytes(b"x" * 100_000)
    (top / "gone").write_bytes(b"gone")


def write_base(top: Path) -> None:
    (top / "base").write_bytes(b"base")


def change(top: Path) -> None:
    """A hard link that only the index knows, a metacopy file, a whiteout, a new file; and where the daemon mounts, a
    redirect."""
    (top / "first").write_bytes(b"new")
    (top / "large").chmod(0o600)
    (top / "gone").unlink()
    (top / "fresh").write_bytes(b"fresh")
    try:
        (top / "directory").rename(top / "renamed")
    except OSError:  # EXDEV: without redirect_dir
        (top / "renamed").mkdir()


# -- after


def check(base: Path, daemon: Daemon, expected: dict[str, int], contents: dict[str, Tree], busy: int) -> None:
    root = daemon.root
    with daemon.channel() as channel:
        stub = snapshots_pb2_grpc.SnapshotsStub(channel)
        infos = settled(stub, expected)
        stub.Cleanup(pb.CleanupRequest())
        mounted_ids = set()
        for info in infos:
            if info.kind == COMMITTED:
                check_committed(base, stub, info.name, contents)
            else:
                mounted_ids.add(check_mounts(base, stub, info, contents))
        stub.Cleanup(pb.CleanupRequest())
    check_directories(root, infos, busy)
    check_mountpoints(root, {name for name in mounted_ids if name})


def settled(stub: Any, expected: dict[str, int]) -> list[Any]:
    """What List shows once the start has finished, in the background, what a commit left half done."""
    deadline = time.monotonic() + 10
    while True:
        infos = [info for message in stub.List(pb.ListSnapshotsRequest()) for info in message.info]
        if {info.name: info.kind for info in infos} == expected:
            return infos
        assert time.monotonic() < deadline, f"{infos} instead of {expected}"
        time.sleep(0.01)


def check_committed(base: Path, stub: Any, name: str, contents: dict[str, Tree]) -> None:
    made = answer(stub.Prepare(pb.PrepareSnapshotRequest(key="child", parent=name)))
    with mounted(base, made) as top:
        if name in contents:
            assert read(top) == contents[name]
        (top / "probe").write_bytes(b"written")
    stub.Remove(pb.RemoveSnapshotRequest(key="child"))


def check_mounts(base: Path, stub: Any, info: Any, contents: dict[str, Tree]) -> str:
    """The name in mounts/ that serves the snapshot, empty where the client mounts it itself."""
    request = pb.MountsRequest(key=info.name)
    found = answer(stub.Mounts(request))
    assert answer(stub.Mounts(request)) == found
    with mounted(base, found) as top:
        if info.name in contents:
            assert read(top) == contents[info.name]
        if info.kind == ACTIVE:
            (top / "probe").write_bytes(b"written")
            (top / "probe").unlink()
    if "/mounts/" not in found[0].source:
        return ""
    if info.kind == ACTIVE:
        # And through the daemon's mount itself.
        (Path(found[0].source) / "probe").write_bytes(b"written")
        (Path(found[0].source) / "probe").unlink()
    return Path(found[0].source).name


def check_directories(root: Path, infos: list[Any], busy: int) -> None:
    directories = sorted((root / "snapshots").iterdir())
    with_directory = sum(info.kind != VIEW for info in infos)
    assert len(directories) == with_directory
    committed = sum(info.kind == COMMITTED for info in infos)
    names = Counter(entry.name for directory in directories for entry in directory.iterdir())
    assert names.pop("refs", 0) <= committed
    actives = sum(info.kind == ACTIVE for info in infos)
    assert names == {"fs": with_directory, "work": actives}
    assert not list((root / "trash").iterdir())
    assert not list((root / "spool").iterdir())
    waiting = list((root / "busy").iterdir())
    assert len(waiting) == busy
    # Whole: with the index of the mount that still uses it.
    assert all({entry.name for entry in directory.iterdir()} == {"fs", "work"} for directory in waiting)


def check_mountpoints(root: Path, expected: set[str]) -> None:
    directories = list((root / "mounts").iterdir())
    assert {directory.name for directory in directories} == expected
    assert Counter(mounts_below(root)) == Counter(map(str, directories)), "one mount each, and no other"


@pytest.mark.parametrize("name", ["new", "old"])
def test_what_a_power_cut_brings_back_of_an_exchanged_tree_is_swept(base: Path, name: str) -> None:
    """Beside the layer that took its place, and that is sealed: the rename to busy/ was not on the disk yet."""
    contents = set_up(base / "root", "daemon")
    lowest = min((base / "root" / "snapshots").iterdir(), key=lambda path: int(path.name))
    tree = lowest / "new" if name == "new" else lowest / "old" / "fs"
    tree.mkdir(parents=True)
    (tree / "first").write_bytes(b"old")
    with Daemon(base / "root", base / "s.sock", log=base / "log") as daemon:
        check(base, daemon, BEFORE, contents, 0)


def test_a_mountpoint_without_its_mount_cannot_be_written_to(base: Path) -> None:
    """Whichever kill came between making the directory and making it immutable."""
    set_up(base / "root", "daemon")
    daemon = Daemon(base / "root", base / "s.sock", log=base / "log")
    bare = source(daemon.root)
    linux.umount2(str(bare))
    clear_immutable(bare)
    bare.rmdir()
    crash(daemon, Case("mount.made-mountpoint=kill", mounts, BEFORE), reboot=False)
    with daemon, daemon.channel() as channel:
        mounts(snapshots_pb2_grpc.SnapshotsStub(channel))
        linux.umount2(str(bare))
        with pytest.raises(PermissionError):
            (bare / "stray").touch()


def clear_immutable(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        linux.set_inode_flags(fd, linux.get_inode_flags(fd) & ~linux.FS_IMMUTABLE_FL)
    finally:
        os.close(fd)


# -- mounting and looking


def source(root: Path) -> Path:
    """Where "active", the newest snapshot, is materialized; in client mode nowhere."""
    newest = max(int(path.name) for path in (root / "snapshots").iterdir())
    return root / "mounts" / str(newest)


def answer(response: Any) -> tuple[Mount, ...]:
    return tuple(Mount(m.type, m.source, tuple(m.options)) for m in response.mounts)


_NUMBERS = itertools.count()


@contextmanager
def mounted(base: Path, wanted: tuple[Mount, ...]) -> Iterator[Path]:
    """What a client does with an answer of Prepare, View or Mounts."""
    (mount,) = wanted
    target = base / f"m{next(_NUMBERS)}"
    target.mkdir()
    if mount.type == "bind":
        linux.mount(mount.source, str(target), None, linux.MS_BIND | linux.MS_REC, None)
    else:
        linux.mount(mount.source, str(target), mount.type, 0, ",".join(mount.options))
    try:
        yield target
    finally:
        linux.umount2(str(target))
        target.rmdir()


def read(top: Path) -> Tree:
    return {str(path.relative_to(top)): look(path) for path in sorted(top.rglob("*"))}


def look(path: Path) -> tuple[int, bytes]:
    mode = path.lstat().st_mode
    return mode, path.read_bytes() if stat.S_ISREG(mode) else b""


# -- failpoints that do not kill


def fail_at(names: str, after: dict[str, int], **more: Any) -> list[Case]:
    return [Case(f"{name}=enospc", commit, after, **more) for name in names.split()]


ERROR_CASES = [
    *fail_at("commit.frozen commit.before-transaction", BEFORE),
    *fail_at("commit.before-transaction", BEFORE, situation=forgotten_bind),
    *fail_at("copy.made commit.before-transaction", BEFORE, situation=open_writer),
    *fail_at("seal.unmounted", BEFORE),
    *fail_at("seal.unmounted seal.copied", BEFORE, situation=forgotten_bind),
    *fail_at("seal.stripped", DONE),
    *fail_at("seal.exchanged", DONE, situation=forgotten_bind, busy=1),
    Case("seal.copied=error", commit, DONE, forgotten_bind, busy=1),
]


@pytest.mark.parametrize("case", ERROR_CASES, ids=str)
def test_an_error_leaves_all_or_nothing(base: Path, case: Case) -> None:
    """Before anything of it is changed the snapshot goes on as it was; later, who comes next finishes the layer."""
    contents = set_up(base / "root", "daemon")
    environment = {"DEDUP_FAILPOINTS": case.armed}
    daemon = Daemon(base / "root", base / "s.sock", log=base / "log", environment=environment)
    with daemon, case.situation(base, source(base / "root")):
        with daemon.channel() as channel, pytest.raises(grpc.RpcError) as caught:
            commit(snapshots_pb2_grpc.SnapshotsStub(channel))
        code: Any = caught.value.code()  # type: ignore[attr-defined]
        assert code is (grpc.StatusCode.RESOURCE_EXHAUSTED if case.after is BEFORE else grpc.StatusCode.UNAVAILABLE)
        if case.after is BEFORE:
            check(base, daemon, BEFORE, contents, 0)
        daemon.environment.clear()
        daemon.restart()
        check(base, daemon, case.after, contents, case.busy)
        retry(daemon, commit)


@pytest.mark.parametrize("name", ["seal.moved-work", "seal.moved-tree"])
def test_an_old_tree_for_which_there_is_no_place_yet_fails_no_commit(base: Path, name: str) -> None:
    contents = set_up(base / "root", "daemon")
    daemon = Daemon(
        base / "root", base / "s.sock", log=base / "log", environment={"DEDUP_FAILPOINTS": f"{name}=enospc"}
    )
    with daemon, forgotten_bind(base, source(base / "root")):
        with daemon.channel() as channel:
            commit(snapshots_pb2_grpc.SnapshotsStub(channel))
        daemon.environment.clear()
        daemon.restart()
        check(base, daemon, DONE, contents, busy=1)


def test_an_error_inside_a_batch_is_answered_and_the_daemon_goes_on(base: Path) -> None:
    environment = {"DEDUP_FAILPOINTS": "meta.before-batch=enospc"}
    with Daemon(base / "root", base / "s.sock", log=base / "log", environment=environment) as daemon:
        with daemon.channel() as channel:
            stub = snapshots_pb2_grpc.SnapshotsStub(channel)
            for _ in range(3):
                with pytest.raises(grpc.RpcError) as caught:
                    stub.Prepare(pb.PrepareSnapshotRequest(key="k"))
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
            stub.Cleanup(pb.CleanupRequest())
        assert not list((daemon.root / "snapshots").iterdir())
        assert not list((daemon.root / "mounts").iterdir())


def test_an_unknown_failpoint_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no\.such"):
        failpoint._parse("no.such=kill")
