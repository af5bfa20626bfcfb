"""What hangs in the kernel keeps nobody else, and whoever waits for it is told so in time.

Invariants: while the root's filesystem is frozen, calls that read are answered, all others say UNAVAILABLE, and the
daemon stops as far as the kernel lets it. After the thaw what hung is done, once, and nothing is lost. Where one tree
hangs, the others are committed and deleted meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from snapshotter.errors import NotFound, Unavailable
from snapshotter.model import Kind
from tests.rig.daemon import STOP_S, Daemon, wait_until_serving
from tests.rig.filesystem import filesystem, frozen
from tests.rig.host import Host, upper_of

pytestmark = pytest.mark.root

MIB = 1 << 20
HANG = {"hang_s": 1}
CONTENT = os.urandom(20_000)
PADDING = {"label": "v" * 3_000}
CALLS = 40
"""More than there are threads for any kind of call."""


@contextmanager
def host_on(kind: str, base: Path) -> Iterator[tuple[Host, Path]]:
    """A daemon whose root, and nothing else, is on the filesystem at the path."""
    with (
        filesystem(kind, base, 400 * MIB) as place,
        Host(base, root=place / "root", calls=HANG) as host,
    ):
        yield host, place


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def says_unavailable(call: Future[object]) -> str:
    with pytest.raises(Unavailable) as raised:
        call.result(60)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def fill_with_content(tree: Path) -> None:
    (tree / "file").write_bytes(CONTENT)


def all_reads(host: Host) -> None:
    client = host.client
    assert client.stat("base").kind is Kind.COMMITTED
    assert {"base", "running"} <= {info.name for info in client.list()}
    assert client.mounts("running")
    assert client.usage("base").size_bytes > 0
    assert client.info().committed >= 1
    with host.daemon.channel() as channel:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_frozen_root_is_read_and_after_the_thaw_all_is_done_once(base: Path, kind: str) -> None:
    with host_on(kind, base) as (host, place), ThreadPoolExecutor(CALLS + 10) as pool:
        host.unpack("base", fill=fill_with_content)
        for number in range(100):  # a List of more than a few pages
            host.client.view(f"view-{number}", "base", PADDING)
        for number in range(CALLS):
            host.client.prepare(f"removed-{number}")
        (upper_of(host.client.prepare("extract-a layer")) / "file").write_bytes(CONTENT)
        with host.running("running", "base") as merged:
            (merged / "before").write_text("before")
            with frozen(place):
                pending = [
                    pool.submit(host.client.prepare, "new", "base"),
                    pool.submit(host.client.commit, "layer", "extract-a layer"),
                    pool.submit(host.client.update_labels, "base", {"a": "b"}),
                    *(pool.submit(host.client.remove, f"removed-{number}") for number in range(CALLS)),
                ]
                all_reads(host)
                for call in pending:
                    assert "frozen" in says_unavailable(call)
                assert "hang" in says_unavailable(pool.submit(host.client.remove, "removed-0"))
                assert "hang" in says_unavailable(pool.submit(host.client.cleanup))
                all_reads(host)
            again(lambda: host.client.prepare("new", "base"), host)
            again(lambda: host.client.commit("layer", "extract-a layer"), host)
            for number in range(CALLS):
                again(lambda n=number: host.client.remove(f"removed-{n}"), host)  # type: ignore[misc]
            assert (merged / "before").read_text() == "before"
        wait_until(lambda: hung_calls(host) == 0)
        host.client.cleanup()
        names = {info.name for info in host.client.list()}
        assert names == {"base", "layer", "new", "running", *(f"view-{number}" for number in range(100))}
        host.restart()
        with host.viewed("layer") as merged:
            assert (merged / "file").read_bytes() == CONTENT


def again(call: Callable[[], object], host: Host) -> None:
    """Until it is done, or says that it was done."""
    while True:
        try:
            call()
            return
        except Unavailable:
            wait_until(lambda: hung_calls(host) == 0)
        except Exception as error:
            assert isinstance(error, NotFound) or "exists" in str(error)
            return


def hung_calls(host: Host) -> int:
    """That have not ended, as the log tells."""
    text = host.daemon.log_text()
    return text.count("event=call.hangs") - text.count("event=call.goes_on")


def test_a_stop_ends_what_does_not_hang_and_keeps_the_root_for_what_does(base: Path) -> None:
    with host_on("ext4", base) as (host, place), ThreadPoolExecutor(1) as pool:
        host.client.prepare("kept")
        host.client.prepare("removed")
        process = host.daemon.process
        assert process
        with frozen(place):
            says_unavailable(pool.submit(host.client.remove, "removed"))
            began_s = time.monotonic()
            process.signal(signal.SIGTERM)
            wait_until(lambda: state_of(process.pid) == "Z")
            assert time.monotonic() - began_s < STOP_S
            assert not host.daemon.address.exists()
            assert not can_be_locked(host.root / "lock")
            # Its parent is not told before the last thread is gone.
            assert process.poll() is None
        assert process.wait(STOP_S) == 0
        host.daemon.process = None
        host.stop()
        host.start()
        assert {info.name for info in host.client.list()} - {"removed"} == {"kept"}


def test_a_start_that_hangs_says_so_and_goes_on_after_the_thaw(base: Path) -> None:
    with host_on("ext4", base) as (host, place):
        host.client.prepare("kept")
        host.stop()
        with frozen(place):
            process = host.daemon.spawn()
            wait_until(lambda: "daemon.start_hangs" in host.daemon.log_text())
        wait_until_serving(host.daemon.address, process, "the daemon")
        assert [info.name for info in host.client.list()] == ["kept"]


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def can_be_locked(path: Path) -> bool:
    return subprocess.run(["flock", "--nonblock", path, "true"], check=False).returncode == 0


# -- one tree hangs: somebody holds the lock of a directory of objects, for which processes wait like for a disk


@contextmanager
def object_locked(host: Host) -> Iterator[None]:
    """Nothing that has CONTENT is shared or deleted."""
    (found,) = [path for path in (host.root / "objects").glob("*/*") if path.stat().st_size == len(CONTENT)]
    fd = os.open(found.parent, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(fd)


@pytest.fixture
def host(base: Path) -> Iterator[Host]:
    with Host(base, calls=HANG) as running:
        running.unpack("base", fill=fill_with_content)
        yield running


def shards_of_others(tree: Path) -> None:
    (tree / "other").write_bytes(b"another content" * 1000)


def test_a_deletion_that_hangs_does_not_keep_others(host: Host) -> None:
    host.unpack("other", fill=shards_of_others)
    with ThreadPoolExecutor(1) as pool, object_locked(host):
        host.client.remove("base")
        assert "deleting 1." in says_unavailable(pool.submit(host.client.cleanup))
        host.client.remove("other")
        host.client.prepare("active")
        host.client.remove("active")
        assert "deleting 1." in says_unavailable(pool.submit(host.client.cleanup))
        assert len(os.listdir(host.root / "trash")) == 1
        assert host.client.info().pending_deletions == 1
    host.client.cleanup()
    assert os.listdir(host.root / "trash") == []
    assert host.client.info().pending_deletions == 0
    assert not list((host.root / "objects").glob("*/*"))


def test_a_commit_that_hangs_does_not_keep_others(host: Host) -> None:
    with ThreadPoolExecutor(1) as pool:
        with object_locked(host):
            fill_with_content(upper_of(host.client.prepare("extract-hanging")))
            assert "frozen" in says_unavailable(pool.submit(host.client.commit, "hanging", "extract-hanging"))
            assert "another call has" in says_unavailable(pool.submit(host.client.remove, "hanging"))
            assert host.client.stat("extract-hanging").kind is Kind.ACTIVE
            for number in range(20):
                host.unpack(f"other-{number}", fill=shards_of_others)
                host.client.remove(f"other-{number}")
        wait_until(lambda: "call.goes_on" in host.daemon.log_text())
        assert host.client.stat("hanging").kind is Kind.COMMITTED
        with host.viewed("hanging") as merged:
            assert (merged / "file").read_bytes() == CONTENT


def test_long_work_is_not_cut_off(host: Host) -> None:
    """A commit and a deletion that take several times as long as what counts as hung."""
    host.stop()
    host.daemon.environment = {"DEDUP_FAILPOINTS": "share.before-swap=stall:0.2;delete.entry=stall:0.1"}
    host.start()

    def fill(tree: Path) -> None:
        for number in range(16):
            (tree / str(number)).write_bytes(os.urandom(10_000))

    host.unpack("long", fill=fill)
    host.client.remove("long")
    host.client.cleanup()


def test_a_release_that_hangs_does_not_keep_others(base: Path) -> None:
    """One of the threads that let go of detached mounts hangs: the mounts of others go."""
    with Host(base, calls=HANG, environment={"DEDUP_FAILPOINTS": "detach.close=stall:600@1"}) as host:
        for number in range(6):
            host.client.prepare(f"k-{number}")
        before = detached(host.daemon)
        for number in range(6):
            host.client.remove(f"k-{number}")
        wait_until(lambda: detached(host.daemon) == before + 1)


def detached(daemon: Daemon) -> int:
    """How many mounts the daemon holds open (O_PATH, proc_pid_fdinfo(5))."""
    found = 0
    for path in Path(f"/proc/{daemon.pid}/fdinfo").iterdir():
        try:
            found += bool(int(path.read_text().split()[3], 8) & os.O_PATH)
        except FileNotFoundError:
            continue
    return found
