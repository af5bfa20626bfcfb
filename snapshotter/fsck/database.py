"""The LMDB file: whether it is sound, and what is in it, without trusting it.

A file that breaks LMDB's rules can end the process that opens it (SIGSEGV, SIGBUS). So its bytes are looked at first by
py-lmdb's own verifier, which does not open it; and what opens it runs in a worker process.
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import lmdb
from lmdb.verify import VerifyError, verify

from snapshotter.durable import sync_directory
from snapshotter.errors import FailedPrecondition
from snapshotter.meta import schema
from snapshotter.meta.store import MAP_BYTES, Tx

Raw = dict[str, dict[bytes, bytes]]
"""Of each database of the schema: all keys and values."""

Change = tuple[str, bytes, bytes | None]
"""A database, a key, and the value that it gets; None deletes it."""

DATA = "data.mdb"
_MAX_PROBLEMS = 20


def problems(directory: Path) -> list[str]:
    """What breaks the rules of LMDB in the file of a directory that nobody writes to. Raises OSError."""
    try:
        found = verify(str(directory))  # type: ignore[no-untyped-call]
    except VerifyError as error:
        return [str(error)]
    return [str(line) for line in found[:_MAX_PROBLEMS]]


def read(directory: Path) -> Raw:
    """All that is in a file that nobody writes to. Run it in a worker process. Raises OSError."""
    try:
        with _open(directory, readonly=True, lock=False) as environment:
            return _read(environment)
    except lmdb.Error as error:
        raise OSError(str(error)) from error


def read_from(tx: Tx) -> Raw:
    """The same, of a store that is open."""
    return {name: dict(tx.raw.cursor(db=getattr(tx, name))) for name in schema.DATABASES}


def apply(directory: Path, changes: list[Change]) -> None:
    """Makes some changes in one transaction, which is durable when this returns. Run it in a worker process.
    Raises OSError."""
    try:
        with _open(directory) as environment:
            databases = {name: environment.open_db(name.encode()) for name, _, _ in changes}
            with environment.begin(write=True) as txn:
                for name, key, value in changes:
                    if value is None:
                        txn.delete(key, db=databases[name])
                    else:
                        txn.put(key, value, db=databases[name])
    except lmdb.Error as error:
        raise OSError(str(error)) from error


def write_anew(directory: Path, fresh: Path) -> None:
    """Makes a sound file in a new directory of all that can be read from an old one. Run it in a worker process.
    Raises OSError when something cannot be read, or does not arrive."""
    try:
        with _open(directory, readonly=True, lock=False) as environment:
            raw = _read(environment)
        fresh.mkdir(mode=0o700)
        with _open(fresh) as environment:
            databases = {name: environment.open_db(name.encode()) for name in raw}
            with environment.begin(write=True) as txn:
                for name, entries in raw.items():
                    for key, value in entries.items():
                        txn.put(key, value, db=databases[name])
    except lmdb.Error as error:
        raise OSError(str(error)) from error
    if problems(fresh) or read(fresh) != raw:
        shutil.rmtree(fresh)
        raise OSError("what was written anew is not what was read")
    sync_directory(fresh)


def _open(directory: Path, readonly: bool = False, lock: bool = True) -> lmdb.Environment:
    return lmdb.open(
        os.fspath(directory), map_size=MAP_BYTES, mode=0o600, max_dbs=16, readonly=readonly, lock=lock,
        create=not readonly, readahead=False, lib_version=0,
    )  # fmt: skip


def _read(environment: lmdb.Environment) -> Raw:
    """Raises lmdb.Error, OSError; FailedPrecondition for a newer schema."""
    raw: Raw = {}
    with environment.begin() as txn:
        present = {bytes(name).decode(errors="replace") for name, _ in txn.cursor()}
    for name in present.intersection(schema.DATABASES):
        database = environment.open_db(name.encode(), create=False)
        with environment.begin() as txn:
            raw[name] = {bytes(key): bytes(value) for key, value in txn.cursor(db=database)}
            if len(raw[name]) != txn.stat(database)["entries"]:
                raise OSError(f"some entries of {name} cannot be reached")
    try:
        version = schema.decode_u32(raw["store"][b"version"])
    except (KeyError, struct.error) as error:
        raise OSError("there is no version in it") from error
    if version > schema.SCHEMA_VERSION:
        raise FailedPrecondition(
            f"the metadata has schema version {version}, this program knows {schema.SCHEMA_VERSION}: it was written by "
            "a newer dedup-snapshotter; run that one"
        )
    return {name: raw.get(name, {}) for name in schema.DATABASES}
