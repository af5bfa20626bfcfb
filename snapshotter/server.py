"""The daemon's life: configure, claim the root and the socket, serve, stop within five seconds."""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from snapshotter import __version__, linux, listener, logs, notify
from snapshotter.api import admin_pb2, admin_pb2_grpc, snapshots_pb2, snapshots_pb2_grpc
from snapshotter.calls import Pools
from snapshotter.config import DEFAULT_PATH, LOG_LEVELS, MOUNT_MODES, Config, load
from snapshotter.engine import Engine
from snapshotter.errors import PermissionDenied, SnapshotterError
from snapshotter.port import Port
from snapshotter.progress import reported
from snapshotter.requests import MESSAGE_BYTES, Requests
from snapshotter.root import Root, claim
from snapshotter.service import AdminService, SnapshotsService

log = structlog.get_logger()

_CALLS = 10_000
"""Most calls at a time, each of which takes memory; more are refused (RESOURCE_EXHAUSTED)."""
_CALLS_S = 2.0
"""How long running calls may take to end after SIGTERM; what remains of five seconds is for closing."""
_THREADS_S = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        config = load(
            arguments.config,
            {
                "root": arguments.root,
                "address": arguments.address,
                "mount.mode": arguments.mount_mode,
                "log.level": arguments.log_level,
            },
        )
        logs.configure(config.log)
        return _run(config)
    except SnapshotterError as error:
        print(f"containerd-dedup-grpc: {error}", file=sys.stderr)
        return error.exit_status


def _parser() -> argparse.ArgumentParser:
    defaults = Config()
    parser = argparse.ArgumentParser(
        prog="containerd-dedup-grpc",
        description="A containerd proxy snapshotter that stores every distinct file once.",
    )
    parser.add_argument("--root", metavar="DIR", help=f"where the snapshots are kept (default {defaults.root})")
    parser.add_argument("--address", metavar="SOCKET", help=f"unix socket to serve (default {defaults.address})")
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help=f"configuration file (default {DEFAULT_PATH}, if it exists)",
    )
    parser.add_argument("--log-level", metavar="LEVEL", help=f"{', '.join(LOG_LEVELS)} (default {defaults.log.level})")
    parser.add_argument(
        "--mount-mode", metavar="MODE", help=f"who mounts: {' or '.join(MOUNT_MODES)} (default {defaults.mount.mode})"
    )
    parser.add_argument("--version", action="version", version=f"containerd-dedup-grpc {__version__}")
    return parser


def _run(config: Config) -> int:
    if os.geteuid() != 0:
        raise PermissionDenied("must run as root: overlay mounts and trusted.* attributes need it")
    address = listener.parse(config.address)
    os.umask(0o022)  # whatever the starter's is
    _raise_descriptor_limit()
    linux.give_back_large_blocks()
    hang_s = config.calls.hang_s
    with reported(hang_s, lambda kernel: _start_hangs(config.root, kernel)):
        root, lock = claim(Path(config.root))
    try:
        with listener.claimed(address):
            with reported(hang_s, lambda kernel: _start_hangs(config.root, kernel)):
                engine = Engine(
                    root,
                    config.mount,
                    config.overlay,
                    config.dedup,
                    config.durability,
                    [lock.fileno()],
                    config.untrusted_attributes,
                    hang_s,
                )
            try:
                asyncio.run(_serve(engine, root, address, hang_s))
            finally:
                engine.close(_THREADS_S)
        log.info("daemon.stopped", root=str(root.path))
        _end_without_waiting()
    finally:
        lock.release()
    return 0


def _start_hangs(root: str, kernel: str) -> None:
    """No process that hangs in the kernel can give up: it goes on, or ends, when the kernel lets it go."""
    hint = "thaw its file system (fsfreeze -u), or mend its disk: the start then goes on"
    log.error("daemon.start_hangs", root=root, kernel=kernel, hint=hint)


async def _serve(engine: Engine, root: Root, address: Path, hang_s: float) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    pools = Pools(hang_s)
    port = Port(address, lambda: _make_server(engine, pools, root, address))
    await port.open()
    log.info("daemon.started", version=__version__, pid=os.getpid(), root=str(root.path), address=str(address))
    notify.ready(f"Serving {root.path} on {address}")
    await port.serve_until(stopping)
    notify.stopping()
    log.info("daemon.stopping")
    # Before the server stops: a client that meets a dying listener backs off for seconds, one that finds
    # no socket tries again at once (containerd's dialer; gRPC's connection backoff).
    address.unlink(missing_ok=True)
    engine.stop()
    await port.close(_CALLS_S)
    pools.close()


async def _make_server(engine: Engine, pools: Pools, root: Root, address: Path) -> Any:
    server = grpc.aio.server(
        interceptors=[Requests()],
        options=[
            # Also of what a compressed message becomes.
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
        ],
        maximum_concurrent_rpcs=_CALLS,
    )
    snapshots_pb2_grpc.add_SnapshotsServicer_to_server(SnapshotsService(engine, pools, root.spool), server)
    admin_pb2_grpc.add_AdminServicer_to_server(AdminService(engine, pools, root.path, address), server)
    names = [
        snapshots_pb2.DESCRIPTOR.services_by_name["Snapshots"].full_name,
        admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name,
    ]
    checks = health.aio.HealthServicer()
    for name in names:
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection((*names, health_name, reflection.SERVICE_NAME), server)
    return server


def _raise_descriptor_limit() -> None:
    """Walks hold many descriptors, and a thousand clients one each."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _end_without_waiting() -> None:
    """Exits now if a thread hangs in a system call: the interpreter would wait for it for ever.

    Nothing is lost: all that was answered is durable, and the rest is resumed at the next start. The root stays locked
    until the kernel has let the thread go: before that, it may still change something.
    """
    stuck = [t.name for t in threading.enumerate() if t is not threading.current_thread()]
    if stuck:
        log.warning("daemon.threads_left", threads=stuck)
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
