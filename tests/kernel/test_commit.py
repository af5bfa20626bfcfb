"""Commit makes of an upper a layer and nothing but, whoever still uses the mount.

- What only the mount of the upper had a use for goes: work/, the attributes in DEAD. What the layer is read by stays.
- A Commit that fails leaves the container running and writable.
- Whoever still reads sees the old tree, whole; who still writes goes on, into a tree of which nothing is in the layer.
- A Commit keeps no other call waiting but those on its own snapshot.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import pytest

from snapshotter import linux, mountinfo
from snapshotter.api import snapshots_pb2, snapshots_pb2_grpc
from snapshotter.errors import AlreadyExists, InvalidArgument, NotFound, SnapshotterError
from snapshotter.model import MAX_LABELS_BYTES, Kind
from tests.rig.daemon import Daemon
from tests.rig.host import Host
from tests.rig.seen import Seen, seen, xattrs_of

pytestmark = pytest.mark.root

NOBODY = 2**32 - 1
"""The id in an ACL's entries that are for no user or group in particular (<linux/posix_acl.h>)."""
DEAD = {"origin", "impure", "nlink", "uuid", "upper", "protattr"}


def image(tree: Path) -> None:
    (tree / "d/inner").mkdir(parents=True)
    (tree / "moved").mkdir()
    (tree / "replaced").mkdir()
    (tree / "file").write_text("old")
    (tree / "d/inner/deep").write_text("deep")
    (tree / "moved/in").write_text("in")
    (tree / "replaced/hidden").write_text("hidden")
    (tree / "big").write_bytes(b"b" * 100_000)
    (tree / "gone").write_text("gone")
    (tree / "linked").write_text("linked")
    os.link(tree / "linked", tree / "d/linked")


def change(merged: Path) -> None:
    """Everything that makes the kernel write an attribute into the upper."""
    (merged / "file").write_text("new")
    (merged / "big").chmod(0o600)
    (merged / "gone").unlink()
    (merged / "moved").rename(merged / "d/moved")
    (merged / "replaced/hidden").unlink()
    (merged / "replaced").rmdir()
    (merged / "replaced").mkdir()
    (merged / "linked").write_text("new")
    (merged / "fresh").write_text("fresh")


def overlay_attributes(tree: Path) -> dict[str, set[str]]:
    """Of each path in a layer: the names of the attributes that overlay wrote, without their prefix."""
    found = {}
    for path in [tree, *tree.rglob("*")]:
        names = {
            name.removeprefix("trusted.overlay.") for name in xattrs_of(path) if name.startswith("trusted.overlay.")
        }
        if names:
            found[str(path.relative_to(tree))] = names
    return found


# -- what a layer is


def test_a_layer_has_nothing_of_the_dead_upper(host: Host) -> None:
    host.unpack("image", fill=image)
    with host.running("key", "image") as merged:
        change(merged)
        shown = seen(merged)
    upper = host.upper("key")
    before = set().union(*overlay_attributes(upper).values())
    assert {"origin", "impure", "nlink"} <= before, "the kernel wrote nothing that could be stripped"
    assert (upper.parent / "work/index").is_dir()

    host.client.commit("layer", "key")
    (layer, _) = host.layers("layer")
    assert layer == upper, "committed in place"
    assert not (layer.parent / "work").exists()
    assert sorted(os.listdir(layer.parent)) == ["fs"]
    left = overlay_attributes(layer)
    assert left == {
        "big": {"metacopy"},
        "d/moved": {"redirect"},
        "replaced": {"opaque"},
    }
    with host.viewed("layer") as merged:
        assert seen(merged) == shown


def test_whiteouts_and_opaque_directories_of_all_kinds_stay(host: Host) -> None:
    """As layers may hold them: 0:0 devices; empty files with an attribute, in a directory that is marked "x"."""

    def whiteouts(upper: Path) -> None:
        os.mknod(upper / "file", stat.S_IFCHR, 0)
        (upper / "d").mkdir()
        os.setxattr(upper / "d", "trusted.overlay.opaque", b"x")
        (upper / "d/linked").touch()
        os.setxattr(upper / "d/linked", "trusted.overlay.whiteout", b"")
        (upper / "replaced").mkdir()
        os.setxattr(upper / "replaced", "trusted.overlay.opaque", b"y")
        for path in (upper, upper / "d", upper / "replaced"):
            os.setxattr(path, "trusted.overlay.impure", b"y")  # so that there is something to strip

    host.unpack("image", fill=image)
    host.unpack("layer", "image", fill=whiteouts)
    host.unpack("top", "layer", fill=lambda tree: (tree / "fresh").write_text("fresh"))
    layer = host.layers("layer")[0]
    assert stat.S_ISCHR((layer / "file").lstat().st_mode)
    assert overlay_attributes(layer) == {"d": {"opaque"}, "d/linked": {"whiteout"}, "replaced": {"opaque"}}
    for name in ("layer", "top"):
        with host.viewed(name) as merged:
            shown = seen(merged)
            assert {"gone", "d/inner/deep", "replaced"} <= shown.keys()
            assert not {"file", "d/linked", "replaced/hidden"} & shown.keys()


def test_the_attributes_in_dead_go_from_files_and_directories(host: Host) -> None:
    """All six, whichever the kernel would have written where."""
    host.unpack("image", fill=image)
    with host.running("key", "image") as merged:
        (merged / "new").mkdir()
        (merged / "new/file").write_text("x")
    upper = host.upper_of_unmounted("key")
    for path in (upper, upper / "new", upper / "new/file"):
        for name in DEAD - {"origin", "uuid", "upper", "protattr"}:
            os.setxattr(path, f"trusted.overlay.{name}", b"U+0" if name == "nlink" else b"y")
        os.setxattr(path, "user.overlayed", b"the user's")
        os.setxattr(path, "trusted.overlay.overlay.origin", b"the user's, escaped")
    host.client.commit("layer", "key")
    assert overlay_attributes(host.layers("layer")[0]) == {
        ".": {"overlay.origin"},
        "new": {"overlay.origin", "opaque"},
        "new/file": {"overlay.origin"},
    }


def test_the_root_directory_keeps_its_attributes(host: Host) -> None:
    acl = b"\x02\x00\x00\x00" + b"".join(
        tag.to_bytes(2, "little") + permissions.to_bytes(2, "little") + who.to_bytes(4, "little")
        for tag, permissions, who in [
            (1, 7, NOBODY), (2, 5, 1234), (4, 5, NOBODY), (0x10, 5, NOBODY), (0x20, 0, NOBODY),
        ]
    )  # fmt: skip
    host.unpack("image", fill=image)
    with host.running("key", "image") as merged:
        change(merged)
        os.chown(merged, 123, 456)
        merged.chmod(0o1750)
        os.setxattr(merged, "system.posix_acl_access", acl)
        os.setxattr(merged, "system.posix_acl_default", acl)
        os.setxattr(merged, "user.note", b"root")
        os.utime(merged, ns=(1, 1_234_567_890_123_456_789))
        before = seen(merged)["."]
    host.client.commit("layer", "key")
    with host.viewed("layer") as merged:
        assert seen(merged)["."] == before
    with host.running("child", "layer") as merged:
        after = seen(merged)["."]
        assert (after.mode, after.uid, after.gid, after.xattrs) == (before.mode, before.uid, before.gid, before.xattrs)


# -- a Commit that fails


def with_failing_failpoint(host: Host) -> None:
    host.daemon.environment["DEDUP_FAILPOINTS"] = "commit.before-transaction=error"
    host.restart()
    with pytest.raises(SnapshotterError):
        host.client.commit("new", "key")


def with_an_error_once_frozen(host: Host) -> None:
    host.daemon.environment["DEDUP_FAILPOINTS"] = "commit.frozen=enospc"
    host.restart()
    with pytest.raises(SnapshotterError):
        host.client.commit("new", "key")


def with_a_taken_name(host: Host) -> None:
    with pytest.raises(AlreadyExists):
        host.client.commit("image", "key")


def with_huge_labels(host: Host) -> None:
    with pytest.raises(InvalidArgument):
        host.client.commit("new", "key", labels={"x": "y" * MAX_LABELS_BYTES})


def with_another_parent(host: Host) -> None:
    with pytest.raises(InvalidArgument):
        host.client.commit("new", "key", parent="nothing")


@pytest.mark.parametrize(
    "fail",
    [with_failing_failpoint, with_an_error_once_frozen, with_a_taken_name, with_huge_labels, with_another_parent],
    ids=lambda fail: fail.__name__,
)
def test_a_commit_that_fails_leaves_the_container_running(host: Host, fail: Callable[[Host], None]) -> None:
    host.unpack("image", fill=image)
    with host.running("key", "image") as merged:
        change(merged)
        before = seen(merged)
        fail(host)
        assert seen(merged) == before
        (merged / "file").write_text("still writable")
        assert host.client.stat("key").kind is Kind.ACTIVE
        assert len(host.mounts()) == 1
        with pytest.raises(NotFound):
            host.client.stat("new")
    host.daemon.environment.clear()
    host.restart()
    host.client.commit("new", "key")
    with host.viewed("new") as merged:
        assert (merged / "file").read_text() == "still writable"
    assert sorted(os.listdir(host.root / "busy")) == []


# -- who still uses the mount at a Commit


@contextmanager
def forgotten_bind(merged: Path) -> Iterator[Callable[[], None]]:
    """Reads the old tree, whole, to the end; cannot write. But for the link counts: the layer has the same files."""
    before = without_links(seen(merged))

    def check() -> None:
        assert without_links(seen(merged)) == before
        with pytest.raises(OSError, match="Read-only"):
            (merged / "file").write_text("too late")

    yield check


@contextmanager
def open_reader(merged: Path) -> Iterator[Callable[[], None]]:
    with (merged / "file").open("rb") as stream:

        def check() -> None:
            stream.seek(0)
            assert stream.read() == b"new"

        yield check


@contextmanager
def working_directory(merged: Path) -> Iterator[Callable[[], None]]:
    """A process whose working directory is in there, and nothing else."""
    with subprocess.Popen(
        ["sh", "-c", "while read name; do cat $name; echo; done"],
        cwd=merged / "d", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        yield partial(_answers, process, {"linked": "new", "moved/in": "in", "inner/deep": "deep"})
        assert process.stdin
        process.stdin.close()


@contextmanager
def other_mount_namespace(merged: Path) -> Iterator[Callable[[], None]]:
    """With a bind of its own, which nobody else can unmount."""
    place = merged.with_name("elsewhere")
    place.mkdir()
    script = f"mount --bind {merged} {place}; echo ready; while read name; do cat {place}/$name; echo; done"
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "ready\n"
        yield partial(_answers, process, {"linked": "new", "d/moved/in": "in", "d/inner/deep": "deep"})
        process.stdin.close()
    place.rmdir()


def _answers(process: subprocess.Popen[str], contents: dict[str, str]) -> None:
    assert process.stdin and process.stdout
    for name, content in contents.items():
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{content}\n"


@contextmanager
def open_writer(merged: Path) -> Iterator[Callable[[], None]]:
    with (merged / "file").open("r+b", buffering=0) as stream:

        def check() -> None:
            stream.seek(0)
            stream.write(b"later")
            assert (merged / "file").read_bytes() == b"later"
            (merged / "fresh").write_text("later")
            (merged / "gone").write_text("later")

        yield check


@contextmanager
def mapped_writer(merged: Path) -> Iterator[Callable[[], None]]:
    """Without a descriptor: the mapping alone holds the file."""
    fd = os.open(merged / "file", os.O_RDWR)
    memory = mmap.mmap(fd, 3)
    os.close(fd)

    def check() -> None:
        memory[:3] = b"LAT"
        memory.flush()
        assert (merged / "file").read_bytes() == b"LAT"

    yield check
    memory.close()


@contextmanager
def unlinked_but_open(merged: Path) -> Iterator[Callable[[], None]]:
    fd = os.open(merged / "temporary", os.O_RDWR | os.O_CREAT, 0o600)
    os.unlink(merged / "temporary")

    def check() -> None:
        os.pwrite(fd, b"later", 0)
        assert os.pread(fd, 5, 0) == b"later"
        (merged / "file").write_text("later")

    yield check
    os.close(fd)


User = Callable[[Path], AbstractContextManager[Callable[[], None]]]
READERS: list[User] = [forgotten_bind, open_reader, working_directory, other_mount_namespace]
WRITERS: list[User] = [open_writer, mapped_writer, unlinked_but_open]


@pytest.mark.parametrize("user", [*READERS, *WRITERS], ids=lambda user: user.__name__)
def test_a_commit_under_somebody_who_uses_the_mount(host: Host, user: User) -> None:
    host.unpack("image", fill=image)
    host.unpack("second", "image", fill=lambda tree: (tree / "second").write_text("x"))
    with contextlib.ExitStack() as users:
        bind = contextlib.ExitStack()
        merged = bind.enter_context(host.running("key", "second"))
        change(merged)
        check = users.enter_context(user(merged))
        shown = seen(merged)
        if user in (open_reader, working_directory, other_mount_namespace):
            bind.close()  # as containerd does; they are then all that holds the mount
        users.enter_context(bind)

        host.client.commit("layer", "key")
        check()
        with host.viewed("layer") as view:
            # A new tree of the same files: the old one's names count as links while it is there.
            compared = without_links if user in READERS else same
            assert compared(seen(view)) == compared(shown)
        use(host, "child", "layer")
        check()
        host.client.commit("grandchild", "child")
        use(host, "other child", "layer")
        host.client.cleanup()
        check()
        host.restart(kill=True)
        check()
        assert len(os.listdir(host.root / "busy")) == 1, "somebody still uses it"
    host.client.cleanup()
    assert os.listdir(host.root / "busy") == []
    assert os.listdir(host.root / "trash") == []

    host.client.commit("other grandchild", "other child")
    with host.viewed("layer") as view:
        assert seen(view) == shown
    for name in ("grandchild", "other grandchild"):
        with host.viewed(name) as view:
            check_used(view)
    for name in ("grandchild", "other grandchild", "layer"):
        host.client.remove(name)
    host.client.cleanup()
    assert host.mounts() == []
    assert len(os.listdir(host.root / "snapshots")) == len(list(host.client.list())) == 2


def use(host: Host, key: str, parent: str) -> None:
    """A child of a layer that `change` made."""
    with host.running(key, parent) as merged:
        (merged / "file").write_text("the child's")
        (merged / "linked").write_text("the child's")
        check_used(merged)


def check_used(merged: Path) -> None:
    for name in ("file", "linked", "d/linked"):
        assert (merged / name).read_text() == "the child's"
    assert (merged / "d/moved/in").read_text() == "in"
    assert (merged / "big").read_bytes() == b"b" * 100_000
    assert not {"moved", "gone"} & set(os.listdir(merged))
    assert os.listdir(merged / "replaced") == []


def same(tree: dict[str, Seen]) -> dict[str, Seen]:
    return tree


def without_links(tree: dict[str, Seen]) -> dict[str, Seen]:
    return {path: replace(entry, links=0) for path, entry in tree.items()}


# -- other calls while a Commit is going on


@pytest.mark.parametrize("where", ["seal.unmounted", "seal.stripped"])
def test_mounts_never_mounts_what_a_commit_has_just_unmounted(base: Path, where: str) -> None:
    """It would be a writable mount of a committed layer."""
    with stalled(base, where) as host, ThreadPoolExecutor(2) as pool:
        host.daemon.environment.clear()
        with host.running("key") as merged:
            (merged / "file").write_text("content")
        committing = pool.submit(host.client.commit, "layer", "key")
        wait_until(lambda: not is_mounted_by_the_daemon(host))
        with pytest.raises(NotFound):
            host.client.mounts("key")
        committing.result()
        assert not list((host.root / "mounts").iterdir())
        assert not list((host.root / "busy").iterdir())
        with host.running("child", "layer") as merged:
            assert (merged / "file").read_text() == "content"


def is_mounted_by_the_daemon(host: Host) -> bool:
    return any(host.root / "mounts" in Path(mount.path).parents for mount in mountinfo.read())


def test_clients_that_give_up_waiting_hurt_nobody(base: Path) -> None:
    """Their calls are cancelled; what the others wait for is not."""
    with (
        Daemon(
            base / "root", base / "s.sock", log=base / "log",
            environment={"DEDUP_FAILPOINTS": "commit.frozen=stall:1;delete.entry=stall:0.3"},
        ) as daemon,
        daemon.channel() as channel,
    ):  # fmt: skip
        stub = snapshots_pb2_grpc.SnapshotsStub(channel)
        stub.Prepare(snapshots_pb2.PrepareSnapshotRequest(key="k"))
        committing = stub.Commit.future(snapshots_pb2.CommitSnapshotRequest(name="n", key="k"))
        wait_until(lambda: bool(os.statvfs(daemon.root / "mounts/1").f_flag & os.ST_RDONLY))
        patient = stub.Remove.future(snapshots_pb2.RemoveSnapshotRequest(key="k"), timeout=20)
        impatient = stub.Remove.future(snapshots_pb2.RemoveSnapshotRequest(key="k"), timeout=0.2)
        assert impatient.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert committing.code() is grpc.StatusCode.OK
        assert patient.code() is grpc.StatusCode.NOT_FOUND
        stub.Remove(snapshots_pb2.RemoveSnapshotRequest(key="n"))
        impatient = stub.Cleanup.future(snapshots_pb2.CleanupRequest(), timeout=0.2)
        assert impatient.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        stub.Cleanup(snapshots_pb2.CleanupRequest(), timeout=20)
        assert not list((daemon.root / "trash").iterdir())


def test_a_kill_while_frozen_leaves_no_container_read_only_that_only_has_a_bind(base: Path) -> None:
    """Somebody has unmounted the daemon's own mount meanwhile."""
    with Host(base, environment={"DEDUP_FAILPOINTS": "commit.frozen=kill"}) as host:
        (base / "bind").mkdir()
        with host.running("key") as merged:
            linux.mount(str(merged), str(base / "bind"), None, linux.MS_BIND, None)
        with pytest.raises(SnapshotterError):
            host.client.commit("layer", "key")
        linux.umount2(str(next((host.root / "mounts").iterdir())))
        with pytest.raises(OSError, match="Read-only"):
            (base / "bind" / "file").write_text("too early")
        host.daemon.kill()
        host.daemon.environment.clear()
        host.start()
        (base / "bind" / "file").write_text("written")
        linux.umount2(str(base / "bind"))
        with host.again("key") as merged:
            assert (merged / "file").read_text() == "written"


def test_a_view_of_the_lowest_layer_shows_no_attributes_of_overlays(host: Host) -> None:
    """It is a bind of the tree itself."""
    with host.running("key") as merged:
        (merged / "directory").mkdir()
        assert xattrs_of(merged / "directory") == {}
    host.client.commit("layer", "key")
    with host.viewed("layer") as merged:
        assert xattrs_of(merged / "directory") == {}


def test_a_deep_tree_is_copied_for_a_forgotten_bind(host: Host, base: Path) -> None:
    """The container chooses the depth: it must stop neither Commit nor the next start."""
    depth = 700
    with host.running("key") as merged:
        fd = os.open(merged, os.O_RDONLY)
        for _ in range(depth):
            os.mkdir("d", dir_fd=fd)
            inner = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = inner
        os.close(os.open("end", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
        os.close(fd)
        (base / "forgotten").mkdir()
        linux.mount(str(merged), str(base / "forgotten"), None, linux.MS_BIND, None)
        try:
            host.client.commit("layer", "key")
            host.restart(kill=True)
            with host.viewed("layer") as layer:
                found = subprocess.run(
                    ["find", layer, "-name", "end", "-printf", "%d"], capture_output=True, check=True
                )
                assert found.stdout == str(depth + 1).encode()
        finally:
            linux.umount2(str(base / "forgotten"), linux.MNT_DETACH)


def stalled(base: Path, where: str) -> Host:
    return Host(base, environment={"DEDUP_FAILPOINTS": f"{where}=stall:1"})


@pytest.mark.parametrize("where", ["commit.frozen", "commit.after-transaction", "seal.unmounted"])
def test_other_calls_on_a_snapshot_that_is_being_committed(base: Path, where: str) -> None:
    """Stat and List answer at once with what is so at that moment; what needs the outcome waits for it."""
    with stalled(base, where) as host, ThreadPoolExecutor(20) as pool:
        host.daemon.environment.clear()
        host.unpack("image", fill=image)
        with host.running("key", "image") as merged:
            change(merged)
        committing = pool.submit(host.client.commit, "layer", "key")
        wait_until(lambda: is_read_only_or_gone(host))
        names = {info.name for info in host.client.list()}
        assert names == {"image", "key"}, "until it is whole, it is what it was"
        assert not committing.done(), "List waited for the Commit"
        child = pool.submit(host.client.prepare, "child", "layer")
        removing = pool.submit(host.client.remove, "key")
        again = [pool.submit(host.client.commit, f"layer {n}", "key") for n in range(16)]
        assert committing.result(30) is None
        for refused in (removing, *again):
            assert isinstance(refused.exception(30), NotFound)
        # It was asked for before the name existed, or after: NotFound, or a child of the finished layer.
        if (error := child.exception(30)) is not None:
            assert isinstance(error, NotFound)
            host.client.prepare("child", "layer")
        with host.again("child") as merged:
            assert (merged / "d/linked").read_text() == "new"


def test_commits_of_many_snapshots_at_once(host: Host) -> None:
    host.unpack("image", fill=image)

    def build(number: int) -> str:
        host.client.commit(f"layer {number}", f"key {number}")
        return host.client.stat(f"layer {number}").name

    with contextlib.ExitStack() as mounts, ThreadPoolExecutor(16) as pool:
        for number in range(16):
            change(mounts.enter_context(host.running(f"key {number}", "image")))
        futures = [pool.submit(build, number) for number in range(16)]
        counted = [len(list(host.client.list())) for _ in range(20)]
        assert [future.result(60) for future in futures] == [f"layer {number}" for number in range(16)]
    assert set(counted) <= set(range(1, 18))
    for number in range(16):
        with host.viewed(f"layer {number}") as merged:
            assert (merged / "d/linked").read_text() == "new"


def test_sixteen_commits_of_one_snapshot_at_once(host: Host) -> None:
    """One of them wins; the others learn that the key is gone or the name taken."""
    host.unpack("image", fill=image)
    with host.running("key", "image") as merged:
        change(merged)
    with ThreadPoolExecutor(32) as pool:
        futures = [pool.submit(host.client.commit, f"layer {number % 8}", "key") for number in range(16)]
        others = [pool.submit(act, "key") for act in (host.client.mounts, host.client.stat) for _ in range(8)]
        errors = [future.exception(60) for future in futures]
        assert errors.count(None) == 1
        assert all(isinstance(error, NotFound | AlreadyExists) for error in errors if error)
        assert all(isinstance(other.exception(60), NotFound | None) for other in others)
    assert len(host.mounts()) == len(os.listdir(host.root / "mounts")) == 0


def test_a_snapshot_is_committed_and_removed_at_once(host: Host) -> None:
    host.unpack("image", fill=image)
    with ThreadPoolExecutor(4) as pool:
        for number in range(10):
            with host.running(f"key {number}", "image") as merged:
                change(merged)
            committing = pool.submit(host.client.commit, f"layer {number}", f"key {number}")
            removing = pool.submit(host.client.remove, f"key {number}")
            outcomes = [future.exception(30) for future in (committing, removing)]
            assert outcomes.count(None) == 1
            assert sum(isinstance(error, NotFound) for error in outcomes) == 1
            assert (outcomes[0] is None) == (f"layer {number}" in {info.name for info in host.client.list()})
    host.client.cleanup()
    assert os.listdir(host.root / "mounts") == []
    assert len(os.listdir(host.root / "snapshots")) == len(list(host.client.list()))


def is_read_only_or_gone(host: Host) -> bool:
    """The mount of the one active snapshot that there is."""
    return all(os.statvfs(host.root / "mounts" / name).f_flag & os.ST_RDONLY for name in host.mounts())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
