"""Reads all of the metadata before anything opens it to write.

LMDB trusts what it reads: a page that is damaged, or missing at the end of the file, can end the process that meets
it (SIGSEGV, SIGBUS, SIGABRT). So a worker process does this, and a damaged store is refused as it is, not
discovered, half changed, while it is served.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb

from snapshotter.errors import Internal
from snapshotter.meta import schema
from snapshotter.meta.store import MAP_BYTES
from snapshotter.workers.pool import WorkerDied, Workers

_NOT_AS_PACKED = (lmdb.Error, struct.error, ValueError, KeyError, TypeError)
"""What reading and unpacking raise; a decoding error is a ValueError."""


def check(directory: Path, workers: Workers) -> None:
    """Changes nothing. Raises FailedPrecondition for a newer schema, Internal for damage."""
    if not (directory / "data.mdb").exists():
        return
    try:
        workers.call_once(read_all, directory)
    except WorkerDied as error:
        raise _damaged(directory, error) from error


def read_all(directory: Path) -> None:
    """As `check`, but damage may also end the process."""
    options = {"readonly": True, "lock": False, "create": False, "readahead": False}
    try:
        with (
            lmdb.open(str(directory), map_size=MAP_BYTES, max_dbs=16, lib_version=0, **options) as environment,
            environment.begin() as txn,
        ):
            version = _version(environment, txn)
            schema.refuse_newer(version, directory)
            if version:
                _read_databases(environment, txn, version)
    except _NOT_AS_PACKED as error:
        raise _damaged(directory, error) from error


def _damaged(directory: Path, error: Exception) -> Internal:
    what = type(error).__name__ if isinstance(error, KeyError) else str(error)
    return Internal(f"the metadata in {directory} is damaged ({what}): restore it, or begin anew with an empty root")


def _version(environment: Any, txn: Any) -> int:
    """0 where nothing was ever stored."""
    try:
        store = environment.open_db(b"store", txn=txn, create=False)
    except lmdb.NotFoundError:
        return 0
    raw = txn.get(b"version", db=store)
    return 0 if raw is None else schema.decode_u32(raw)


def _read_databases(environment: Any, txn: Any, version: int) -> None:
    """Raises one of _NOT_AS_PACKED."""
    entries = {name: dict(_entries(environment, txn, name, version)) for name in schema.DATABASES}
    names = defaultdict[bytes, set[bytes]](set)
    for raw_id, raw in entries["snapshots"].items():
        record = schema.decode_record(schema.decode_id(raw_id), raw)
        names[schema.key_digest(record.name)].add(raw_id)
        if record.parent_id is not None:
            entries["chains"][schema.encode_id(record.parent_id)]
    for raw_id, raw in entries["sealing"].items():
        names[schema.key_digest(schema.decode_record(schema.decode_id(raw_id), raw).name)].add(raw_id)
    # Of two snapshots with one name, which should not be, one can be reached, and removed.
    if names.keys() != entries["keys"].keys() or any(entries["keys"][name] not in ids for name, ids in names.items()):
        raise ValueError("keys and snapshots disagree")
    for raw in entries["chains"].values():
        schema.decode_chain(raw)
    for raw in entries["layers"].values():
        schema.decode_facts(raw)


def _entries(environment: Any, txn: Any, name: str, version: int) -> Iterator[tuple[bytes, bytes]]:
    try:
        database = environment.open_db(name.encode(), txn=txn, create=False)
    except lmdb.NotFoundError:
        if version == schema.SCHEMA_VERSION:
            raise
        return
    yield from txn.cursor(db=database)
