"""What the daemon's calls promise beyond single answers: sizes, views, limits, and that nobody waits.

Invariants: a message of List is bounded, the whole List is one moment's, and memory does not grow with
it; a client that stops reading, a commit and a deletion keep no other call waiting; ids are used once.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import lmdb
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from snapshotter.api import snapshots_pb2 as pb
from snapshotter.api import snapshots_pb2_grpc
from snapshotter.meta import snapshots
from snapshotter.meta.store import Store, Tx
from snapshotter.model import MAX_CHAIN, MAX_KEY_BYTES, MAX_LABELS_BYTES, Creation, Kind
from snapshotter.root import claim
from tests.rig.daemon import CLIENT_MODE, Daemon
from tests.rig.http2 import StalledCall

pytestmark = pytest.mark.root

MIB = 1 << 20
SERVICE = pb.DESCRIPTOR.services_by_name["Snapshots"].full_name
STATUS = grpc.StatusCode


@pytest.fixture
def daemon(base: Path) -> Iterator[Daemon]:
    with Daemon(base / "root", base / "s.sock", log=base / "daemon.log", arguments=CLIENT_MODE) as running:
        yield running


@contextmanager
def connected(daemon: Daemon) -> Iterator[Any]:
    """A stub that sends messages of any size and waits a minute for each answer at most."""
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", 16 * MIB)]
    with grpc.insecure_channel(f"unix:{daemon.address}", options=options) as channel:
        yield snapshots_pb2_grpc.SnapshotsStub(grpc.intercept_channel(channel, _Deadline()))


class _Deadline(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[misc]
    def intercept_unary_unary(self, proceed: Any, details: Any, request: Any) -> Any:
        return proceed(details._replace(timeout=60), request)

    intercept_unary_stream = intercept_unary_unary


def refused(call: Callable[..., Any], request: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    return caught.value.code(), caught.value.details()  # type: ignore[attr-defined]


def store_views(directory: Path, wanted: Iterable[tuple[str, str, Mapping[str, str]]]) -> None:
    """Writes views (key, parent, labels) into a root that no daemon has; views need no directory."""

    def act(tx: Tx) -> None:
        for key, parent, labels in wanted:
            snapshots.insert(tx, snapshots.next_id(tx), Creation(Kind.VIEW, key, parent, dict(labels)))

    root, lock = claim(directory)
    store = Store(root.metadata)
    store.write(act)
    store.close()
    lock.release()


def fill(directory: Path, count: int, label_bytes: int) -> None:
    store_views(directory, ((f"filler-{n}", "", {"label": "v" * label_bytes}) for n in range(count)))


def names(stub: Any) -> set[str]:
    return {info.name for message in stub.List(pb.ListSnapshotsRequest()) for info in message.info}


def prepare(stub: Any, key: str, parent: str = "") -> Path:
    """The directory of the new snapshot's tree."""
    (mount,) = stub.Prepare(pb.PrepareSnapshotRequest(key=key, parent=parent)).mounts
    return Path(options_of(mount).get("upperdir", mount.source))


def options_of(mount: Any) -> dict[str, str]:
    return dict(option.partition("=")[::2] for option in mount.options)


@contextmanager
def mounted(target: Path, mount: Any, *more: str, below: Path = Path("/")) -> Iterator[None]:
    """Mounts as containerd does, with lower directories relative to the directory `below`."""
    target.mkdir()
    options = ",".join([*mount.options, *more]).replace(f"={below}/", "=").replace(f":{below}/", ":")
    command = ["mount", "-t", mount.type, "-o", options, mount.source, target]
    subprocess.run(command, check=True, cwd=below)
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)
        target.rmdir()


def commit(stub: Any, name: str, key: str, parent: str = "") -> None:
    stub.Commit(pb.CommitSnapshotRequest(name=name, key=key, parent=parent))


def status_kib(pid: int, field: str) -> int:
    """A number of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field + ":")))


# -- what listens on the socket ---------------------------------------------------------------------


@pytest.mark.parametrize("service", ["", SERVICE, "dedup_snapshotter.admin.v1.Admin"])
def test_health_is_serving(daemon: Daemon, service: str) -> None:
    with daemon.channel() as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_health_of_another_service_is_not_found(daemon: Daemon) -> None:
    with daemon.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert refused(stub.Check, health_pb2.HealthCheckRequest(service="no.such"))[0] is STATUS.NOT_FOUND


def test_reflection_describes_the_services(daemon: Daemon) -> None:
    with daemon.channel() as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) == {
            SERVICE,
            "dedup_snapshotter.admin.v1.Admin",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        (service,) = database.FindFileContainingSymbol(SERVICE).service
    assert {method.name for method in service.method} == {
        "Prepare", "View", "Mounts", "Commit", "Remove", "Stat", "Update", "List", "Usage", "Cleanup",
    }  # fmt: skip


def test_an_unknown_method_is_unimplemented(daemon: Daemon) -> None:
    with daemon.channel() as channel:
        assert refused(channel.unary_unary(f"/{SERVICE}/Walk"), b"")[0] is STATUS.UNIMPLEMENTED


# -- limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "limit_bytes"), [("Stat", MIB), ("List", 16 * MIB)])
def test_a_request_has_a_mib_at_most_and_a_list_16(daemon: Daemon, method: str, limit_bytes: int) -> None:
    with connected(daemon) as stub:
        prepare(stub, "k")
        request = pb.StatSnapshotRequest(key="k") if method == "Stat" else pb.ListSnapshotsRequest(filters=["name==k"])
        request.snapshotter = "x" * (limit_bytes - request.ByteSize() - 5)
        request.snapshotter += "x" * (limit_bytes - request.ByteSize())
        assert request.ByteSize() == limit_bytes

        def call(asked: Any) -> list[Any]:
            return [stub.Stat(asked).info] if method == "Stat" else [i for m in stub.List(asked) for i in m.info]

        assert [info.name for info in call(request)] == ["k"]
        request.snapshotter += "x"
        assert refused(call, request)[0] is STATUS.RESOURCE_EXHAUSTED
        assert stub.Stat(pb.StatSnapshotRequest(key="k")).info.name == "k"


def test_a_list_takes_15_mib_of_filters(daemon: Daemon) -> None:
    with connected(daemon) as stub:
        prepare(stub, "k")
        filters = [f'name=="{letter * MIB}"' for letter in "abcdefghijklmno"]
        (message,) = stub.List(pb.ListSnapshotsRequest(filters=[*filters, "name==k"]))
        assert [info.name for info in message.info] == ["k"]


LONGEST = "é" * (MAX_KEY_BYTES // 2)
TOO_LONG = LONGEST + "x"


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Prepare", pb.PrepareSnapshotRequest(key=TOO_LONG)),
        ("View", pb.ViewSnapshotRequest(key=TOO_LONG)),
        ("Commit", pb.CommitSnapshotRequest(name=TOO_LONG, key="k")),
        ("Commit", pb.CommitSnapshotRequest(name="n", key=TOO_LONG)),
        ("Mounts", pb.MountsRequest(key=TOO_LONG)),
        ("Remove", pb.RemoveSnapshotRequest(key=TOO_LONG)),
        ("Stat", pb.StatSnapshotRequest(key=TOO_LONG)),
        ("Usage", pb.UsageRequest(key=TOO_LONG)),
        ("Update", pb.UpdateSnapshotRequest(info=pb.Info(name=TOO_LONG))),
    ],
)
def test_a_key_has_64_kib_at_most(daemon: Daemon, method: str, request_: Any) -> None:
    with connected(daemon) as stub:
        prepare(stub, "k")
        code, message = refused(getattr(stub, method), request_)
        assert code is STATUS.INVALID_ARGUMENT
        assert "\\u00e9" * 50 in message
        assert names(stub) == {"k"}


def test_labels_have_64_kib_at_most_and_what_is_refused_leaves_nothing(daemon: Daemon) -> None:
    fitting = {"a": "x" * (MAX_LABELS_BYTES // 2 - 1), "é": "y" * (MAX_LABELS_BYTES // 2 - 2)}
    too_large = {**fitting, "b": "z"}
    with connected(daemon) as stub:
        stub.Prepare(pb.PrepareSnapshotRequest(key="k", labels={**fitting, "dropped": ""}))
        before = stub.Stat(pb.StatSnapshotRequest(key="k"))
        assert before.info.labels == fitting
        added = pb.UpdateSnapshotRequest(
            info=pb.Info(name="k", labels={"b": "z"}), update_mask=FieldMask(paths=["labels.b"])
        )
        for call, request in (
            (stub.Prepare, pb.PrepareSnapshotRequest(key="l", labels=too_large)),
            (stub.View, pb.ViewSnapshotRequest(key="l", labels=too_large)),
            (stub.Commit, pb.CommitSnapshotRequest(name="n", key="k", labels=too_large)),
            (stub.Update, pb.UpdateSnapshotRequest(info=pb.Info(name="k", labels=too_large))),
            (stub.Update, added),
        ):
            code, message = refused(call, request)
            assert code is STATUS.INVALID_ARGUMENT
            assert "labels" in message
        assert stub.Stat(pb.StatSnapshotRequest(key="k")) == before
        assert names(stub) == {"k"}
        stub.Cleanup(pb.CleanupRequest())
        assert len(list((daemon.root / "snapshots").iterdir())) == 1
        stub.Commit(pb.CommitSnapshotRequest(name="n", key="k", labels=fitting))


def test_a_chain_is_as_deep_as_overlayfs_allows(daemon: Daemon) -> None:
    """The last layer that fits can be prepared, committed and viewed; the next cannot come about."""
    with connected(daemon) as stub:
        parent = ""
        for depth in range(1, MAX_CHAIN + 1):
            key = f"ns/{depth}/extract-{depth} sha256:{depth}"
            tree = prepare(stub, key, parent)
            if depth in (1, MAX_CHAIN - 1):
                (tree / ("first" if depth == 1 else "last")).touch()
            commit(stub, f"layer-{depth}", key)
            parent = f"layer-{depth}"
        view = stub.View(pb.ViewSnapshotRequest(key="extract-view", parent=parent)).mounts[0]
        assert options_of(view)["lowerdir"].count(":") == MAX_CHAIN - 1
        check_deep_container(daemon, stub, f"layer-{MAX_CHAIN - 1}")

        prepare(stub, "extract-orphan")
        for call, request in (
            (stub.Prepare, pb.PrepareSnapshotRequest(key="extract-next", parent=parent)),
            (stub.Commit, pb.CommitSnapshotRequest(name="n", key="extract-orphan", parent=parent)),
        ):
            code, message = refused(call, request)
            assert code is STATUS.FAILED_PRECONDITION
            assert str(MAX_CHAIN) in message and "extract-" in message
        commit(stub, "n", "extract-orphan", f"layer-{MAX_CHAIN - 1}")
        daemon.restart(kill=True)
    with connected(daemon) as stub:
        assert stub.Stat(pb.StatSnapshotRequest(key="n")).info.parent == f"layer-{MAX_CHAIN - 1}"
        assert refused(stub.Prepare, pb.PrepareSnapshotRequest(key="k", parent="n"))[0] is (STATUS.FAILED_PRECONDITION)


def check_deep_container(daemon: Daemon, stub: Any, parent: str) -> None:
    """It can be mounted, all of it; or it is refused, names itself and leaves nothing. mount(2) would cut
    options that are longer than a page without a word."""
    before = set((daemon.root / "snapshots").iterdir())
    try:
        (mount,) = stub.Prepare(pb.PrepareSnapshotRequest(key="container", parent=parent)).mounts
    except grpc.RpcError as error:
        assert error.code() is STATUS.FAILED_PRECONDITION  # type: ignore[attr-defined]
        assert '"container"' in error.details()  # type: ignore[attr-defined]
    else:
        with mounted(daemon.root.parent / "merged", mount, below=daemon.root / "snapshots"):
            assert {path.name for path in (daemon.root.parent / "merged").iterdir()} == {"first", "last"}
        stub.Remove(pb.RemoveSnapshotRequest(key="container"))
    stub.Cleanup(pb.CleanupRequest())
    assert set((daemon.root / "snapshots").iterdir()) == before


# -- List -------------------------------------------------------------------------------------------


def test_messages_of_a_list_are_bounded(base: Path) -> None:
    """Names, parents and labels of 64 KiB each make an info of 192 KiB."""
    parent = "p" * MAX_KEY_BYTES
    large = {"l": "v" * (MAX_LABELS_BYTES - 1)}
    daemon = Daemon(base / "root", base / "s.sock", log=base / "log", arguments=CLIENT_MODE)
    with daemon, connected(daemon) as stub:
        prepare(stub, "tmp")
        commit(stub, parent, "tmp")
        daemon.stop()
        wanted = [(f"small-{n}", "", {}) for n in range(350)]
        wanted += [(f"{n:03}".ljust(MAX_KEY_BYTES, "k"), parent, large) for n in range(100)]
        store_views(daemon.root, wanted)
        daemon.start()
    with daemon, connected(daemon) as stub:
        messages = list(stub.List(pb.ListSnapshotsRequest()))
        assert max(len(message.info) for message in messages) == 100
        assert 3 * MIB < max(message.ByteSize() for message in messages) <= 4 * MIB
        listed = [info.name for message in messages for info in message.info]
        assert sorted(listed) == sorted([parent, *(key for key, _, _ in wanted)])


def test_an_empty_store_lists_nothing(daemon: Daemon) -> None:
    with connected(daemon) as stub:
        assert names(stub) == set()


def test_a_list_is_of_one_moment(base: Path) -> None:
    """Parents are the oldest of many snapshots and their children the newest: while a List is made, pairs
    come and go, and a child is never seen without its parent, nor a snapshot twice."""
    pairs = 80
    daemon = Daemon(base / "root", base / "s.sock", log=base / "log", arguments=CLIENT_MODE)
    with daemon, connected(daemon) as stub:
        for number in range(pairs):
            prepare(stub, f"old-{number}")
    fill(daemon.root, 4_000, 10)
    lists = with_child = 0
    with daemon, connected(daemon) as writer, connected(daemon) as reader:
        done = threading.Event()

        def write() -> None:
            try:
                for number in range(pairs):
                    commit(writer, f"parent-{number}", f"old-{number}")
                    prepare(writer, f"child-{number}", f"parent-{number}")
                    writer.Remove(pb.RemoveSnapshotRequest(key=f"child-{number}"))
                    writer.Remove(pb.RemoveSnapshotRequest(key=f"parent-{number}"))
            finally:
                done.set()

        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(write)
            while not done.is_set():
                infos = [info for message in reader.List(pb.ListSnapshotsRequest()) for info in message.info]
                listed = {info.name for info in infos}
                assert len(listed) == len(infos)
                assert {info.parent for info in infos if info.parent} <= listed
                lists += 1
                with_child += any(info.parent for info in infos)
            writing.result()
    assert lists > 3


def test_a_list_takes_no_memory_for_what_it_lists(base: Path) -> None:
    """20,000 snapshots, an answer of 60 MB; pages of the map are the kernel's cache and do not count."""
    daemon = Daemon(base / "root", base / "s.sock", log=base / "log", arguments=CLIENT_MODE)
    fill(daemon.root, 200, 3000)
    with daemon, connected(daemon) as stub:
        names(stub)
        daemon.stop()
        fill_more = ((f"more-{n}", "", {"label": "v" * 3000}) for n in range(20_000))
        store_views(daemon.root, fill_more)
        daemon.start()
    with daemon, connected(daemon) as stub, ThreadPoolExecutor(1) as pool:
        next(iter(stub.List(pb.ListSnapshotsRequest(filters=["name==filler-1"]))))
        before = highest = status_kib(daemon.pid, "RssAnon")
        listing = pool.submit(names, stub)
        while not listing.done():
            highest = max(highest, status_kib(daemon.pid, "RssAnon"))
        assert len(listing.result()) == 20_200
    assert highest - before < 24 * 1024, f"from {before} to {highest} KiB"


# -- nobody waits for somebody else -----------------------------------------------------------------

READERS, COMMITS = 64, 16


@contextmanager
def stalled_lists(daemon: Daemon) -> Iterator[list[StalledCall]]:
    """Clients that began to read a List and stopped; the server cannot send to any of them."""
    with ExitStack() as stack:
        calls = [stack.enter_context(StalledCall(daemon.address, f"/{SERVICE}/List")) for _ in range(READERS)]
        for call in calls:
            call.stall()
        yield calls


def reader_slots_in_use(daemon: Daemon) -> int:
    """Read transactions that are open in the metadata, as LMDB's lock file, which has no path, shows to us."""
    descriptors = Path(f"/proc/{daemon.pid}/fd").iterdir()
    lock = next(path for path in descriptors if os.readlink(path).endswith("lock.mdb"))
    with tempfile.TemporaryDirectory() as place:
        Path(place, "lock.mdb").symlink_to(lock)
        Path(place, "data.mdb").symlink_to(daemon.root / "metadata/data.mdb")
        with lmdb.open(place, readonly=True, lib_version=0) as environment:
            lines = environment.readers().splitlines()[1:]
    return sum(line.split()[-1] != "-" for line in lines)


def commit_and_clean(stub: Any, turn: int) -> None:
    for number in range(COMMITS):
        tree = prepare(stub, f"{turn}-{number}")
        (tree / "file").write_bytes(os.urandom(10_000))
    prepare(stub, f"{turn}-removed")
    stub.Remove(pb.RemoveSnapshotRequest(key=f"{turn}-removed"))
    pending = [
        stub.Commit.future(pb.CommitSnapshotRequest(name=f"{turn}-layer-{n}", key=f"{turn}-{n}"))
        for n in range(COMMITS)
    ]
    pending += [stub.Cleanup.future(pb.CleanupRequest()) for _ in range(COMMITS)]
    for answer in pending:
        answer.result()


def test_readers_that_stopped_hold_no_thread_and_no_view(base: Path) -> None:
    daemon = Daemon(base / "root", base / "s.sock", log=base / "log", arguments=CLIENT_MODE)
    fill(daemon.root, 400, 2_000)
    with daemon, connected(daemon) as stub:
        with stalled_lists(daemon) as calls:  # the same load, once, with readers that go on
            for call in calls:
                call.resume()
        commit_and_clean(stub, 1)
        before = status_kib(daemon.pid, "Threads")
        with stalled_lists(daemon) as calls:
            assert reader_slots_in_use(daemon) == 0
            commit_and_clean(stub, 2)
            for number in range(200):
                stub.Stat(pb.StatSnapshotRequest(key=f"filler-{number}"))
            assert status_kib(daemon.pid, "Threads") < before + READERS // 4
            messages = [pb.ListSnapshotsResponse.FromString(raw) for raw in calls[0].resume()]
            listed = {info.name for message in messages for info in message.info}
            assert listed == {f"filler-{n}" for n in range(400)} | {f"1-layer-{n}" for n in range(COMMITS)}


def test_no_call_waits_for_a_reader_a_commit_or_a_deletion(base: Path) -> None:
    """64 readers have stopped, 16 commits and a deletion hang for ever, 16 Cleanups wait for it."""
    environment = {"DEDUP_FAILPOINTS": "commit.before-transaction=stall:600;delete.entry=stall:600"}
    daemon = Daemon(base / "root", base / "s.sock", log=base / "log", arguments=CLIENT_MODE)
    fill(daemon.root, 400, 2_000)
    with daemon, connected(daemon) as stub:
        prepare(stub, "tmp")
        commit(stub, "base", "tmp")
    daemon.environment = environment
    with daemon, connected(daemon) as stub, ThreadPoolExecutor(COMMITS) as pool:
        list(pool.map(lambda number: prepare(stub, f"k-{number}", "base"), range(COMMITS)))
        (prepare(stub, "removed") / "file").touch()
        stub.Remove(pb.RemoveSnapshotRequest(key="removed"))
        pending = [stub.Commit.future(pb.CommitSnapshotRequest(name=f"n-{n}", key=f"k-{n}")) for n in range(COMMITS)]
        pending += [stub.Cleanup.future(pb.CleanupRequest()) for _ in range(COMMITS)]
        with stalled_lists(daemon):
            for number in range(20):
                key = f"new-{number}"
                prepare(stub, key, "base")
                stub.View(pb.ViewSnapshotRequest(key="view", parent="base"))
                stub.Remove(pb.RemoveSnapshotRequest(key="view"))
                stub.Mounts(pb.MountsRequest(key=key))
                stub.Stat(pb.StatSnapshotRequest(key="k-0"))
                stub.Usage(pb.UsageRequest(key=key))
                stub.Update(pb.UpdateSnapshotRequest(info=pb.Info(name=key, labels={"a": "b"})))
                assert key in names(stub)
            assert not any(answer.done() for answer in pending)
        daemon.kill()


def test_stat_does_not_wait_for_lists_that_are_being_made(base: Path) -> None:
    """Many Lists of a large store begin at once: 20 Stats are answered before half of them."""
    daemon = Daemon(base / "root", base / "s.sock", log=base / "log", arguments=CLIENT_MODE)
    fill(daemon.root, 10_000, 100)
    with daemon, connected(daemon) as stub, ExitStack() as stack:
        stub.Stat(pb.StatSnapshotRequest(key="filler-0"))
        calls = [stack.enter_context(StalledCall(daemon.address, f"/{SERVICE}/List")) for _ in range(READERS)]
        for number in range(20):
            stub.Stat(pb.StatSnapshotRequest(key=f"filler-{number}"))
        assert sum(call.has_begun() for call in calls) < READERS // 2
        daemon.kill()


# -- ids --------------------------------------------------------------------------------------------


def test_ids_are_never_used_again(daemon: Daemon) -> None:
    """Neither right after the removal of the newest, nor after a restart, nor after a kill."""
    seen: list[int] = []
    for again in (lambda: None, daemon.restart, lambda: daemon.restart(kill=True)):
        with connected(daemon) as stub:
            for kept in (False, True, False):
                tree = prepare(stub, f"k-{len(seen)}")
                seen.append(int(tree.parent.name))
                if not kept:
                    stub.Remove(pb.RemoveSnapshotRequest(key=f"k-{len(seen) - 1}"))
                    stub.Cleanup(pb.CleanupRequest())
        again()
    with connected(daemon) as stub:
        seen.append(int(prepare(stub, "last").parent.name))
    assert seen == sorted(set(seen))


# -- Usage ------------------------------------------------------------------------------------------


def usage(stub: Any, key: str) -> tuple[int, int]:
    reply = stub.Usage(pb.UsageRequest(key=key))
    return reply.size, reply.inodes


def measured(*trees: Path) -> tuple[int, int]:
    listed = subprocess.run(
        ["find", *trees, "-printf", "%D:%i %b\n"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return 512 * sum(int(line.split()[1]) for line in set(listed)), len(set(listed))


def test_usage_counts_upper_and_index_and_each_inode_once(base: Path, daemon: Daemon) -> None:
    """A lower file with two names, written through one of them: with index=on the kernel gives the new
    inode a name in the upper and another in work/index."""
    with connected(daemon) as stub:
        lower = prepare(stub, "lower")
        (lower / "one").write_bytes(b"x" * 10_000)
        (lower / "two").hardlink_to(lower / "one")
        commit(stub, "base", "lower")
        assert usage(stub, "base") == measured(lower)

        reply = stub.Prepare(pb.PrepareSnapshotRequest(key="k", parent="base"))
        upper = Path(options_of(reply.mounts[0])["upperdir"])
        with mounted(base / "merged", reply.mounts[0], "index=on"):
            with (base / "merged" / "one").open("ab") as stream:
                stream.write(b"y" * 10_000)
            (base / "merged" / "new").write_bytes(b"z" * 5_000)
            (base / "merged" / "link").symlink_to("new")
            with (base / "merged" / "sparse").open("wb") as stream:
                stream.truncate(1 << 30)
        index = upper.parent / "work" / "index"
        assert any(os.lstat(entry).st_nlink > 1 for entry in index.iterdir()), "the kernel made no index entry"
        expected = measured(upper, index)
        assert measured(upper)[1] + 1 == expected[1]
        assert usage(stub, "k") == expected


def test_usage_of_a_committed_snapshot_stays_the_same(daemon: Daemon) -> None:
    with connected(daemon) as stub:
        tree = prepare(stub, "k")
        (tree / "file").write_bytes(b"x" * 10_000)
        commit(stub, "layer", "k")
        committed = usage(stub, "layer")
        assert committed == measured(tree)
        (tree / "later").write_bytes(b"y" * 10_000)
        assert usage(stub, "layer") == committed
        daemon.restart()
    with connected(daemon) as stub:
        assert usage(stub, "layer") == committed


def test_usage_is_no_error_while_files_vanish(daemon: Daemon) -> None:
    """Each snapshot is measured for the first time while its files come and go."""
    files = 300
    with connected(daemon) as stub:
        for number in range(10):
            tree = prepare(stub, f"k-{number}")
            with churned(tree, files):
                assert 1 <= usage(stub, f"k-{number}")[1] <= files + 1


@contextmanager
def churned(tree: Path, files: int) -> Iterator[None]:
    paths = [tree / f"file{number}" for number in range(files)]
    done, once = threading.Event(), threading.Event()

    def churn() -> None:
        while not done.is_set():
            for path in paths:
                path.touch()
            once.set()
            for path in paths:
                path.unlink()

    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn)
        assert once.wait(30)
        try:
            yield
        finally:
            done.set()
        churning.result()
