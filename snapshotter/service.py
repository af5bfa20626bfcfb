"""The gRPC services: protobuf to model and back, errors to status codes.

The handlers are coroutines of one event loop, so a client that reads slowly or waits long holds no
thread. What blocks runs in the pools of calls.py: short calls never queue behind commits, scans, or what hangs.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
import structlog
from google.protobuf import duration_pb2, empty_pb2, timestamp_pb2

from snapshotter import __version__, mountinfo
from snapshotter.api import admin_pb2, admin_pb2_grpc, mount_pb2, snapshots_pb2, snapshots_pb2_grpc
from snapshotter.calls import Pools
from snapshotter.engine import Engine
from snapshotter.errors import NO_SPACE, SnapshotterError, from_os_error
from snapshotter.fsck.findings import Finding, Progress
from snapshotter.model import MAX_CHAIN, Commitment, Creation, Extent, Info, Kind, Mount, SnapshotSpace, Space
from snapshotter.spool import Spool, Spools

log = structlog.get_logger()

T = TypeVar("T")

LIST_INFOS = 100
LIST_BYTES = 4 * 1024 * 1024
"""Most infos, and most bytes, in one message of List."""
SPACE_SNAPSHOTS = 100
"""Most snapshots in one message of Space: with keys of 64 KiB they fit into the 16 MiB that clients take."""


async def _completed(future: Future[None]) -> None:
    """Waits for what others wait for too: a client that goes away must not cancel it for them."""
    await asyncio.shield(asyncio.wrap_future(future))


async def _abort(context: Any, call: str, error: Exception) -> None:
    if isinstance(error, SnapshotterError):
        log.debug("call.refused", call=call, code=error.grpc_code, reason=str(error))
        await context.abort(grpc.StatusCode[error.grpc_code], str(error))
    if isinstance(error, OSError) and error.errno in (*NO_SPACE, errno.EROFS):
        # The disk is to blame, wherever it was met.
        await _abort(context, call, from_os_error(call, error))
    log.error("call.failed", call=call, exc_info=error)
    await context.abort(
        grpc.StatusCode.INTERNAL,
        f"{call} failed inside the snapshotter ({type(error).__name__}); see its log",
    )


Handler = Callable[[Any, Any, Any], Awaitable[T]]


def _answering(handler: Handler[T]) -> Handler[T]:
    """Turns what the handler raises into a status."""

    @wraps(handler)
    async def wrapped(self: Any, request: Any, context: Any) -> T:
        began_s = time.monotonic()
        try:
            return await handler(self, request, context)
        except Exception as error:
            await _abort(context, handler.__name__, error)
            raise
        finally:
            log.debug("call", call=handler.__name__, ms=round((time.monotonic() - began_s) * 1e3, 2))

    return wrapped


class SnapshotsService(snapshots_pb2_grpc.SnapshotsServicer):
    """containerd.services.snapshots.v1."""

    def __init__(self, engine: Engine, pools: Pools, spool: Path) -> None:
        self._engine = engine
        self._pools = pools
        self._spools = Spools(spool)

    @_answering
    async def Prepare(self, request: Any, _context: Any) -> Any:
        mounts = await self._create(Kind.ACTIVE, request)
        return snapshots_pb2.PrepareSnapshotResponse(mounts=mounts)

    @_answering
    async def View(self, request: Any, _context: Any) -> Any:
        mounts = await self._create(Kind.VIEW, request)
        return snapshots_pb2.ViewSnapshotResponse(mounts=mounts)

    @_answering
    async def Mounts(self, request: Any, _context: Any) -> Any:
        mounts = await self._pools.read.run(self._engine.known_mounts, request.key)
        if mounts is None:
            mounts = await self._pools.change.run(self._engine.mounts, request.key, about=(request.key,))
        return snapshots_pb2.MountsResponse(mounts=_mounts_to_proto(mounts))

    @_answering
    async def Commit(self, request: Any, _context: Any) -> Any:
        want = Commitment(request.name, request.key, request.parent, dict(request.labels))
        await self._pools.commit.run(self._engine.commit, want, about=(want.key, want.parent))
        return empty_pb2.Empty()

    @_answering
    async def Remove(self, request: Any, _context: Any) -> Any:
        await self._pools.change.run(self._engine.remove, request.key, about=(request.key,))
        return empty_pb2.Empty()

    @_answering
    async def Stat(self, request: Any, _context: Any) -> Any:
        info = await self._pools.read.run(self._engine.stat, request.key)
        return snapshots_pb2.StatSnapshotResponse(info=_info_to_proto(info))

    @_answering
    async def Update(self, request: Any, _context: Any) -> Any:
        info = await self._pools.change.run(
            self._engine.update,
            request.info.name,
            dict(request.info.labels),
            list(request.update_mask.paths),
            about=(request.info.name,),
        )
        return snapshots_pb2.UpdateSnapshotResponse(info=_info_to_proto(info))

    async def List(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Spools the whole answer first: a slow reader holds neither memory nor a view of the metadata."""
        try:
            spool = await self._pools.list.run(self._spool_list, request.filters, unwanted=Spool.close)
        except Exception as error:
            await _abort(context, "List", error)
            raise
        with spool:
            for raw in spool.messages():
                yield snapshots_pb2.ListSnapshotsResponse.FromString(raw)

    @_answering
    async def Usage(self, request: Any, _context: Any) -> Any:
        usage = await self._pools.read.run(self._engine.known_usage, request.key)
        if usage is None:
            usage = await self._pools.scan.run(self._engine.usage, request.key, about=(request.key,))
        return snapshots_pb2.UsageResponse(size=usage.size_bytes, inodes=usage.inodes)

    @_answering
    async def Cleanup(self, _request: Any, _context: Any) -> Any:
        await _completed(await self._pools.change.run(self._engine.cleanup))
        return empty_pb2.Empty()

    async def _create(self, kind: Kind, request: Any) -> list[Any]:
        want = Creation(kind, request.key, request.parent, dict(request.labels))
        about = (want.key, want.parent)
        return _mounts_to_proto(await self._pools.change.run(self._engine.create, want, about=about))

    def _spool_list(self, filters: Sequence[str]) -> Spool:
        spool = Spool(self._spools)
        try:
            with self._engine.select(filters) as infos:
                for message in _in_messages(infos):
                    spool.write(message.SerializeToString())
            spool.rewind()
        except BaseException:
            spool.close()
            raise
        return spool


class AdminService(admin_pb2_grpc.AdminServicer):
    """dedup_snapshotter.admin.v1."""

    def __init__(self, engine: Engine, pools: Pools, root: Path, address: Path) -> None:
        self._engine = engine
        self._pools = pools
        self._root = root
        self._address = address
        self._started = timestamp_pb2.Timestamp()
        self._started.GetCurrentTime()

    @_answering
    async def Info(self, _request: Any, _context: Any) -> Any:
        status = await self._pools.read.run(self._engine.status)
        return admin_pb2.InfoResponse(
            version=__version__,
            pid=os.getpid(),
            started_at=self._started,
            root=str(self._root),
            address=str(self._address),
            filesystem=mountinfo.filesystem_of(self._root),
            active=status.counts[Kind.ACTIVE],
            views=status.counts[Kind.VIEW],
            committed=status.counts[Kind.COMMITTED],
            pending_deletions=status.pending_deletions,
            max_chain=MAX_CHAIN,
            schema_version=status.schema_version,
            lmdb_version=status.lmdb_version,
            mount_mode=status.mount_mode,
            namespace_reach=status.namespace_reach,
            features=[
                admin_pb2.Feature(name=name, works=missing is None, reason=missing or "", on=name in status.switched_on)
                for name, missing in status.missing_features.items()
            ],
            dedup_strategy=status.strategy,
            durability=status.durability,
        )

    async def Space(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            messages = await self._pools.store.run(self._space_in_messages, request.now)
        except Exception as error:
            await _abort(context, "Space", error)
            raise
        for message in messages:
            yield message

    @_answering
    async def Collect(self, request: Any, _context: Any) -> Any:
        freed = await self._pools.store.run(self._engine.collect, request.dry_run)
        return admin_pb2.CollectResponse(objects=_extent_to_proto(freed.objects), trees=freed.trees)

    async def Check(self, request: Any, context: Any) -> AsyncIterator[Any]:
        events = _OneAtATime(self._engine.check(request.verify_content))
        try:
            while (event := await self._pools.check.run(events.next)) is not None:
                yield _event_to_proto(event)
        except Exception as error:
            await _abort(context, "Check", error)
            raise
        finally:  # the client may have gone, while a thread is at the next event
            self._pools.check.leave(events.close)

    def _space_in_messages(self, now: bool) -> list[Any]:
        """First the store, then at most SPACE_SNAPSHOTS snapshots each."""
        space = self._engine.space(now)
        messages = [admin_pb2.SpaceResponse(store=_store_space_to_proto(space))]
        for begin in range(0, len(space.snapshots), SPACE_SNAPSHOTS):
            some = space.snapshots[begin : begin + SPACE_SNAPSHOTS]
            messages.append(admin_pb2.SpaceResponse(snapshots=map(_snapshot_space_to_proto, some)))
        return messages


class _OneAtATime:
    """An iterator of events that may be closed while another thread waits for the next one."""

    def __init__(self, events: Iterator[Finding | Progress]) -> None:
        self._events = events
        self._lock = threading.Lock()

    def next(self) -> Finding | Progress | None:
        """None at the end."""
        with self._lock:
            return next(self._events, None)

    def close(self) -> None:
        with self._lock:
            cast(Generator[Any, None, None], self._events).close()


def _event_to_proto(event: Finding | Progress) -> Any:
    if isinstance(event, Progress):
        return admin_pb2.CheckResponse(
            progress=admin_pb2.CheckProgress(stage=event.stage, done=event.done, total=event.total)
        )
    return admin_pb2.CheckResponse(
        finding=admin_pb2.CheckFinding(
            id=event.id,
            subject=_utf8(event.subject),
            detail=_utf8(event.detail),
            repair=_utf8(event.fix.describe()) if event.fix else "",
        )
    )


def _utf8(text: str) -> str:
    """Paths may hold bytes that are none."""
    return text.encode(errors="backslashreplace").decode()


def _mounts_to_proto(mounts: Sequence[Mount]) -> list[Any]:
    return [mount_pb2.Mount(type=m.type, source=m.source, options=m.options) for m in mounts]


def _info_to_proto(info: Info) -> Any:
    return snapshots_pb2.Info(
        name=info.name,
        parent=info.parent,
        kind=snapshots_pb2.Kind.Name(info.kind),
        created_at=_timestamp(info.created_ns),
        updated_at=_timestamp(info.updated_ns),
        labels=info.labels,
    )


def _store_space_to_proto(space: Space) -> Any:
    seconds, nanos = divmod(space.took_ns, 1_000_000_000)
    return admin_pb2.StoreSpace(
        as_of=_timestamp(space.as_of_ns),
        took=duration_pb2.Duration(seconds=seconds, nanos=nanos),
        apparent_bytes=space.apparent_bytes,
        allocated=_extent_to_proto(space.allocated),
        unshared=_extent_to_proto(space.unshared),
        objects=_extent_to_proto(space.objects),
        filesystem_inodes=space.filesystem_inodes,
        filesystem_inodes_free=space.filesystem_inodes_free,
        filesystem_bytes=space.filesystem_bytes,
        filesystem_bytes_free=space.filesystem_bytes_free,
        private=space.private,
    )


def _snapshot_space_to_proto(space: SnapshotSpace) -> Any:
    return admin_pb2.SnapshotSpace(
        name=space.name,
        kind=snapshots_pb2.Kind.Name(space.kind),
        strategy=space.strategy,
        apparent_bytes=space.apparent_bytes,
        allocated=_extent_to_proto(space.allocated),
        shared=_extent_to_proto(space.shared),
        exclusive=_extent_to_proto(space.exclusive),
        private=space.private,
    )


def _extent_to_proto(extent: Extent) -> Any:
    return admin_pb2.Extent(size_bytes=extent.size_bytes, inodes=extent.inodes)


def _timestamp(time_ns: int) -> timestamp_pb2.Timestamp:
    seconds, nanos = divmod(time_ns, 1_000_000_000)
    return timestamp_pb2.Timestamp(seconds=seconds, nanos=nanos)


def _in_messages(infos: Iterator[Info]) -> Iterator[Any]:
    """At most LIST_INFOS infos and LIST_BYTES bytes a message; none if there are no infos."""
    message = snapshots_pb2.ListSnapshotsResponse()
    size_bytes = 0
    for info in infos:
        item = _info_to_proto(info)
        # A field in the message costs its tag and its length beside the item.
        item_bytes = item.ByteSize() + 6
        if message.info and (len(message.info) == LIST_INFOS or size_bytes + item_bytes > LIST_BYTES):
            yield message
            message = snapshots_pb2.ListSnapshotsResponse()
            size_bytes = 0
        message.info.append(item)
        size_bytes += item_bytes
    if message.info:
        yield message
