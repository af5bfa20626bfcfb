"""Makes the calls of tests.model over a socket, and gives their answers in the model's terms."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from snapshotter.api import snapshots_pb2 as pb
from snapshotter.api import snapshots_pb2_grpc
from snapshotter.model import Info, Kind, Mount, Usage
from tests import model

TIMEOUT_S = 60.0

_REQUESTS: dict[type, type] = {
    model.Prepare: pb.PrepareSnapshotRequest,
    model.View: pb.ViewSnapshotRequest,
    model.Mounts: pb.MountsRequest,
    model.Commit: pb.CommitSnapshotRequest,
    model.Remove: pb.RemoveSnapshotRequest,
    model.Stat: pb.StatSnapshotRequest,
    model.UsageOf: pb.UsageRequest,
    model.Cleanup: pb.CleanupRequest,
}


class Caller:
    """One channel's stub."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub: Any = snapshots_pb2_grpc.SnapshotsStub(channel)

    def __call__(self, call: model.Call) -> model.Answer:
        """Unknown where no answer of the daemon came: it is gone, or is going."""
        try:
            return self._answer(call)
        except grpc.RpcError as error:
            code: Any = error.code()  # type: ignore[attr-defined]
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                return model.Unknown()
            return model.Refused(code.name, error.details())  # type: ignore[attr-defined]

    def _answer(self, call: model.Call) -> model.Answer:
        if isinstance(call, model.List):
            stream = self.stub.List(pb.ListSnapshotsRequest(filters=call.texts()), timeout=TIMEOUT_S)
            return tuple(info_of(item) for message in stream for item in message.info)
        if isinstance(call, model.Update):
            info = pb.Info(name=call.name, labels=call.labels)
            mask = FieldMask(paths=call.paths) if call.paths else None
            request: Any = pb.UpdateSnapshotRequest(info=info, update_mask=mask)
        else:
            fields = {name: getattr(call, name) for name in call.__dataclass_fields__}
            request = _REQUESTS[type(call)](**fields)
        name = "Usage" if isinstance(call, model.UsageOf) else type(call).__name__
        reply = getattr(self.stub, name)(request, timeout=TIMEOUT_S)
        match call:
            case model.Prepare() | model.View() | model.Mounts():
                return tuple(Mount(m.type, m.source, tuple(m.options)) for m in reply.mounts)
            case model.Stat() | model.Update():
                return info_of(reply.info)
            case model.UsageOf():
                return Usage(reply.size, reply.inodes)
            case _:
                return None


def info_of(item: Any) -> Info:
    """A message Info as the model's value."""
    return Info(
        item.name,
        item.parent,
        Kind(item.kind),
        item.created_at.ToNanoseconds(),
        item.updated_at.ToNanoseconds(),
        dict(item.labels),
    )
