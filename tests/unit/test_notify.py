"""The service manager hears what the daemon says, and cannot hurt it: sd_notify(3) on a real socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from snapshotter import notify
from tests.rig.daemon import Daemon


@contextmanager
def manager(address: Path | str) -> Iterator[socket.socket]:
    """What systemd listens on: a datagram socket, at a path or (bytes that begin with NUL) abstract."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(os.fspath(address))
        receiver.settimeout(10)
        yield receiver


@pytest.fixture(autouse=True)
def no_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "_manager", None)
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_messages_arrive(base: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    path = str(base / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{path}" if abstract else path)
    with manager(f"\0{path}" if abstract else path) as receiver:
        notify.ready("Serving /a on /b")
        notify.status("Sweeping")
        notify.stopping()
        assert [receiver.recv(4096) for _ in range(3)] == [
            b"READY=1\nSTATUS=Serving /a on /b",
            b"STATUS=Sweeping",
            b"STOPPING=1",
        ]


def test_a_status_cannot_forge_a_second_assignment(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(base / "notify"))
    with manager(base / "notify") as receiver:
        notify.status("one\nMAINPID=1")
        assert receiver.recv(4096) == b"STATUS=one MAINPID=1"


def test_children_do_not_inherit_the_socket(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(base / "notify"))
    with manager(base / "notify"):
        notify.ready("")
        child = "import os; print(os.environ.get('NOTIFY_SOCKET'))"
        assert subprocess.check_output([sys.executable, "-c", child]) == b"None\n"


def test_without_a_service_manager_nothing_happens() -> None:
    with capture_logs() as logs:
        notify.ready("Serving")
        notify.stopping()
    assert logs == []


@pytest.mark.parametrize("address", ["/nonexistent/notify", "relative", "@" + "x" * 200, "vsock:2:1234"])
def test_a_bad_socket_is_logged_and_no_more(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with capture_logs() as logs:
        notify.ready("Serving")
    assert [(entry["event"], entry["socket"]) for entry in logs] == [("notify.failed", address)]


def test_a_service_manager_that_does_not_read_is_given_up(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(base / "notify"))
    monkeypatch.setattr(notify, "_SEND_S", 0.01)
    with manager(base / "notify"), capture_logs() as logs:
        while not logs:
            notify.status("still here")
    assert logs[0]["event"] == "notify.failed"


@pytest.mark.root
def test_the_daemon_says_ready_only_when_its_socket_answers(base: Path) -> None:
    with manager(base / "notify") as receiver:
        daemon = Daemon(
            base / "root", base / "s.sock",
            log=base / "daemon.log", environment={"NOTIFY_SOCKET": str(base / "notify")},
        )  # fmt: skip
        daemon.spawn()
        try:
            message = receiver.recv(4096)
            # At this instant, not soon after: what systemd starts next connects at once.
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(base / "s.sock"))
            with daemon.channel() as channel:
                request = health_pb2.HealthCheckRequest()
                reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            assert message.startswith(b"READY=1\nSTATUS=")
            assert str(base / "s.sock").encode() in message
        except BaseException:
            daemon.kill()
            raise
        daemon.stop()
        assert receiver.recv(4096) == b"STOPPING=1"


@pytest.mark.root
def test_a_daemon_that_cannot_serve_never_says_ready(base: Path) -> None:
    (base / "s.sock").write_text("in the way")
    with manager(base / "notify") as receiver:
        daemon = Daemon(
            base / "root", base / "s.sock",
            log=base / "daemon.log", environment={"NOTIFY_SOCKET": str(base / "notify")},
        )  # fmt: skip
        assert daemon.spawn().wait(20) != 0
        receiver.setblocking(False)
        with pytest.raises(BlockingIOError):
            receiver.recv(4096)
