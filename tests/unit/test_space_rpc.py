"""Space and Collect on the wire: what the engine says is what a client gets, whatever its size.

Invariants: every number arrives as it was; the first message has the store, no other has more than 100
snapshots, and each fits what clients take; a call waits for another one, and an error is its status.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.api import admin_pb2, admin_pb2_grpc
from snapshotter.calls import Pools
from snapshotter.claims import Busy
from snapshotter.client import MAX_MESSAGE_BYTES, Client
from snapshotter.errors import Internal, ResourceExhausted
from snapshotter.model import MAX_KEY_BYTES, Extent, Freed, Kind, SnapshotSpace, Space
from snapshotter.service import SPACE_SNAPSHOTS, AdminService

NUMBERS = st.integers(0, (1 << 63) - 1)
EXTENTS = st.builds(Extent, NUMBERS, NUMBERS)
REASONS = st.dictionaries(st.text(), NUMBERS, max_size=3)
TIMES = st.integers(0, 10**19)
SNAPSHOTS = st.builds(
    SnapshotSpace,
    name=st.text(), kind=st.sampled_from(Kind), strategy=st.sampled_from(["stub", "hardlink", "off", ""]),
    apparent_bytes=NUMBERS, allocated=EXTENTS, shared=EXTENTS, exclusive=EXTENTS, private=REASONS,
)  # fmt: skip
SPACES = st.builds(
    Space,
    as_of_ns=TIMES, took_ns=TIMES, snapshots=st.lists(SNAPSHOTS, max_size=3).map(tuple),
    apparent_bytes=NUMBERS, allocated=EXTENTS, unshared=EXTENTS, objects=EXTENTS,
    filesystem_inodes=NUMBERS, filesystem_inodes_free=NUMBERS, filesystem_bytes=NUMBERS,
    filesystem_bytes_free=NUMBERS, private=REASONS,
)  # fmt: skip


class Engine:
    """Says what it is told to: values, or errors to be raised before them."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.asked: list[bool] = []
        self.has_been_asked = threading.Event()

    def space(self, now: bool) -> Any:
        return self._answer(now)

    def collect(self, dry_run: bool) -> Any:
        return self._answer(dry_run)

    def _answer(self, asked: bool) -> Any:
        self.asked.append(asked)
        self.has_been_asked.set()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Path]]:
    """The Admin service on an engine of this test, and its socket."""
    engine, pools, address = Engine(), Pools(), tmp_path_factory.mktemp("s") / "s.sock"
    with serving(AdminService(engine, pools, address.parent, address), address):  # type: ignore[arg-type]
        yield engine, address
    pools.close()


@pytest.fixture
def engine(served: tuple[Engine, Path]) -> Engine:
    served[0].answers.clear()
    served[0].asked.clear()
    served[0].has_been_asked.clear()
    return served[0]


@pytest.fixture(scope="module")
def client(served: tuple[Engine, Path]) -> Iterator[Client]:
    with Client(str(served[1])) as client:
        yield client


@contextmanager
def serving(service: AdminService, address: Path) -> Iterator[None]:
    """Serves on a loop in a thread."""
    ready, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        server = grpc.aio.server()
        admin_pb2_grpc.add_AdminServicer_to_server(service, server)
        server.add_insecure_port(f"unix:{address}")
        await server.start()
        ready.set()
        await stop.wait()
        await server.stop(None)

    thread = threading.Thread(target=loop.run_until_complete, args=[serve()])
    thread.start()
    assert ready.wait(60)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


@given(SPACES)
def test_every_number_arrives(served: tuple[Engine, Path], client: Client, space: Space) -> None:
    served[0].answers = [space]
    assert client.space() == space


def test_what_was_asked_arrives(engine: Engine, client: Client) -> None:
    engine.answers = [many(0), many(0), Freed(Extent(1, 2), 3), Freed(Extent(4, 5), 6)]
    client.space(now=True)
    client.space()
    assert client.collect(dry_run=True) == Freed(Extent(1, 2), 3)
    assert client.collect() == Freed(Extent(4, 5), 6)
    assert engine.asked == [True, False, True, False]


@pytest.mark.parametrize("count", [0, 1, SPACE_SNAPSHOTS, SPACE_SNAPSHOTS + 1, 3 * SPACE_SNAPSHOTS])
def test_the_store_comes_first_and_then_bounded_messages(served: tuple[Engine, Path], count: int) -> None:
    engine, address = served
    space = many(count, key_bytes=MAX_KEY_BYTES)
    engine.answers = [space]
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    with grpc.insecure_channel(f"unix:{address}", options=options) as channel:
        first, *rest = admin_pb2_grpc.AdminStub(channel).Space(admin_pb2.SpaceRequest())
    assert first.HasField("store")
    assert len(first.snapshots) == 0
    assert not any(message.HasField("store") for message in rest)
    assert all(1 <= len(message.snapshots) <= SPACE_SNAPSHOTS for message in rest)
    names = [each.name for message in rest for each in message.snapshots]
    assert names == [each.name for each in space.snapshots]


@pytest.mark.parametrize("call", [Client.space, Client.collect])
def test_an_error_is_its_status(engine: Engine, client: Client, call: Callable[[Client], Any]) -> None:
    engine.answers = [ResourceExhausted("no space left for it"), ValueError("a secret")]
    with pytest.raises(ResourceExhausted, match="no space left for it"):
        call(client)
    with pytest.raises(Exception, match=r"failed inside the snapshotter \(ValueError\)") as raised:
        call(client)
    assert "secret" not in str(raised.value)


def test_a_number_that_cannot_be_sent_is_a_fault_of_the_daemon(engine: Engine, client: Client) -> None:
    engine.answers = [dataclasses.replace(many(0), objects=Extent(-1, 0)), Freed(Extent(-1, 0), 0)]
    for call in (client.space, client.collect):
        with pytest.raises(Internal, match="failed inside the snapshotter"):
            call()


@pytest.mark.parametrize("call", [Client.space, Client.collect])
def test_a_call_waits_for_another_one(engine: Engine, client: Client, call: Callable[[Client], Any]) -> None:
    released: Future[None] = Future()
    answer = many(1) if call is Client.space else Freed(Extent(1, 1), 0)
    engine.answers = [Busy(released, holder=0), answer]
    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(call, client)
        assert engine.has_been_asked.wait(60)
        assert not calling.done()
        released.set_result(None)
        assert calling.result(60) == answer
    assert len(engine.asked) == 2


def many(count: int, key_bytes: int = 10) -> Space:
    nothing = Extent(0, 0)
    names = (f"{number:0{key_bytes}}" for number in range(count))
    return Space(
        as_of_ns=0, took_ns=0, apparent_bytes=0, allocated=nothing, unshared=nothing, objects=nothing,
        snapshots=tuple(SnapshotSpace(n, Kind.COMMITTED, "off", 0, nothing, nothing, nothing, {}) for n in names),
        filesystem_inodes=0, filesystem_inodes_free=0, filesystem_bytes=0, filesystem_bytes_free=0, private={},
    )  # fmt: skip
