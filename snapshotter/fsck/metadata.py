"""The metadata by itself: whether records and indexes agree with each other. Pure: it reads no disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from snapshotter.fsck.database import Change
from snapshotter.fsck.findings import Finding
from snapshotter.fsck.fixes import ChangeMetadata
from snapshotter.fsck.image import Image
from snapshotter.meta import schema
from snapshotter.meta.schema import Chain, Record
from snapshotter.model import Kind, SnapshotId
from snapshotter.overlay.features import Feature

_RECORD_TABLES = ("chains", "layers", "sealing")
"""Databases that are keyed by the id of a snapshot, beside the records."""


def check(image: Image, ids_on_disk: frozenset[int]) -> Iterator[Finding]:
    """`ids_on_disk`: of directories in snapshots/."""
    if image.damaged:
        # What is missing elsewhere may be theirs: one thing after the other.
        yield from _damaged(image, ids_on_disk)
        return
    yield from _lost(image, ids_on_disk)
    yield from _names(image)
    misplaced = dict(_parents(image))
    yield from misplaced.values()
    yield from _children(image, misplaced)
    yield from _chains(image, misplaced)
    yield from _next_id(image)
    yield from _facts(image)


def features(image: Image, needs: Mapping[SnapshotId, Feature]) -> Iterator[Finding]:
    """`needs`: what reading each tree takes."""
    for snapshot_id, needed in needs.items():
        record = image.records[snapshot_id]
        if lacking := needed & ~record.features:
            words = ", ".join(feature.name.lower() for feature in Feature if feature in lacking and feature.name)
            fixed = replace(record, features=record.features | lacking)
            yield _finding(image, "features", record.id, f"not recorded: {words}", [_put(fixed)])


def _finding(image: Image, kind: str, about: SnapshotId, detail: str, changes: list[Change] | None) -> Finding:
    return Finding(kind, image.title(about), detail, about, ChangeMetadata(tuple(changes)) if changes else None)


def _put(record: Record) -> Change:
    return "snapshots", schema.encode_id(record.id), schema.encode_record(record)


def _damaged(image: Image, ids_on_disk: frozenset[int]) -> Iterator[Finding]:
    for key, value in image.damaged.items():
        is_id = len(key) == len(schema.encode_id(0))
        damaged_id = schema.decode_id(key) if is_id else None
        subject = f"snapshot {damaged_id}" if is_id else f"record {key.hex()}"
        aside = damaged_id if damaged_id in ids_on_disk else None
        note = f"its record was, in hexadecimal: {value.hex()}"
        fix = ChangeMetadata((("snapshots", key, None),), note=note, aside=aside)
        yield Finding("record-damaged", subject, f"{len(value)} bytes", damaged_id, fix)


def _lost(image: Image, ids_on_disk: frozenset[int]) -> Iterator[Finding]:
    """Snapshots that are named somewhere, and have no record; and those that lack what a record promises."""
    named: dict[int, list[Change]] = defaultdict(list)
    for table in _RECORD_TABLES:
        for key in image.raw[table]:
            named[_id(key)].append((table, key, None))
    for key, value in image.raw["keys"].items():
        named[_id(value)].append(("keys", key, None))
    for key in image.raw["children"]:
        named[_id(key[8:])].append(("children", key, None))
    for lost_id in sorted(named.keys() - image.records.keys()):
        where = ", ".join(sorted({table for table, _, _ in named[lost_id]}))
        aside = SnapshotId(lost_id) if lost_id in ids_on_disk else None
        fix = ChangeMetadata(tuple(named[lost_id]), aside=aside)
        yield Finding("record-lost", f"snapshot {lost_id}", f"named in {where}", SnapshotId(lost_id), fix)
    for record in image.records.values():
        if record.sealing and record.id not in image.before:
            stand_in = replace(record, name=f"fsck-{record.id}", kind=Kind.ACTIVE, sealing=False)
            changes: list[Change] = [("sealing", schema.encode_id(record.id), schema.encode_record(stand_in))]
            yield _finding(image, "sealing-lost", record.id, "", changes)
        elif not record.sealing and schema.encode_id(record.id) in image.raw["sealing"]:
            detail = "it is sealed, and is named in sealing"
            changes = [("sealing", schema.encode_id(record.id), None)]
            yield _finding(image, "record-lost", record.id, detail, changes)
        if record.kind is not Kind.COMMITTED and schema.encode_id(record.id) in image.raw["chains"]:
            changes = [("chains", schema.encode_id(record.id), None)]
            yield _finding(image, "chain-index", record.id, "it is no layer, and has a chain", changes)


def _id(raw: bytes) -> int:
    """0, which no snapshot has, for what is no id."""
    return schema.decode_id(raw) if len(raw) == len(schema.encode_id(0)) else 0


def _names(image: Image) -> Iterator[Finding]:
    owners: dict[bytes, list[SnapshotId]] = defaultdict(list)
    for record in image.records.values():
        owners[schema.key_digest(record.name)].append(record.id)
        if record.sealing and record.id in image.before:
            owners[schema.key_digest(image.before[record.id].name)].append(record.id)
    keys = image.raw["keys"]
    for digest, ids in owners.items():
        if len(ids) > 1:
            titles = ", ".join(map(image.title, ids))
            yield Finding("name-twice", image.title(ids[0]), titles, ids[0])
        elif keys.get(digest) != schema.encode_id(ids[0]):
            found = "nothing" if digest not in keys else f"snapshot {_id(keys[digest])}"
            changes: list[Change] = [("keys", digest, schema.encode_id(ids[0]))]
            yield _finding(image, "key-index", ids[0], f"its name leads to {found}", changes)
    for digest in keys.keys() - owners.keys():
        if _id(keys[digest]) in image.records:
            about = SnapshotId(_id(keys[digest]))
            # A snapshot that is sealing, and does not say what it was, has this of its old key.
            yield _finding(image, "key-index", about, "another name leads to it", [("keys", digest, None)])


def _parents(image: Image) -> Iterator[tuple[SnapshotId, Finding]]:
    """Snapshots whose parent cannot be what their record says."""
    for record in image.records.values():
        if record.parent_id is None:
            continue
        parent = image.records.get(record.parent_id)
        if parent is None:
            kind, detail = "parent-missing", f"its parent is snapshot {record.parent_id}"
        elif parent.kind is not Kind.COMMITTED:
            kind, detail = "parent-not-committed", f"its parent is {image.title(parent.id)}"
        elif _is_in_cycle(image, record):
            kind, detail = "cycle", f"by way of {image.title(parent.id)}"
        else:
            continue
        changes = None
        for witnessed in _witnessed_parents(image, record):
            changes = [_put(replace(record, parent_id=witnessed))]
            detail += f"; was {image.title(witnessed) if witnessed else 'none'}"
        yield record.id, _finding(image, kind, record.id, detail, changes)


def _is_in_cycle(image: Image, record: Record) -> bool:
    return any(above.parent_id == record.id for above in image.ancestors(record))


def _witnessed_parents(image: Image, record: Record) -> list[SnapshotId | None]:
    """What the indexes say that the parent is (None: that there is none), if they agree on another one than the record,
    and it can be; else nothing."""
    in_index = {SnapshotId(_id(key[:8])) for key in image.raw["children"] if _id(key[8:]) == record.id}
    in_index.discard(record.parent_id or SnapshotId(0))
    if record.kind is Kind.COMMITTED:
        chain = image.stored_chain(record.id)
        if chain[:1] != (record.id,) or in_index != set(chain[1:2]):
            return []
        if not in_index:
            return [None]
    if len(in_index) != 1:
        return []
    (found,) = in_index
    parent = image.records.get(found)
    if parent is None or parent.kind is not Kind.COMMITTED or record.id in _chain_ids(image, parent):
        return []
    return [found]


def _chain_ids(image: Image, record: Record) -> tuple[SnapshotId, ...]:
    return (record.id, *(above.id for above in image.ancestors(record)))


def _children(image: Image, misplaced: Mapping[SnapshotId, Finding]) -> Iterator[Finding]:
    wanted = {
        schema.encode_child(record.parent_id, record.id): record.id
        for record in image.records.values()
        if record.parent_id is not None
    }
    for key in wanted.keys() - image.raw["children"].keys():
        if wanted[key] not in misplaced:
            yield _finding(image, "child-index", wanted[key], "its parent does not know it", [("children", key, b"")])
    for key in image.raw["children"].keys() - wanted.keys():
        child = SnapshotId(_id(key[8:]))
        if child in image.records and child not in misplaced:
            detail = f"snapshot {_id(key[:8])} takes it for its child"
            yield _finding(image, "child-index", child, detail, [("children", key, None)])


def _chains(image: Image, misplaced: Mapping[SnapshotId, Finding]) -> Iterator[Finding]:
    for record in image.layers():
        lineage = [record, *image.ancestors(record)]
        if any(each.id in misplaced for each in lineage):
            continue
        needs = Feature(0)
        for each in lineage:
            needs |= each.features
        wanted = schema.encode_chain(Chain(tuple(each.id for each in lineage), needs))
        key = schema.encode_id(record.id)
        if image.raw["chains"].get(key) != wanted:
            yield _finding(image, "chain-index", record.id, "", [("chains", key, wanted)])


def _next_id(image: Image) -> Iterator[Finding]:
    highest = max(image.records, default=0)
    if image.records and image.next_id <= highest:
        change = ("store", b"next_id", schema.encode_id(highest + 1))
        detail = f"it is {image.next_id}, and there is {image.title(SnapshotId(highest))}"
        yield Finding("next-id", "metadata", detail, fix=ChangeMetadata((change,)))


def _facts(image: Image) -> Iterator[Finding]:
    for key in image.raw["layers"]:
        about = SnapshotId(_id(key))
        if about in image.records and image.facts(about) is None:
            yield _finding(image, "facts-damaged", about, "", [("layers", key, None)])
