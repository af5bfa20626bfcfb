"""The snapshot graph inside one transaction: look up, insert, commit, remove, relabel.

Every function takes the transaction first and either does all of its change or raises. The rules
(which state may become which, and what containerd expects of the error) live here and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from snapshotter.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, quote
from snapshotter.meta import schema
from snapshotter.meta.schema import Chain, Facts, Record
from snapshotter.meta.store import Tx
from snapshotter.model import MAX_CHAIN, MAX_LABELS_BYTES, Commitment, Creation, Kind, SnapshotId, Usage
from snapshotter.overlay.features import NO_FEATURES, Feature


@dataclass(frozen=True, slots=True)
class Layer:
    """What Commit made of an active snapshot's upper."""

    id: SnapshotId
    """The active snapshot's own where its upper became the layer, a new one where the layer is a copy."""
    usage: Usage
    needs: Feature
    sealing: bool


@dataclass(frozen=True, slots=True)
class Sealed:
    """What sealing made of a layer."""

    usage: Usage
    needs: Feature
    facts: Facts | None
    """None if no files were shared."""


class StillSealing(Exception):
    """What was asked for needs a snapshot that is past its commit point and not sealed yet: wait for it."""

    def __init__(self, snapshot_id: SnapshotId, shown: Record | None) -> None:
        super().__init__(snapshot_id)
        self.id = snapshot_id
        self.shown = shown
        """Who only looks sees this: the active snapshot under its key, nothing under the new name."""


def find(tx: Tx, name: str) -> Record | None:
    """Raises StillSealing."""
    raw_id = tx.raw.get(schema.key_digest(name), db=tx.keys)
    if raw_id is None:
        return None
    record = by_id(tx, schema.decode_id(raw_id))
    if record.sealing:
        before = _before_sealing(tx, record.id)
        raise StillSealing(record.id, before if before.name == name else None)
    return record


def get(tx: Tx, name: str) -> Record:
    """Raises NotFound, StillSealing."""
    record = find(tx, name)
    if record is None:
        raise NotFound(f"snapshot {quote(name)} does not exist")
    return record


def by_id(tx: Tx, snapshot_id: SnapshotId) -> Record:
    raw = tx.raw.get(schema.encode_id(snapshot_id), db=tx.snapshots)
    return schema.decode_record(snapshot_id, raw)


def knows_id(tx: Tx, snapshot_id: SnapshotId) -> bool:
    return tx.raw.get(schema.encode_id(snapshot_id), db=tx.snapshots) is not None


def parent_name(tx: Tx, record: Record) -> str:
    """Empty without a parent."""
    if record.parent_id is None:
        return ""
    return schema.decode_name(tx.raw.get(schema.encode_id(record.parent_id), db=tx.snapshots))


def every(tx: Tx) -> Iterator[Record]:
    """All snapshots, oldest first, as they are stored."""
    for raw_id, raw in tx.raw.cursor(db=tx.snapshots):
        yield schema.decode_record(schema.decode_id(raw_id), raw)


def visible(tx: Tx) -> Iterator[Record]:
    """All snapshots as who looks may see them: those that are being sealed are still the active ones they were."""
    for record in every(tx):
        yield _before_sealing(tx, record.id) if record.sealing else record


def chain_below(tx: Tx, record: Record) -> Chain:
    """The layers that `record` stands on, without itself."""
    return _chain_of(tx, record.parent_id)


def chain_of(tx: Tx, committed: Record | None) -> Chain:
    """The layers that a child of `committed` stands on."""
    return _chain_of(tx, committed.id if committed else None)


def has_children(tx: Tx, snapshot_id: SnapshotId) -> bool:
    prefix = schema.encode_id(snapshot_id)
    cursor = tx.raw.cursor(db=tx.children)
    return bool(cursor.set_range(prefix)) and bool(cursor.key().startswith(prefix))


def next_id(tx: Tx) -> SnapshotId:
    """The lowest id that was never used."""
    raw = tx.raw.get(b"next_id", db=tx.store)
    return SnapshotId(1) if raw is None else schema.decode_id(raw)


def check_creatable(tx: Tx, want: Creation) -> Record | None:
    """The parent's record.

    Raises, in the order that containerd asks for: NotFound or InvalidArgument for the parent,
    AlreadyExists for the key, FailedPrecondition for a chain that could not be mounted.
    """
    above = None
    if want.parent:
        above = find(tx, want.parent)
        if above is None:
            raise NotFound(f"parent {quote(want.parent)} of snapshot {quote(want.key)} does not exist")
        if above.kind is not Kind.COMMITTED:
            raise InvalidArgument(f"parent {quote(want.parent)} of snapshot {quote(want.key)} is not committed")
    if find(tx, want.key) is not None:
        raise AlreadyExists(f"snapshot {quote(want.key)} already exists")
    if want.kind is Kind.ACTIVE:
        _check_depth(chain_of(tx, above), want.key)
    return above


def insert(
    tx: Tx, snapshot_id: SnapshotId, want: Creation, features: Feature = NO_FEATURES, materialized: bool = False
) -> Record:
    """A new active snapshot or view. Raises what `check_creatable` raises, and InvalidArgument."""
    above = check_creatable(tx, want)
    parent_id = above.id if above else None
    now = time.time_ns()
    labels = _stored_labels(want.key, want.labels)
    record = Record(
        snapshot_id,
        want.key,
        want.kind,
        parent_id,
        now,
        now,
        labels,
        features=features,
        materialized=materialized,
    )
    _put(tx, record)
    return record


def check_committable(tx: Tx, want: Commitment) -> Record:
    """The active snapshot's record, or the error that Commit has to answer."""
    if find(tx, want.name) is not None:
        raise AlreadyExists(f"snapshot {quote(want.name)} already exists; {quote(want.key)} was not committed")
    record = get(tx, want.key)
    if record.kind is not Kind.ACTIVE:
        what = "a view" if record.kind is Kind.VIEW else "already committed"
        raise FailedPrecondition(f"snapshot {quote(want.key)} is {what} and cannot be committed")
    if want.parent and want.parent != parent_name(tx, record):
        if record.parent_id is not None:
            raise InvalidArgument(
                f"snapshot {quote(want.key)} was prepared on another parent than {quote(want.parent)}, "
                "and Commit cannot change it"
            )
        above = find(tx, want.parent)
        if above is None:
            raise NotFound(f"parent {quote(want.parent)} for snapshot {quote(want.key)} does not exist")
        if above.kind is not Kind.COMMITTED:
            raise FailedPrecondition(f"parent {quote(want.parent)} for snapshot {quote(want.key)} is not committed")
        if record.materialized:
            # It was mounted over an empty lower, so its top directories are opaque: they would hide the parent's.
            raise FailedPrecondition(
                f"snapshot {quote(want.key)} is mounted by the daemon without a parent and cannot be given one by "
                "Commit; only an extraction snapshot can"
            )
        _check_depth(chain_of(tx, above), want.key)
    return record


def commit(tx: Tx, want: Commitment, layer: Layer) -> Record:
    """Turns an active snapshot into a committed one. Raises what `check_committable` raises, and InvalidArgument."""
    active = check_committable(tx, want)
    parent_id = get(tx, want.parent).id if want.parent else active.parent_id
    now = max(time.time_ns(), active.updated_ns)
    labels = _stored_labels(want.name, want.labels)
    record = Record(
        layer.id,
        want.name,
        Kind.COMMITTED,
        parent_id,
        now,
        now,
        labels,
        layer.usage,
        layer.needs,
        layer.sealing,
    )
    _delete(tx, active)
    _put(tx, record)
    _put_chain(tx, record)
    if record.sealing:
        tx.raw.put(schema.encode_id(record.id), schema.encode_record(active), db=tx.sealing)
        tx.raw.put(schema.key_digest(active.name), schema.encode_id(record.id), db=tx.keys)
    return record


def sealed(tx: Tx, snapshot_id: SnapshotId, outcome: Sealed) -> None:
    """From now on the snapshot is what it was committed as."""
    record = by_id(tx, snapshot_id)
    if not record.sealing:
        return
    tx.raw.delete(schema.key_digest(_before_sealing(tx, snapshot_id).name), db=tx.keys)
    tx.raw.delete(schema.encode_id(snapshot_id), db=tx.sealing)
    raw_id = schema.encode_id(snapshot_id)
    record = replace(record, usage=outcome.usage, features=outcome.needs, sealing=False)
    tx.raw.put(raw_id, schema.encode_record(record), db=tx.snapshots)
    _put_chain(tx, record)
    if outcome.facts:
        tx.raw.put(raw_id, schema.encode_facts(outcome.facts), db=tx.layers)


def take_back(tx: Tx, snapshot_id: SnapshotId) -> None:
    """Undoes the commit of a snapshot that is being sealed."""
    active = _before_sealing(tx, snapshot_id)
    raw_id = schema.encode_id(snapshot_id)
    _delete(tx, by_id(tx, snapshot_id))
    tx.raw.delete(raw_id, db=tx.sealing)
    tx.raw.delete(raw_id, db=tx.chains)
    _put(tx, active)


def facts_of(tx: Tx, snapshot_id: SnapshotId) -> Facts | None:
    """None of a layer whose files were not shared."""
    raw = tx.raw.get(schema.encode_id(snapshot_id), db=tx.layers)
    return None if raw is None else schema.decode_facts(raw)


def remove(tx: Tx, name: str) -> SnapshotId:
    """Forgets a snapshot, one that is being sealed under either of its names; its id.

    Raises NotFound, or FailedPrecondition if others stand on it.
    """
    raw_id = tx.raw.get(schema.key_digest(name), db=tx.keys)
    if raw_id is None:
        raise NotFound(f"snapshot {quote(name)} does not exist")
    record = by_id(tx, schema.decode_id(raw_id))
    if has_children(tx, record.id):
        raise FailedPrecondition(f"cannot remove snapshot {quote(name)}: it has children; remove them first")
    if record.sealing:
        tx.raw.delete(schema.key_digest(_before_sealing(tx, record.id).name), db=tx.keys)
        tx.raw.delete(raw_id, db=tx.sealing)
    _delete(tx, record)
    tx.raw.delete(raw_id, db=tx.chains)
    tx.raw.delete(raw_id, db=tx.layers)
    return record.id


def relabel(tx: Tx, name: str, labels: dict[str, str], paths: Sequence[str]) -> Record:
    """Replaces all labels, or those that the field mask `paths` names. Raises NotFound, InvalidArgument."""
    record = get(tx, name)
    merged = dict(record.labels)
    for path in dict.fromkeys(paths) or ("labels",):  # a repeated one changes nothing, but could copy all labels
        if path == "labels":
            merged = dict(labels)
        elif path.startswith("labels."):
            key = path.removeprefix("labels.")
            merged[key] = labels.get(key, "")
        else:
            raise InvalidArgument(
                f"cannot update {quote(path)} of snapshot {quote(name)}: only labels and labels.KEY change"
            )
    changed = replace(
        record, labels=_stored_labels(name, merged), updated_ns=max(time.time_ns(), record.updated_ns + 1)
    )
    tx.raw.put(schema.encode_id(record.id), schema.encode_record(changed), db=tx.snapshots)
    return changed


def _check_depth(chain: Chain, name: str) -> None:
    """Raises FailedPrecondition if a layer on top of `chain` could never be mounted."""
    if len(chain.ids) >= MAX_CHAIN:
        raise FailedPrecondition(
            f"snapshot {quote(name)} would be layer {len(chain.ids) + 1} of its chain; "
            f"overlayfs mounts at most {MAX_CHAIN}: flatten the image"
        )


def _before_sealing(tx: Tx, snapshot_id: SnapshotId) -> Record:
    return schema.decode_record(snapshot_id, tx.raw.get(schema.encode_id(snapshot_id), db=tx.sealing))


def _put(tx: Tx, record: Record) -> None:
    raw_id = schema.encode_id(record.id)
    tx.raw.put(raw_id, schema.encode_record(record), db=tx.snapshots)
    tx.raw.put(schema.key_digest(record.name), raw_id, db=tx.keys)
    if record.parent_id is not None:
        tx.raw.put(schema.encode_child(record.parent_id, record.id), b"", db=tx.children)
    if record.id >= next_id(tx):
        tx.raw.put(b"next_id", schema.encode_id(record.id + 1), db=tx.store)


def _delete(tx: Tx, record: Record) -> None:
    tx.raw.delete(schema.key_digest(record.name), db=tx.keys)
    tx.raw.delete(schema.encode_id(record.id), db=tx.snapshots)
    if record.parent_id is not None:
        tx.raw.delete(schema.encode_child(record.parent_id, record.id), db=tx.children)


def _put_chain(tx: Tx, committed: Record) -> None:
    below = _chain_of(tx, committed.parent_id)
    chain = Chain((committed.id, *below.ids), below.features | committed.features)
    tx.raw.put(schema.encode_id(committed.id), schema.encode_chain(chain), db=tx.chains)


def _chain_of(tx: Tx, committed_id: SnapshotId | None) -> Chain:
    if committed_id is None:
        return Chain()
    return schema.decode_chain(tx.raw.get(schema.encode_id(committed_id), db=tx.chains))


def _stored_labels(name: str, labels: dict[str, str]) -> dict[str, str]:
    """Without empty values, as containerd stores them. Raises InvalidArgument if they are too large."""
    kept = {key: value for key, value in labels.items() if value}
    size_bytes = sum(len(key.encode()) + len(value.encode()) for key, value in kept.items())
    if size_bytes > MAX_LABELS_BYTES:
        raise InvalidArgument(
            f"the labels of snapshot {quote(name)} take {size_bytes} bytes; at most {MAX_LABELS_BYTES} fit"
        )
    return kept
