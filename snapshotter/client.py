"""A synchronous client of the daemon: the Snapshots and Admin services on its unix socket.

Every failure is raised as a class of `snapshotter.errors`, with a message that can be shown to a person.
"""

from __future__ import annotations

import os
import socket
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from snapshotter import errors
from snapshotter.api import admin_pb2, admin_pb2_grpc, mount_pb2, snapshots_pb2, snapshots_pb2_grpc
from snapshotter.fsck.findings import Finding, Progress
from snapshotter.model import Extent, Freed, Info, Kind, Mount, SnapshotSpace, Space, Usage

START_HINT = 'start the daemon with "systemctl start dedup-snapshotter"'
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

_QUICK_TIMEOUT_S = 120.0
"""For calls that only wait for metadata, or for a commit of the same snapshot; by then the daemon says what hangs."""
_PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Feature:
    """Something that overlayfs or the filesystem can do where the root is."""

    name: str
    works: bool
    reason: str
    """Why it does not work."""
    on: bool
    """Whether new mounts have it."""


@dataclass(frozen=True, slots=True)
class DaemonInfo:
    """What the Admin service says of the running daemon (proto/snapshotter/api/admin.proto)."""

    version: str
    pid: int
    started_ns: int
    root: str
    address: str
    filesystem: str
    active: int
    views: int
    committed: int
    pending_deletions: int
    max_chain: int
    schema_version: int
    lmdb_version: str
    mount_mode: str
    namespace_reach: str
    dedup_strategy: str
    durability: str
    features: tuple[Feature, ...]


class Found(NamedTuple):
    """What the daemon found in its root, and what an offline repair would do; empty where that is nothing."""

    finding: Finding
    repair: str


class Client:
    """One connection. Calls block; the object may be shared by threads.

    Prepare, View, Mounts, Stat, Update, Remove, Usage and Info give up after two minutes. Commit, Cleanup,
    Space, Collect and Check take as long as their disk does, and List as long as its reader: these have no limit.
    """

    def __init__(self, address: str, timeout_s: float = _QUICK_TIMEOUT_S) -> None:
        """`address` is the path of the socket, with or without `unix://`.

        Raises: Unavailable, PermissionDenied, InvalidArgument where nobody can be reached there.
        """
        self.socket_path = socket_path(address)
        self._timeout_s = timeout_s
        probe(self.socket_path)
        self._channel = grpc.insecure_channel(
            _target(self.socket_path),
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", -1),  # the daemon says what is too long for it
                ("grpc.enable_http_proxy", 0),
                # Or it would wait as long as an earlier client of this process that found nobody there.
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self._snapshots: Any = snapshots_pb2_grpc.SnapshotsStub(self._channel)
        self._admin: Any = admin_pb2_grpc.AdminStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> tuple[Mount, ...]:
        request = snapshots_pb2.PrepareSnapshotRequest(key=key, parent=parent, labels=labels or {})
        return _mounts(self._call(self._snapshots.Prepare, request).mounts)

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> tuple[Mount, ...]:
        request = snapshots_pb2.ViewSnapshotRequest(key=key, parent=parent, labels=labels or {})
        return _mounts(self._call(self._snapshots.View, request).mounts)

    def mounts(self, key: str) -> tuple[Mount, ...]:
        request = snapshots_pb2.MountsRequest(key=key)
        return _mounts(self._call(self._snapshots.Mounts, request).mounts)

    def commit(self, name: str, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> None:
        """`parent` is for a snapshot prepared without one; otherwise leave it empty."""
        request = snapshots_pb2.CommitSnapshotRequest(name=name, key=key, parent=parent, labels=labels or {})
        self._call_unlimited(self._snapshots.Commit, request)

    def remove(self, key: str) -> None:
        self._call(self._snapshots.Remove, snapshots_pb2.RemoveSnapshotRequest(key=key))

    def stat(self, key: str) -> Info:
        return _info(self._call(self._snapshots.Stat, snapshots_pb2.StatSnapshotRequest(key=key)).info)

    def update_labels(self, key: str, labels: Mapping[str, str], removed: Iterable[str] = ()) -> Info:
        """Sets the given labels and removes others; those named by neither stay."""
        request = snapshots_pb2.UpdateSnapshotRequest(
            info=snapshots_pb2.Info(name=key, labels=labels),
            update_mask=FieldMask(paths=[f"labels.{label}" for label in (*labels, *removed)]),
        )
        return _info(self._call(self._snapshots.Update, request).info)

    def list(self, filters: Sequence[str] = ()) -> Iterator[Info]:
        """All infos that match any filter, as they arrive: the daemon waits for a slow reader."""
        stream = self._snapshots.List(snapshots_pb2.ListSnapshotsRequest(filters=filters))
        try:
            for response in stream:
                for info in response.info:
                    yield _info(info)
        except grpc.RpcError as error:
            raise self._error(error) from error
        finally:
            stream.cancel()

    def usage(self, key: str) -> Usage:
        answer = self._call(self._snapshots.Usage, snapshots_pb2.UsageRequest(key=key))
        return Usage(size_bytes=answer.size, inodes=answer.inodes)

    def cleanup(self) -> None:
        """Returns when what was removed before is deleted."""
        self._call_unlimited(self._snapshots.Cleanup, snapshots_pb2.CleanupRequest())

    def info(self) -> DaemonInfo:
        answer = self._call(self._admin.Info, admin_pb2.InfoRequest())
        features = tuple(Feature(f.name, f.works, f.reason, f.on) for f in answer.features)
        other = ("started_ns", "features")
        same = {name: getattr(answer, name) for name in DaemonInfo.__dataclass_fields__ if name not in other}
        return DaemonInfo(started_ns=_ns(answer.started_at), features=features, **same)

    def space(self, now: bool = False) -> Space:
        """What the store takes, as of the last pass over it in the background; `now` makes a pass."""
        stream = self._admin.Space(admin_pb2.SpaceRequest(now=now))
        answer = admin_pb2.SpaceResponse()
        try:
            for message in stream:
                answer.MergeFrom(message)
        except grpc.RpcError as error:
            raise self._error(error) from error
        finally:
            stream.cancel()
        return _space(answer)

    def collect(self, dry_run: bool = False) -> Freed:
        """Returns when what nothing uses is deleted; `dry_run` only says what that would be."""
        answer = self._call_unlimited(self._admin.Collect, admin_pb2.CollectRequest(dry_run=dry_run))
        return Freed(objects=_extent(answer.objects), trees=answer.trees)

    def check(self, verify_content: bool = False) -> Iterator[Found | Progress]:
        """What does not fit together in the daemon's root, as it is found; `verify_content` reads all objects, too."""
        stream = self._admin.Check(admin_pb2.CheckRequest(verify_content=verify_content))
        try:
            for message in stream:
                if message.WhichOneof("event") == "progress":
                    yield Progress(message.progress.stage, message.progress.done, message.progress.total)
                else:
                    found = message.finding
                    yield Found(Finding(found.id, found.subject, found.detail), found.repair)
        except grpc.RpcError as error:
            raise self._error(error) from error
        finally:
            stream.cancel()

    def _call(self, method: Callable[..., Any], request: object) -> Any:
        return self._call_within(self._timeout_s, method, request)

    def _call_unlimited(self, method: Callable[..., Any], request: object) -> Any:
        return self._call_within(None, method, request)

    def _call_within(self, timeout_s: float | None, method: Callable[..., Any], request: object) -> Any:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._error(error) from error

    def _error(self, error: Any) -> errors.SnapshotterError:
        """What a failed call means. `error` is a grpc.RpcError, which is also the call."""
        code, details = error.code(), error.details() or "no details"
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.Unavailable(f"no answer within {self._timeout_s:g} s{self._stuck_hint()}")
        if code is grpc.StatusCode.CANCELLED:
            return errors.Unavailable("the daemon stopped before it answered; call again when it runs")
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return errors.SnapshotterError(
                f"what listens at {self.socket_path} is not a dedup-snapshotter of this version: {details}"
            )
        if code is grpc.StatusCode.UNAVAILABLE:
            return self._unavailable(details)
        return errors.ERRORS_BY_GRPC_CODE.get(code.name, errors.SnapshotterError)(details)

    def _unavailable(self, details: str) -> errors.SnapshotterError:
        """The daemon itself says UNAVAILABLE, or gRPC does because the daemon is gone."""
        try:
            probe(self.socket_path)
        except errors.SnapshotterError as gone:
            return gone
        if details.startswith("failed to connect"):  # the kernel accepted, the process did not
            return errors.Unavailable(f"no answer{self._stuck_hint()}")
        return errors.Unavailable(f"{details} (the daemon at {self.socket_path})")

    def _stuck_hint(self) -> str:
        return f' from the daemon at {self.socket_path}; look at "systemctl status dedup-snapshotter"'


def socket_path(address: str) -> str:
    """The path in `address`: `/run/x.sock`, `unix:///run/x.sock` and `unix:/run/x.sock` are the same."""
    path = address.removeprefix("unix:").removeprefix("//") if address.startswith("unix:") else address
    if not path:
        raise errors.InvalidArgument(f"no socket in the address {errors.quote(address)}")
    return path


def probe(path: str) -> None:
    """Finds out whether somebody accepts connections at `path`. gRPC would only say "failed to connect".

    Raises: Unavailable, PermissionDenied, InvalidArgument, each with what to do about it.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probing:
            probing.settimeout(_PROBE_TIMEOUT_S)
            probing.connect(path)
    except BlockingIOError:
        return  # its queue is full, so it is there
    except FileNotFoundError as error:
        raise errors.Unavailable(f"no socket at {path}: {START_HINT}") from error
    except ConnectionRefusedError as error:
        raise errors.Unavailable(f"nobody listens at {path}: {START_HINT}") from error
    except PermissionError as error:
        raise errors.PermissionDenied(f"no permission to connect to {path}: run this as root") from error
    except TimeoutError as error:
        raise errors.Unavailable(f"nobody accepts connections at {path}: {START_HINT}") from error
    except OSError as error:  # not a stream socket, a path too long for sun_path, not a directory, …
        raise errors.InvalidArgument(f"cannot connect to {path}: {error.strerror or error}") from error


def _target(path: str) -> str:
    """The path as gRPC reads it, percent-decoded. A comma would separate two addresses, even encoded."""
    path = os.path.abspath(path)
    if "," in path:
        raise errors.InvalidArgument(f"gRPC cannot connect to a socket with a comma in its path: {path}")
    return "unix:" + urllib.parse.quote(path)


def _mounts(mounts: Iterable[mount_pb2.Mount]) -> tuple[Mount, ...]:
    return tuple(Mount(type=m.type, source=m.source, options=tuple(m.options)) for m in mounts)


def _info(info: snapshots_pb2.Info) -> Info:
    return Info(
        name=info.name,
        parent=info.parent,
        kind=Kind(info.kind),
        created_ns=_ns(info.created_at),
        updated_ns=_ns(info.updated_at),
        labels=dict(info.labels),
    )


def _space(answer: admin_pb2.SpaceResponse) -> Space:
    store = answer.store
    return Space(
        as_of_ns=_ns(store.as_of),
        took_ns=_ns(store.took),
        snapshots=tuple(map(_snapshot_space, answer.snapshots)),
        apparent_bytes=store.apparent_bytes,
        allocated=_extent(store.allocated),
        unshared=_extent(store.unshared),
        objects=_extent(store.objects),
        filesystem_inodes=store.filesystem_inodes,
        filesystem_inodes_free=store.filesystem_inodes_free,
        filesystem_bytes=store.filesystem_bytes,
        filesystem_bytes_free=store.filesystem_bytes_free,
        private=dict(store.private),
    )


def _snapshot_space(space: admin_pb2.SnapshotSpace) -> SnapshotSpace:
    return SnapshotSpace(
        name=space.name,
        kind=Kind(space.kind),
        strategy=space.strategy,
        apparent_bytes=space.apparent_bytes,
        allocated=_extent(space.allocated),
        shared=_extent(space.shared),
        exclusive=_extent(space.exclusive),
        private=dict(space.private),
    )


def _extent(extent: admin_pb2.Extent) -> Extent:
    return Extent(size_bytes=extent.size_bytes, inodes=extent.inodes)


def _ns(time: Timestamp | Duration) -> int:
    return time.seconds * 1_000_000_000 + time.nanos
