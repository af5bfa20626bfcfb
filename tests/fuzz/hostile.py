"""Requests that are well-formed and mean harm, with the status that they must get; and floods of HTTP/2 frames.

There are active snapshots "k" and "l" when a request comes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from snapshotter.api import snapshots_pb2 as pb
from tests.fuzz.siege import SERVICE
from tests.rig.http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    call_headers,
    frame,
)

MIB = 1 << 20
OK, BAD, MISSING, TOO_MUCH = "OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"

Request = tuple[str, Callable[[], bytes], str]


def _prepare(key: str, **fields: Any) -> Callable[[], bytes]:
    return lambda: pb.PrepareSnapshotRequest(key=key, **fields).SerializeToString()


def _update(labels: dict[str, str], *paths: str, **fields: Any) -> Callable[[], bytes]:
    return lambda: pb.UpdateSnapshotRequest(
        info=pb.Info(name="k", labels=labels, **fields), update_mask=FieldMask(paths=paths)
    ).SerializeToString()


def _list(*filters: str) -> Callable[[], bytes]:
    return lambda: pb.ListSnapshotsRequest(filters=filters).SerializeToString()


def _field(number: int, raw: bytes) -> bytes:
    """A field with a length; https://protobuf.dev/programming-guides/encoding."""
    return _varint(number << 3 | 2) + _varint(len(raw)) + raw


def _varint(value: int) -> bytes:
    raw = bytearray()
    while value > 0x7F:
        raw.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*raw, value])


def _nested(depth: int) -> bytes:
    raw = b""
    for _ in range(depth):
        raw = _field(15, raw)
    return raw


MANY_LABELS = {f"{number:x}": "v" for number in range(9_000)}

REQUESTS: dict[str, Request] = {
    "a key of path components": ("Prepare", _prepare("../../../../etc/passwd"), OK),
    "a key with a NUL": ("Prepare", _prepare("a\0b"), OK),
    "a key of control characters": ("Prepare", _prepare("\n\r\t\x1b[2J\x7f\u202e"), OK),
    "a key like mount options": ("Prepare", _prepare("k,lowerdir=/:/etc\\,upperdir=/"), OK),
    "a key of 900 KB": ("Prepare", _prepare("x" * 900_000), BAD),
    "a key of 15 MB": ("Prepare", _prepare("x" * (15 * MIB)), TOO_MUCH),
    "a key that is not UTF-8": ("Prepare", lambda: _field(2, b"a\xff"), BAD),
    "a key that is a surrogate": ("Stat", lambda: _field(2, b"\xed\xa0\x80"), BAD),
    "a parent of path components": ("Prepare", _prepare("m", parent="../k"), MISSING),
    "labels without a key": ("Prepare", _prepare("m", labels={"": "v"}), OK),
    "9,000 labels": ("Prepare", _prepare("m", labels=MANY_LABELS), OK),
    "labels of 800 KB": ("Prepare", _prepare("m", labels={f"{n}": "x" * 8000 for n in range(100)}), BAD),
    "a label 100,000 times": ("Prepare", lambda: _field(2, b"m") + _field(4, b"") * 100_000, OK),
    "an update that names labels 60,000 times": ("Update", _update(MANY_LABELS, *["labels"] * 60_000), OK),
    "an update of what cannot change": ("Update", _update({}, "kind"), BAD),
    "an update of nonsense": ("Update", _update({}, "labels..\0", "", "*"), BAD),
    "times and kinds out of range": (
        "Update",
        _update({"a": "b"}, kind=77, created_at=Timestamp(seconds=(1 << 63) - 1, nanos=-1)),
        OK,
    ),
    "unknown fields, deeply nested": ("Stat", lambda: _field(2, b"k") + _nested(5_000), OK),
    "groups, deeply nested": ("Stat", lambda: _field(2, b"k") + b"\x7b" * 100_000, BAD),
    "a group in a group, to the depth of the stack": ("Stat", lambda: b"\x7b" * 500_000 + b"\x7c" * 500_000, BAD),
    "10,000 filters": ("List", _list(*(f"name=={number}" for number in range(10_000))), OK),
    "15 MB of filters": ("List", _list(*(f"name=={'x' * MIB}" for _ in range(15))), OK),
    "5,000,000 empty filters": ("List", lambda: b"\x12\x00" * 5_000_000, BAD),
    "more fields than anybody needs": ("List", _list(*["a.b.c.d"] * 40_000), BAD),
    "an expression that explodes elsewhere": ("List", _list('name~="^(a+)+$|(x+x+)+y"'), OK),
    "an expression with giant counts": ("List", _list('name~="((a{0,100}){0,100}){0,100}"'), BAD),
    "an expression of 10 MB": ("List", _list(f"name~={'(a|b)*' * 1_700_000}"), BAD),
    "thousands of expressions": ("List", _list(*(f"name~={number}.*x[a-z]{{50}}" for number in range(3_000))), OK),
    "a string of 10 MB that does not end": ("List", _list('name=="' + "\\x41" * 2_500_000), BAD),
}


def _opening(*frames: bytes) -> bytes:
    return PREFACE + frame(SETTINGS, 0, 0, b"") + b"".join(frames)


def _call(stream: int, method: str = "Stat", body: bytes = bytes(5), **headers: str) -> bytes:
    block = call_headers(f"/{SERVICE}/{method}", **headers)
    return frame(HEADERS, END_HEADERS, stream, block) + frame(DATA, END_STREAM, stream, body)


def _streams(count: int) -> range:
    return range(1, 2 * count, 2)


def _reset(stream: int) -> bytes:
    return frame(RST_STREAM, 0, stream, struct.pack(">I", 8))


_HEAD = call_headers(f"/{SERVICE}/Stat")

CUT_OFF = ("calls that are reset", "streams that stay half open")
"""After a flood of these gRPC cancels some calls of others, which no handler has seen (grpcio 1.85.1)."""

WIRES: dict[str, Callable[[], bytes]] = {
    "pings": lambda: _opening(*[frame(PING, 0, 0, bytes(8))] * 10_000),
    "settings": lambda: _opening(*[frame(SETTINGS, 0, 0, b"\0\x04\0\0\xff\xff")] * 10_000),
    "empty data": lambda: _opening(frame(HEADERS, END_HEADERS, 1, _HEAD), *[frame(DATA, 0, 1, b"")] * 10_000),
    "windows": lambda: _opening(*[frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1))] * 10_000),
    "calls that are reset": lambda: _opening(*(_call(n, "List") + _reset(n) for n in _streams(2_000))),
    "streams that stay half open": lambda: _opening(*(frame(HEADERS, END_HEADERS, n, _HEAD) for n in _streams(2_000))),
    "a header without an end": lambda: _opening(
        frame(HEADERS, 0, 1, _HEAD), *[frame(CONTINUATION, 0, 1, b"\0\x01a\x7f\x81\x7f" + b"x" * 16_000)] * 200
    ),
    "a header of a megabyte": lambda: _opening(
        frame(HEADERS, 0, 1, _HEAD), *[frame(CONTINUATION, 0, 1, (b"\0\x01a\x7e" + b"x" * 126) * 120)] * 64,
        frame(CONTINUATION, END_HEADERS, 1, b""), frame(DATA, END_STREAM, 1, bytes(5)),
    ),
    "a large header, named 10,000 times": lambda: _opening(
        # RFC 7541: one literal enters the table (6.2.1), and is then an index (6.1).
        frame(HEADERS, END_HEADERS, 1, _HEAD + b"\x40\x01a\x7e" + b"x" * 126 + b"\xbe" * 10_000),
        frame(DATA, END_STREAM, 1, bytes(5)),
    ),
    "messages of 4 GB that do not come": lambda: _opening(
        *(frame(HEADERS, END_HEADERS, n, _HEAD) + frame(DATA, 0, n, b"\0\xff\xff\xff\xff") for n in _streams(100))
    ),
    "frames that are too long": lambda: _opening(b"\xff\xff\xff\0\0\0\0\0\1" + bytes(100_000)),
    "streams out of order": lambda: _opening(_call(9), _call(3), _call(2), _call(0)),
}  # fmt: skip
