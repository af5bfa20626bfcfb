"""What the metadata environment holds, and how each value is packed.

    store
    ├── "version"  u32: SCHEMA_VERSION
    └── "next_id"  u64: no snapshot ever had this id or a higher one
    keys
    └── blake3(key or name)  → id u64             (LMDB takes 511 bytes a key, a name may have 64 KiB)
    snapshots
    └── id                   → record
    children
    └── parent id, id        → empty              (asked for "has it children?", and by tree walks)
    chains
    └── id of a committed snapshot → features u32, then its id and its ancestors', nearest first

    layers
    └── id of a committed snapshot → JSON: the fields of Facts    (if its files were shared)

    sealing
    └── id of a snapshot that is being sealed → the record of the active snapshot that it was

    record  = kind u8, flags u8 (1: sealing, 2: materialized), features u32, parent id u64 (0: none),
              created u64, updated u64 (both ns since the epoch), usage: bytes u64, inodes u64, name text,
              number of labels u32, (key text, value text)…
    text    = length in bytes u32, UTF-8

Ids that are LMDB keys are big-endian, so that they sort by age; all else is little-endian. A chain
never changes: only committed snapshots have children, and one with children cannot be removed.
`features` are overlay features: in a record those that its own tree needs (of an active snapshot: to
be mounted), in a chain those that any of its layers needs to be read right. A snapshot is sealing from
the commit point until nothing of the dead upper is left in the layer; until then its old key still leads
to it, and who looks sees what it was. It is materialized if the daemon mounts it, whatever mode it runs in
later.

A change here raises SCHEMA_VERSION and adds the step from the version before to MIGRATIONS.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from snapshotter.errors import FailedPrecondition
from snapshotter.model import NO_USAGE, Info, Kind, SnapshotId, Usage
from snapshotter.overlay.features import NO_FEATURES, Feature

SCHEMA_VERSION = 2
DATABASES = ("store", "keys", "snapshots", "children", "chains", "layers", "sealing")

# From version N to N + 1, inside the transaction that opens the store.
MIGRATIONS: dict[int, Callable[[Any], None]] = {1: lambda _tx: None}
"""1: there was no `layers`, since no files were shared."""

_HEAD = struct.Struct("<BBIQQQQQ")
_U32 = struct.Struct("<I")
_ID = struct.Struct(">Q")
_PAIR = struct.Struct(">QQ")


@dataclass(frozen=True, slots=True)
class Record:
    """One snapshot as stored."""

    id: SnapshotId
    name: str
    kind: Kind
    parent_id: SnapshotId | None
    created_ns: int
    updated_ns: int
    labels: dict[str, str]
    usage: Usage = NO_USAGE
    features: Feature = NO_FEATURES
    sealing: bool = False
    materialized: bool = False

    def info(self, parent_name: str) -> Info:
        return Info(self.name, parent_name, self.kind, self.created_ns, self.updated_ns, self.labels)


@dataclass(frozen=True, slots=True)
class Chain:
    """The layers that a snapshot stands on, nearest first; all are committed."""

    ids: tuple[SnapshotId, ...] = ()
    features: Feature = NO_FEATURES


@dataclass(frozen=True, slots=True)
class Facts:
    """What sharing a layer's files came to."""

    strategy: str
    apparent_bytes: int
    """The sizes of the files."""
    own: Usage | None = None
    """What the tree itself takes, the objects not included; None if that has to be measured."""
    private: Mapping[str, int] = field(default_factory=dict)
    """Files that were not shared, by reason."""
    many_names: Mapping[str, int] = field(default_factory=dict)
    """Of refs to objects that are files of the tree under several names: how many."""


def refuse_newer(version: int, directory: Path) -> None:
    """Raises FailedPrecondition."""
    if version > SCHEMA_VERSION:
        raise FailedPrecondition(
            f"the metadata in {directory} has schema version {version}, this program knows {SCHEMA_VERSION}: it was "
            "written by a newer dedup-snapshotter; run that one"
        )


def key_digest(name: str) -> bytes:
    return blake3(name.encode()).digest()


def encode_id(snapshot_id: int) -> bytes:
    return _ID.pack(snapshot_id)


def decode_id(raw: bytes) -> SnapshotId:
    return SnapshotId(_ID.unpack(raw)[0])


def encode_child(parent_id: int, child_id: int) -> bytes:
    return _PAIR.pack(parent_id, child_id)


def encode_u32(value: int) -> bytes:
    return _U32.pack(value)


def decode_u32(raw: bytes) -> int:
    return int(_U32.unpack(raw)[0])


def encode_record(record: Record) -> bytes:
    parts = [
        _HEAD.pack(
            record.kind, record.sealing | record.materialized << 1, record.features, record.parent_id or 0,
            record.created_ns, record.updated_ns, record.usage.size_bytes, record.usage.inodes,
        ),
    ]  # fmt: skip
    _put_text(parts, record.name)
    parts.append(_U32.pack(len(record.labels)))
    for key, value in record.labels.items():
        _put_text(parts, key)
        _put_text(parts, value)
    return b"".join(parts)


def decode_record(snapshot_id: SnapshotId, raw: bytes) -> Record:
    kind, flags, features, parent_id, created_ns, updated_ns, size_bytes, inodes = _HEAD.unpack_from(raw)
    name, at = _get_text(raw, _HEAD.size)
    (count,) = _U32.unpack_from(raw, at)
    at += _U32.size
    labels = {}
    for _ in range(count):
        key, at = _get_text(raw, at)
        labels[key], at = _get_text(raw, at)
    return Record(
        snapshot_id, name, Kind(kind), SnapshotId(parent_id) if parent_id else None,
        created_ns, updated_ns, labels, Usage(size_bytes, inodes), Feature(features), bool(flags & 1), bool(flags & 2),
    )  # fmt: skip


def decode_name(raw: bytes) -> str:
    """The name alone, for what only needs to know what the parent is called."""
    return _get_text(raw, _HEAD.size)[0]


def encode_chain(chain: Chain) -> bytes:
    return _U32.pack(chain.features) + struct.pack(f"<{len(chain.ids)}Q", *chain.ids)


def decode_chain(raw: bytes) -> Chain:
    ids = struct.unpack_from(f"<{(len(raw) - _U32.size) // 8}Q", raw, _U32.size)
    return Chain(tuple(map(SnapshotId, ids)), Feature(decode_u32(raw[: _U32.size])))


def encode_facts(facts: Facts) -> bytes:
    return json.dumps(asdict(facts)).encode()


def decode_facts(raw: bytes) -> Facts:
    found = json.loads(raw)
    own = found.pop("own")
    return Facts(own=Usage(**own) if own else None, **found)


def _put_text(parts: list[bytes], text: str) -> None:
    raw = text.encode()
    parts.append(_U32.pack(len(raw)))
    parts.append(raw)


def _get_text(raw: bytes, at: int) -> tuple[str, int]:
    (length,) = _U32.unpack_from(raw, at)
    start = at + _U32.size
    return raw[start : start + length].decode(), start + length
