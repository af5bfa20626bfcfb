"""The one exception tree: what can go wrong, with the gRPC code and the exit status that it means.

A message names the object, the act and what to do next. It may travel in an HTTP/2 trailer, where
gRPC allows 8 KiB in all, so whatever a client chose (a key can have 64 KiB) goes through `quote`.
"""

from __future__ import annotations

import errno
import json
from typing import ClassVar


def quote(text: str, limit_chars: int = 200) -> str:
    """`text` in double quotes, on one line, pure ASCII, its middle left out past `limit_chars`."""
    if len(text) > limit_chars:
        half = limit_chars // 2
        text = f"{text[:half]}…{text[-half:]}"
    return json.dumps(text)


class SnapshotterError(Exception):
    """Base of all errors that a user of the daemon can see. `grpc_code` names a grpc.StatusCode."""

    grpc_code: ClassVar[str] = "INTERNAL"
    exit_status: ClassVar[int] = 1


class InvalidArgument(SnapshotterError):
    grpc_code = "INVALID_ARGUMENT"
    exit_status = 2


class NotFound(SnapshotterError):
    grpc_code = "NOT_FOUND"
    exit_status = 3


class AlreadyExists(SnapshotterError):
    grpc_code = "ALREADY_EXISTS"
    exit_status = 4


class FailedPrecondition(SnapshotterError):
    grpc_code = "FAILED_PRECONDITION"
    exit_status = 5


class Unavailable(SnapshotterError):
    """The daemon is not there, is stopping, or cannot serve this snapshot now: try again later."""

    grpc_code = "UNAVAILABLE"
    exit_status = 6


class ResourceExhausted(SnapshotterError):
    grpc_code = "RESOURCE_EXHAUSTED"
    exit_status = 7


class PermissionDenied(SnapshotterError):
    grpc_code = "PERMISSION_DENIED"
    exit_status = 8


class Internal(SnapshotterError):
    """A fault of the daemon, its disk or the kernel; a person has to look."""


ERRORS_BY_GRPC_CODE: dict[str, type[SnapshotterError]] = {
    cls.grpc_code: cls
    for cls in (
        InvalidArgument, NotFound, AlreadyExists, FailedPrecondition, Unavailable,
        ResourceExhausted, PermissionDenied, Internal,
    )
}  # fmt: skip

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
READ_ONLY_HINT = "remount it read-write, after a repair if the kernel's log speaks of errors"
_EXHAUSTED = NO_SPACE | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EMLINK}


def from_os_error(act: str, error: OSError) -> SnapshotterError:
    """The error to raise, `from error`, where `act` ("making the directory of snapshot …") failed."""
    if error.errno == errno.EROFS:
        return Unavailable(f"{act}: {error.strerror}: {READ_ONLY_HINT}")
    cls = ResourceExhausted if error.errno in _EXHAUSTED else Internal
    return cls(f"{act}: {error.strerror or error}")
