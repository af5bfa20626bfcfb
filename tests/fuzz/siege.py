"""A daemon under attack: what it answers, who else is served meanwhile, and what the attack leaves behind.

with Siege(daemon) as siege:
    siege.withstands(lambda: siege.call("Stat", b"garbage"))
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from snapshotter.api import snapshots_pb2 as pb
from snapshotter.api import snapshots_pb2_grpc
from tests.rig.daemon import Daemon

SERVICE = pb.DESCRIPTOR.services_by_name["Snapshots"].full_name
REQUESTS: dict[str, Any] = {
    method.name: getattr(pb, method.input_type.name) for method in pb.DESCRIPTOR.services_by_name["Snapshots"].methods
}
ANSWERS = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"}
"""What a client may be told that asks for something that cannot be. UNKNOWN and INTERNAL are the daemon's faults."""

_ANSWER_S = 20.0
_SLOWER = 50
_SLOW_S = 3.0
"""How many times longer than the worst in peace a probe may take, and what is in order anyway: another client notices,
and works."""
_SETTLE_S = 10.0
_MEMORY_KIB = 16 * 1024
"""What malloc may keep beside what it kept after the same attack before."""
_FLOOD_KIB = 48 * 1024
"""And what thousands of calls at once leave, in pages that small blocks keep in use: it grows so far and no further."""
_ANY = 1 << 40
_FEW = 8
"""gRPC's threads come and go, and so do worker processes with their sockets; an attack makes dozens of anything."""

_NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_PROBE = "extract-probe"
_OF_ITS_OWN = [("grpc.use_local_subchannel_pool", 1)]
"""Options of a channel that shares no connection."""

_State = dict[str, tuple[int, str, dict[str, str]]]


class Siege:
    """A client that attacks, and one that works; a context manager on a running daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.answers: Counter[str] = Counter()
        self._known: _State = {}
        self._cut_off = 0
        self._options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]

    def __enter__(self) -> Self:
        self._channel = grpc.insecure_channel(f"unix:{self.daemon.address}", options=self._options)
        self._stub: Any = snapshots_pb2_grpc.SnapshotsStub(self._channel)
        self._known = self._listed()
        self._log_at = len(self.daemon.log_text())
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._channel.close()

    def withstands(self, attack: Callable[[], object], *, may_cut_off: bool = False) -> None:
        """Attacks twice: once for what stays allocated for good, and once to see that no more does.

        With `may_cut_off`, calls of others may end with UNAVAILABLE or CANCELLED on the way, and they connect again.
        """
        pid = self.daemon.pid
        peace = self._probe_durations()
        calm = _resources(pid)
        attack()
        self._settled({**calm, "memory_kib": _ANY})
        before = _resources(pid)
        if may_cut_off:
            before["memory_kib"] += _FLOOD_KIB
        with self._probing() as war:
            attack()
        self._settled(before)
        assert self.daemon.process and self.daemon.process.poll() is None and self.daemon.pid == pid
        assert may_cut_off or not self._cut_off, "others were cut off"
        assert may_cut_off or max(war) < max(_SLOWER * max(peace), _SLOW_S), f"{max(peace)} s, then {max(war)} s"
        assert self._listed() == self._known, "the metadata is not what was answered"
        assert may_cut_off or "Traceback" not in self.daemon.log_text()[self._log_at :]

    def call(self, method: str, raw: bytes, *, compression: Any = None) -> str:
        """Sends bytes as a request. The name of the status, which must be one that fits; what succeeded is what List
        has to show in the end."""
        path = f"/{SERVICE}/{method}"
        try:
            if method == "List":
                reply = b"".join(self._channel.unary_stream(path)(raw, timeout=_ANSWER_S, compression=compression))
            else:
                reply = self._channel.unary_unary(path)(raw, timeout=_ANSWER_S, compression=compression)
        except grpc.RpcError as error:
            status: str = error.code().name  # type: ignore[attr-defined]
            assert status in ANSWERS, (status, method, raw[:1000], error.details())  # type: ignore[attr-defined]
        else:
            status = "OK"
            self._note(method, REQUESTS[method].FromString(raw), reply)
        self.answers[status] += 1
        return status

    def clear(self) -> None:
        """Removes all snapshots, through the front door."""
        while self._known:
            parents = {parent for _, parent, _ in self._known.values()}
            for name in [name for name in self._known if name not in parents]:
                assert self.call("Remove", pb.RemoveSnapshotRequest(key=name).SerializeToString()) == "OK"

    def _note(self, method: str, request: Any, reply: bytes) -> None:
        if method in ("Prepare", "View"):
            kind = pb.ACTIVE if method == "Prepare" else pb.VIEW
            self._known[request.key] = (kind, request.parent, _stored(request.labels))
        elif method == "Commit":
            _, parent, _ = self._known.pop(request.key)
            self._known[request.name] = (pb.COMMITTED, parent or request.parent, _stored(request.labels))
        elif method == "Remove":
            del self._known[request.key]
        elif method == "Update":
            info = pb.UpdateSnapshotResponse.FromString(reply).info
            kind, parent, _ = self._known[info.name]
            self._known[info.name] = (kind, parent, dict(info.labels))

    def _listed(self) -> _State:
        """Asks again where no answer came: an attack that cuts others off does so for a moment longer."""
        deadline = time.monotonic() + _ANSWER_S
        while True:
            try:
                messages = list(self._stub.List(pb.ListSnapshotsRequest(), timeout=_ANSWER_S, wait_for_ready=True))
            except grpc.RpcError as error:
                if error.code() not in _NO_ANSWER or time.monotonic() > deadline:  # type: ignore[attr-defined]
                    raise
            else:
                return {info.name: (info.kind, info.parent, dict(info.labels)) for m in messages for info in m.info}

    # -- the others

    def _probe_durations(self) -> list[float]:
        with self._probing() as durations:
            while len(durations) < 20:
                time.sleep(0.001)
        return durations

    @contextmanager
    def _probing(self) -> Iterator[list[float]]:
        """Another client makes calls that must succeed, until the block ends; how long each took."""
        durations: list[float] = []
        failures: list[Exception] = []
        done = threading.Event()

        def probe() -> None:
            try:
                with grpc.insecure_channel(f"unix:{self.daemon.address}", options=_OF_ITS_OWN) as channel:
                    stub: Any = snapshots_pb2_grpc.SnapshotsStub(channel)
                    while not done.is_set() or not durations:
                        began_s = time.monotonic()
                        if self._probe(stub):
                            durations.append(time.monotonic() - began_s)
                        else:
                            self._cut_off += 1
                        done.wait(0.01)
            except Exception as error:
                failures.append(error)

        prober = threading.Thread(target=probe)
        prober.start()
        try:
            yield durations
        finally:
            done.set()
            prober.join()
        if failures:
            raise failures[0]

    @staticmethod
    def _probe(stub: Any) -> bool:
        """Calls that must succeed; False where an answer did not come."""
        keywords: Any = {"timeout": _ANSWER_S, "wait_for_ready": True}
        try:
            stub.Prepare(pb.PrepareSnapshotRequest(key=_PROBE), **keywords)
            stub.Stat(pb.StatSnapshotRequest(key=_PROBE), **keywords)
            stub.Remove(pb.RemoveSnapshotRequest(key=_PROBE), **keywords)
        except grpc.RpcError as error:
            if error.code() not in _NO_ANSWER:  # type: ignore[attr-defined]
                raise
            with contextlib.suppress(grpc.RpcError):
                stub.Remove(pb.RemoveSnapshotRequest(key=_PROBE), **keywords)
            return False
        return True

    # -- what is left

    def _settled(self, before: dict[str, int]) -> None:
        """Waits until what the attack took is given back."""
        deadline = time.monotonic() + _SETTLE_S
        while True:
            now = _resources(self.daemon.pid)
            if (
                now["descriptors"] <= before["descriptors"] + _FEW
                and now["threads"] <= before["threads"] + _FEW
                and now["memory_kib"] <= before["memory_kib"] + _MEMORY_KIB
            ):
                return
            assert time.monotonic() < deadline, f"from {before} to {now}"
            time.sleep(0.05)


def _stored(labels: Any) -> dict[str, str]:
    return {key: value for key, value in labels.items() if value}


def _resources(pid: int) -> dict[str, int]:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "memory_kib": int(lines["RssAnon"].split()[0]),
        "threads": int(lines["Threads"]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
    }
