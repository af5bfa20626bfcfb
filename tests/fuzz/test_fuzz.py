"""Clients that send anything at all, over the wire.

The daemon lives; it answers with a status that fits; another client is served meanwhile; nothing changes but what was
answered with OK; and memory, threads and descriptors are afterwards what they were before.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from snapshotter.api import snapshots_pb2 as pb
from tests.fuzz.hostile import CUT_OFF, REQUESTS, WIRES
from tests.fuzz.mutations import corpus, corpus_file, mutate
from tests.fuzz.siege import SERVICE, Siege
from tests.rig.daemon import Daemon
from tests.rig.http2 import StalledCall
from tests.rig.roots import tear_down

pytestmark = pytest.mark.root

INPUTS, NIGHTLY_INPUTS = 400, 20_000
CONNECTIONS = 1000


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    """One for all tests here, each of which leaves it as it was."""
    base = Path(tempfile.mkdtemp(prefix="dds-", dir="/var/tmp"))
    with Daemon(base / "root", base / "s.sock", log=base / "log") as daemon:
        yield daemon
    tear_down(base)


@pytest.fixture
def siege(running: Daemon) -> Iterator[Siege]:
    with Siege(running) as siege:
        yield siege
        siege.clear()


def send(address: Path, raw: bytes, *, read: bool = False) -> None:
    """On a connection of its own, which then goes away; the server may hang up, or stop reading, before."""
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
        connection.settimeout(0.5)
        connection.connect(os.fspath(address))
        connection.sendall(raw)
        if read:
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass


# -- at random --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [INPUTS, pytest.param(NIGHTLY_INPUTS, marks=pytest.mark.nightly)])
def test_messages_that_are_nearly_right(siege: Siege, inputs: int) -> None:
    seeds = [seed for seed in corpus() if seed.method != "wire"]
    raws = [seed.raw for seed in seeds]
    numbers = iter(range(1 << 30))

    def attack() -> None:
        chance = random.Random(next(numbers))
        for _ in range(inputs // 2):
            seed = chance.choice(seeds)
            # Often a request of another method: all have strings and maps at the same places.
            method = seed.method if chance.random() < 0.8 else chance.choice(seeds).method
            siege.call(method, mutate(chance, seed.raw, raws))
        siege.clear()

    siege.withstands(attack)
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= set(siege.answers), siege.answers


@pytest.mark.parametrize("inputs", [INPUTS, pytest.param(NIGHTLY_INPUTS, marks=pytest.mark.nightly)])
def test_bytes_that_are_nearly_http2(siege: Siege, inputs: int) -> None:
    raws = [seed.raw for seed in corpus() if seed.method == "wire"]
    numbers = iter(range(1 << 30))

    def attack() -> None:
        chance = random.Random(next(numbers))
        for _ in range(inputs // 2):
            raw = mutate(chance, chance.choice(raws), raws) if chance.random() < 0.8 else chance.randbytes(200)
            send(siege.daemon.address, raw)

    siege.withstands(attack, may_cut_off=True)  # as the next test does


def test_a_path_that_is_not_utf_8(siege: Siege) -> None:
    """It ends gRPC's server, of which there is another at once."""
    path = f"/{SERVICE}/Stat".encode()
    raw = corpus_file("wire-call").replace(path, path[:5] + b"\x80" + path[6:])

    def attack() -> None:
        for _ in range(5):
            send(siege.daemon.address, raw, read=True)

    siege.withstands(attack, may_cut_off=True)
    assert "server.broken" in siege.daemon.log_text()


# -- on purpose -------------------------------------------------------------------------------------


def test_hostile_requests(siege: Siege) -> None:
    raws = {name: make() for name, (_, make, _) in REQUESTS.items()}

    def attack() -> None:
        for name, (method, _, expected) in REQUESTS.items():
            for key in ("k", "l"):
                siege.call("Prepare", pb.PrepareSnapshotRequest(key=key).SerializeToString())
            assert siege.call(method, raws[name]) == expected, name
            siege.clear()

    siege.withstands(attack)


@pytest.mark.parametrize("cut_off", [False, True], ids=["", "that cut others off"])
def test_hostile_connections(siege: Siege, cut_off: bool) -> None:
    raws = [make() for name, make in WIRES.items() if (name in CUT_OFF) == cut_off]

    def attack() -> None:
        for raw in raws:
            send(siege.daemon.address, raw, read=True)

    siege.withstands(attack, may_cut_off=cut_off)


def test_refused_requests_are_not_kept(siege: Siege) -> None:
    """In an error's traceback, say, until the garbage collector comes by."""
    method, make, expected = REQUESTS["a key of 15 MB"]
    raw = make()
    counts = iter((1, 20))

    def attack() -> None:
        for _ in range(next(counts)):
            assert siege.call(method, raw) == expected

    siege.withstands(attack)


def test_compressed_bombs(siege: Siege) -> None:
    """64 KB that become 64 MB."""
    raw = bytes(64 << 20)
    siege.withstands(lambda: siege.call("Stat", raw, compression=grpc.Compression.Gzip))
    assert set(siege.answers) == {"RESOURCE_EXHAUSTED"}


def test_an_unknown_method_or_service(siege: Siege) -> None:
    for path in (f"/{SERVICE}/Walk", "/no.such/Stat", f"/{SERVICE}/", "/../../etc/passwd"):
        with siege.daemon.channel() as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(path)(b"\xff", timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "method",
    [
        "grpc.health.v1.Health/Check",
        "grpc.health.v1.Health/Watch",
        "dedup_snapshotter.admin.v1.Admin/Space",
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_garbage_for_other_services(siege: Siege, method: str) -> None:
    with siege.daemon.channel() as channel:
        for make, request in ((channel.unary_unary, b"\xff"), (channel.stream_stream, iter([b"\xff"]))):
            with pytest.raises(grpc.RpcError) as caught:
                answer = make(f"/{method}")(request, timeout=20)
                list(answer)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


# -- many, and gone ---------------------------------------------------------------------------------


def test_a_thousand_connections(siege: Siege) -> None:
    """All open at once; half of them are silent, the others served."""
    call = corpus_file("wire-call")

    def attack() -> None:
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(CONNECTIONS)]
            for connection in connections:
                connection.settimeout(20)
                connection.connect(os.fspath(siege.daemon.address))
            for connection in connections[::2]:
                connection.sendall(call)
            for connection in connections[::2]:
                assert connection.recv(1 << 16)

    siege.withstands(attack)


def test_clients_that_vanish(siege: Siege) -> None:
    """Before, during and after each call: it happened, or it did not."""

    def attack() -> None:
        for number in range(60):
            siege.call("Prepare", pb.PrepareSnapshotRequest(key=f"k{number}").SerializeToString())
            with siege.daemon.channel() as channel:
                pending = channel.unary_unary(f"/{SERVICE}/Usage").future(
                    pb.UsageRequest(key=f"k{number}").SerializeToString()
                )
                if number % 3:
                    pending.cancel()
        siege.clear()

    siege.withstands(attack)


def test_readers_that_stop_and_vanish(siege: Siege) -> None:
    def attack() -> None:
        with contextlib.ExitStack() as stack:
            calls = [stack.enter_context(StalledCall(siege.daemon.address, f"/{SERVICE}/List")) for _ in range(60)]
            for call in calls:
                call.has_begun()

    siege.withstands(attack)
