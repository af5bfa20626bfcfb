"""The metadata as of one moment, decoded as far as it can be."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TypeVar

from snapshotter.errors import quote
from snapshotter.fsck.database import Raw
from snapshotter.meta import schema
from snapshotter.meta.schema import Facts, Record
from snapshotter.model import Kind, SnapshotId

T = TypeVar("T")

_UNREADABLE = (struct.error, ValueError, IndexError, KeyError, TypeError)
"""What decoding raises for bytes that nobody encoded."""


class Image:
    """Everything that the metadata holds."""

    def __init__(self, raw: Raw) -> None:
        self.raw = raw
        self.damaged: dict[bytes, bytes] = {}
        """Records that cannot be decoded, by their keys."""
        self.records: dict[SnapshotId, Record] = {}
        for key, value in raw["snapshots"].items():
            record = _record(key, value)
            if record is None or schema.encode_record(record) != value:
                self.damaged[key] = value
            else:
                self.records[record.id] = record

    @cached_property
    def before(self) -> dict[SnapshotId, Record]:
        """Of snapshots that are being sealed: the active ones that they were."""
        found = {}
        for key, value in self.raw["sealing"].items():
            record = _record(key, value)
            if record is not None:
                found[record.id] = record
        return found

    @cached_property
    def next_id(self) -> int:
        raw = self.raw["store"].get(b"next_id")
        return (_decoded(lambda: int(schema.decode_id(raw))) if raw else 0) or 1

    def facts(self, snapshot_id: SnapshotId) -> Facts | None:
        """None where there are none, and where they cannot be decoded."""
        raw = self.raw["layers"].get(schema.encode_id(snapshot_id))
        return None if raw is None else _decoded(lambda: schema.decode_facts(raw))

    def stored_chain(self, snapshot_id: SnapshotId) -> tuple[SnapshotId, ...]:
        """Of a layer: its own id, and its ancestors', as the index has them."""
        raw = self.raw["chains"].get(schema.encode_id(snapshot_id))
        return (_decoded(lambda: schema.decode_chain(raw).ids) if raw else ()) or ()

    def ancestors(self, record: Record) -> Iterator[Record]:
        """The layers that a snapshot stands on, nearest first, up to one that is missing or comes again."""
        seen = {record.id}
        while record.parent_id in self.records and record.parent_id not in seen:
            record = self.records[record.parent_id]
            seen.add(record.id)
            yield record

    def has_sound_chain(self, record: Record) -> bool:
        """Whether all layers below it are there, and are layers."""
        lineage = [record, *self.ancestors(record)]
        return lineage[-1].parent_id is None and all(each.kind is Kind.COMMITTED for each in lineage[1:])

    def layers(self) -> list[Record]:
        """The committed snapshots."""
        return [record for record in self.records.values() if record.kind is Kind.COMMITTED]

    def title(self, snapshot_id: SnapshotId) -> str:
        """What a person calls it."""
        record = self.records.get(snapshot_id)
        return f"snapshot {snapshot_id}" + (f" {quote(record.name)}" if record else "")


def _record(key: bytes, value: bytes) -> Record | None:
    return _decoded(lambda: schema.decode_record(schema.decode_id(key), value))


def _decoded(decode: Callable[[], T]) -> T | None:
    try:
        return decode()
    except _UNREADABLE:
        return None
