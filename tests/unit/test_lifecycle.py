"""The daemon's start and stop: who may have a root and a socket, and what a signal does.

Invariants: one daemon a root, one a socket; what is not ours is never touched; SIGTERM ends the
process with 0 within five seconds and loses nothing that was answered.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest

from snapshotter import listener
from snapshotter.api import snapshots_pb2, snapshots_pb2_grpc
from snapshotter.errors import FailedPrecondition, InvalidArgument
from tests.rig.daemon import STOP_S, Daemon

pytestmark = pytest.mark.root


def start_refused(daemon: Daemon) -> str:
    """Starts a daemon that must not come up; its one line on stderr."""
    done = subprocess.run(daemon.command(), capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("containerd-dedup-grpc: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def other(base: Path, root: str = "other", address: str = "other.sock") -> Daemon:
    return Daemon(base / root, base / address, log=base / "other.log")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_root_and_socket_are_private(daemon: Daemon) -> None:
    assert mode(daemon.root) == 0o700
    assert mode(daemon.address) == 0o600


def test_socket_is_private_from_the_moment_it_is_bound(base: Path) -> None:
    """Watches the path while the daemon starts: no other mode is ever seen."""
    daemon = Daemon(base / "root", base / "s.sock", log=base / "log")
    seen: set[int] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            try:
                seen.add(mode(daemon.address))
            except FileNotFoundError:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    with daemon:
        done.set()
        watcher.join()
    assert seen == {0o600}


def test_missing_parents_of_the_socket_are_private_and_existing_ones_left_alone(base: Path) -> None:
    (base / "here").mkdir(mode=0o755)
    with Daemon(base / "root", base / "here" / "a" / "b" / "s.sock", log=base / "log"):
        assert mode(base / "here") == 0o755
        assert mode(base / "here" / "a") == mode(base / "here" / "a" / "b") == 0o700


def test_a_second_daemon_on_the_root_names_the_owner(base: Path, daemon: Daemon) -> None:
    line = start_refused(other(base, root="root"))
    assert f"pid {daemon.pid}" in line


def test_a_live_socket_is_refused_and_keeps_working(base: Path, daemon: Daemon) -> None:
    assert "being served" in start_refused(other(base, address="s.sock"))
    with daemon.channel() as channel:
        snapshots_pb2_grpc.SnapshotsStub(channel).Cleanup(snapshots_pb2.CleanupRequest(), timeout=5)


def test_a_live_socket_of_another_program_is_refused(base: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(base / "other.sock"))
        server.listen()
        assert "being served by another process" in start_refused(other(base))
    assert (base / "other.sock").is_socket()


def test_a_stale_socket_is_replaced(daemon: Daemon) -> None:
    daemon.kill()
    assert daemon.address.is_socket()
    daemon.start()


def test_what_is_no_socket_is_left_alone(base: Path) -> None:
    (base / "other.sock").write_text("mine")
    assert "not a socket" in start_refused(other(base))
    assert (base / "other.sock").read_text() == "mine"


def test_two_daemons_that_start_at_once_on_one_socket(base: Path) -> None:
    """The probe alone would let both through."""
    contenders = [other(base, root=f"root{i}") for i in range(4)]
    processes = [subprocess.Popen(c.command(), stderr=subprocess.PIPE, text=True) for c in contenders]
    try:
        deadline = time.monotonic() + 20
        while sum(p.poll() is None for p in processes) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (winner,) = [p for p in processes if p.poll() is None]
        with grpc.insecure_channel(f"unix:{base}/other.sock") as channel:
            stub = snapshots_pb2_grpc.SnapshotsStub(channel)
            stub.Cleanup(snapshots_pb2.CleanupRequest(), timeout=10, wait_for_ready=True)
        winner.terminate()
        assert winner.wait(STOP_S) == 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert not (base / "other.sock").exists()
    assert not (base / "other.sock.lock").exists()


def test_a_socket_path_too_long_is_refused(base: Path) -> None:
    line = start_refused(other(base, address="s" * 100))
    assert "at most 107" in line
    assert not (base / "other").exists(), "nothing is made before the arguments are checked"


def test_the_longest_socket_path_works(base: Path) -> None:
    name = "s" * (107 - len(str(base)) - 1)
    with other(base, address=name):
        assert (base / name).is_socket()


@pytest.mark.parametrize(
    "address", ["s.sock", "", "unix://s.sock", "/tmp/100%.sock", "/tmp/a,b", "/tmp/a?b", "/tmp/a#b"]
)
def test_addresses_that_cannot_be_served(address: str) -> None:
    with pytest.raises(InvalidArgument):
        listener.parse(address)


def test_a_foreign_directory_is_not_taken_for_a_root(base: Path) -> None:
    (base / "other").mkdir(mode=0o755)
    (base / "other" / "precious").touch()
    assert "not empty" in start_refused(other(base))
    assert mode(base / "other") == 0o755
    assert [p.name for p in (base / "other").iterdir()] == ["precious"]


def test_an_empty_filesystem_can_be_a_root(base: Path) -> None:
    (base / "other" / "lost+found").mkdir(parents=True)
    with other(base):
        assert mode(base / "other") == 0o700


@pytest.mark.parametrize("name", ["a,b", "a:b", "a b", "a\\b", "a\nb"])
def test_a_root_that_mount_options_cannot_hold_is_refused(base: Path, name: str) -> None:
    assert "mount options" in start_refused(other(base, root=name))


def test_a_root_of_another_user_is_refused(base: Path) -> None:
    (base / "other").mkdir()
    os.chown(base / "other", 65534, 65534)
    assert "belongs to uid 65534" in start_refused(other(base))


def test_another_user_can_neither_connect_nor_look(daemon: Daemon) -> None:
    program = (
        "import os, socket, sys\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "for act in (lambda: socket.socket(socket.AF_UNIX).connect(sys.argv[1]), lambda: os.listdir(sys.argv[2])):\n"
        "    try: act()\n"
        "    except PermissionError: continue\n"
        "    sys.exit('allowed')\n"
    )
    daemon.address.parent.chmod(0o755)
    subprocess.run([sys.executable, "-c", program, daemon.address, daemon.root], check=True)


def test_not_root_is_one_line(base: Path) -> None:
    base.chmod(0o777)
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *other(base).command()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 8
    assert re.fullmatch(r"containerd-dedup-grpc: must run as root: .*\n", done.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_and_removes_the_socket(daemon: Daemon, number: int) -> None:
    process = daemon.process
    assert process
    process.signal(number)
    assert process.wait(STOP_S) == 0
    daemon.process = None
    assert not daemon.address.exists()


def test_sigterm_cancels_a_commit_before_its_commit_point(base: Path) -> None:
    """A commit that would take longer than a stop may: it is refused, and the snapshot stays active."""
    environment = {"DEDUP_FAILPOINTS": "commit.before-transaction=stall:1"}
    with Daemon(base / "root", base / "s.sock", log=base / "log", environment=environment) as daemon:
        with daemon.channel() as channel:
            stub = snapshots_pb2_grpc.SnapshotsStub(channel)
            stub.Prepare(snapshots_pb2.PrepareSnapshotRequest(key="k"))
            pending = stub.Commit.future(snapshots_pb2.CommitSnapshotRequest(name="n", key="k"))
            time.sleep(0.3)  # the stall is the condition; there is nothing to poll before it ends
            daemon.stop()
            assert pending.code() is grpc.StatusCode.UNAVAILABLE
        daemon.start()
        with daemon.channel() as channel:
            stub = snapshots_pb2_grpc.SnapshotsStub(channel)
            assert stub.Stat(snapshots_pb2.StatSnapshotRequest(key="k")).info.kind == snapshots_pb2.ACTIVE


def test_sigterm_does_not_wait_for_a_thread_that_hangs(base: Path) -> None:
    """A transaction stuck in the kernel, here stalled for a minute, must not keep the process."""
    environment = {"DEDUP_FAILPOINTS": "commit.before-transaction=stall:60"}
    with (
        Daemon(base / "root", base / "s.sock", log=base / "log", environment=environment) as daemon,
        daemon.channel() as channel,
    ):
        stub = snapshots_pb2_grpc.SnapshotsStub(channel)
        stub.Prepare(snapshots_pb2.PrepareSnapshotRequest(key="k"))
        pending = stub.Commit.future(snapshots_pb2.CommitSnapshotRequest(name="n", key="k"))
        time.sleep(0.3)
        daemon.stop()
        assert pending.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def test_sigterm_ends_a_cleanup_that_waits_for_a_long_deletion(base: Path) -> None:
    environment = {"DEDUP_FAILPOINTS": "delete.entry=stall:0.2"}
    with (
        Daemon(base / "root", base / "s.sock", log=base / "log", environment=environment) as daemon,
        daemon.channel() as channel,
    ):
        stub = snapshots_pb2_grpc.SnapshotsStub(channel)
        for number in range(100):
            stub.Prepare(snapshots_pb2.PrepareSnapshotRequest(key=f"extract-{number}"))
            stub.Remove(snapshots_pb2.RemoveSnapshotRequest(key=f"extract-{number}"))
        pending = stub.Cleanup.future(snapshots_pb2.CleanupRequest())
        with pytest.raises(grpc.FutureTimeoutError):
            pending.result(timeout=0.3)
        daemon.stop()
        assert pending.code() is grpc.StatusCode.UNAVAILABLE
        assert "goes on deleting" in pending.details()


def test_the_claim_is_released_when_the_block_fails(base: Path) -> None:
    path = base / "s.sock"
    with pytest.raises(KeyError), listener.claimed(path):
        with pytest.raises(FailedPrecondition), listener.claimed(path):
            pass
        raise KeyError
    with listener.claimed(path):
        pass
