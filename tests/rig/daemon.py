"""Runs the daemon as a process of its own on a root and a socket.

In short:

    with Daemon(directory / "root", directory / "s.sock", log=directory / "daemon.log") as daemon:
        with daemon.channel() as channel:
            SnapshotsStub(channel).Prepare(...)
        daemon.kill()
        daemon.start()
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.rig.namespace import CHECKOUT, Namespace, Process, RigError

CLIENT_MODE = ("--mount-mode", "client")
"""For tests of what clients are told to mount, or that write into a snapshot's own directory."""
STOP_S = 5
"""The daemon promises to exit this soon after SIGTERM."""
_START_S = 20
_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.max_receive_message_length", 16 << 20),
    # One connection for each channel, so that closing it means what it says.
    ("grpc.use_local_subchannel_pool", 1),
]


class Daemon:
    """The daemon, started by __enter__ and stopped by __exit__, which raises RigError where it does not exit
    with 0 in time. It may be stopped, killed and started again in between."""

    def __init__(
        self,
        root: Path,
        address: Path,
        *,
        log: Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        namespace: Namespace | None = None,
    ) -> None:
        """Sets down the command line; `arguments` are added to it. `log` collects what all runs write."""
        self.root, self.address, self.log = root, address, log
        self.arguments = list(arguments)
        self.environment = dict(environment or {})
        self.wrapper: list[str] = []
        """A program that runs it, and stays out of the way of its signals: `strace -D`, say."""
        self._namespace = namespace
        self.process: Process | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc is None:
            self.stop()
        else:
            self.kill()

    def command(self) -> list[str]:
        """The command line, without a namespace."""
        return [
            *self.wrapper,
            sys.executable, "-m", "snapshotter.server",
            "--root", os.fspath(self.root), "--address", os.fspath(self.address), *self.arguments,
        ]  # fmt: skip

    def spawn(self) -> Process:
        """Starts the process and does not wait for it to serve."""
        env = {**self.environment, "PYTHONPATH": os.fspath(CHECKOUT)}
        if self._namespace:
            self.process = self._namespace.popen(self.command(), log=self.log, env=env)
        else:
            self.process = Process(self.command(), log=self.log, env=env)
        return self.process

    def start(self) -> None:
        """Starts the process and waits until it serves. Raises RigError when it exits instead."""
        wait_until_serving(self.address, self.spawn(), "the daemon")

    @property
    def pid(self) -> int:
        """Of the running daemon, as the host sees it."""
        assert self.process
        return self.process.pid

    def stop(self) -> None:
        """SIGTERM. Raises RigError unless it exits with 0 within STOP_S. Nothing when it is not running."""
        process, self.process = self.process, None
        if process is None:
            return
        process.signal(signal.SIGTERM)
        try:
            status = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.signal(signal.SIGKILL)
            process.wait(STOP_S)
            raise RigError(f"the daemon runs {STOP_S} s after SIGTERM", process.log_tail()) from None
        if status != 0:
            raise RigError(f"the daemon exited with {status} after SIGTERM", process.log_tail())

    def kill(self) -> None:
        """SIGKILL, and waits for the end. Nothing when it is not running."""
        process, self.process = self.process, None
        if process is not None:
            process.signal(signal.SIGKILL)
            process.wait(STOP_S)

    def restart(self, *, kill: bool = False) -> None:
        """Stops (or kills) it and starts it again."""
        if kill:
            self.kill()
        else:
            self.stop()
        self.start()

    def log_text(self) -> str:
        """All that it wrote to stdout and stderr, in every run."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def channel(self) -> grpc.Channel:
        """A new connection; a context manager. The caller makes its stub."""
        return channel(self.address)


def channel(address: Path) -> grpc.Channel:
    """A new channel to a unix socket."""
    return grpc.insecure_channel(f"unix:{address}", options=_CHANNEL_OPTIONS)


def wait_until_serving(address: Path, process: Process, who: str) -> None:
    """Until gRPC health at `address` says SERVING. Raises RigError when `process` ends or takes too long."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if (status := process.poll()) is not None:
            raise RigError(f"{who} exited with {status} at its start", process.log_tail())
        if _accepts(address) and _is_serving(address):
            return
        time.sleep(0.01)
    raise RigError(f"{who} does not serve at {address} after {_START_S} s", process.log_tail())


def _accepts(address: Path) -> bool:
    """Asked first, with a bare connect: a channel that once failed to connect waits before it tries again."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(os.fspath(address))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


def _is_serving(address: Path) -> bool:
    with channel(address) as connection:
        try:
            reply = health_pb2_grpc.HealthStub(connection).Check(health_pb2.HealthCheckRequest(), timeout=2)
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
