"""The LMDB environment: opened once, read by anyone, written by one thread.

Writes are group commits: the writer thread takes all requests that wait, runs each in a child
transaction (one that fails undoes only itself), commits the parent transaction once, which syncs,
and only then answers. Readers see committed states and never wait.

LMDB facts that this rests on (lmdb.readthedocs.io, and the comments of lmdb.h): the map is address
space, not disk, so it is opened far larger than it can become and never resized (mdb_env_set_mapsize
under readers breaks them); child transactions need an environment without MDB_WRITEMAP; with
MDB_NOSYNC a system crash can corrupt the file, so syncing stays on. The engine is 0.9
(`lib_version=0`): 1.0 has another file format.

Each read writes into the table of readers, lock.mdb, which is mapped: on a filesystem that is frozen (fsfreeze(8))
that page fault waits, and with it, inside liblmdb, whoever wants the interpreter. So the table is in memory, on a tmpfs
that only this process has, where a link stands for the data file; the root's lock already keeps other writers away.
"""

from __future__ import annotations

import errno
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from snapshotter import failpoint, linux
from snapshotter.durable import sync_directory
from snapshotter.errors import Internal, ResourceExhausted, SnapshotterError, Unavailable
from snapshotter.meta import schema
from snapshotter.progress import join_until, waiting_for
from snapshotter.root import metadata_is_lost

MAP_BYTES = 1 << 40
_MAX_READERS = 1024
_SHORT_OF_SPACE_BYTES = 1 << 20

T = TypeVar("T")
Txn = Any
"""An lmdb.Transaction; the typed stub cannot say which of its two forms we hold."""


@dataclass(slots=True)
class _Request:
    act: Callable[[Tx], Any]
    future: Future[Any]


class Tx:
    """A transaction together with the databases of the schema."""

    __slots__ = ("chains", "children", "keys", "layers", "raw", "sealing", "snapshots", "store")

    def __init__(self, raw: Txn, databases: dict[str, Any]) -> None:
        self.raw = raw
        self.store = databases["store"]
        self.keys = databases["keys"]
        self.snapshots = databases["snapshots"]
        self.children = databases["children"]
        self.chains = databases["chains"]
        self.layers = databases["layers"]
        self.sealing = databases["sealing"]


class Store:
    """Owns the environment and the writer thread. `close` it."""

    def __init__(self, directory: Path, may_create: bool = True) -> None:
        """Opens or creates the environment.

        Raises FailedPrecondition, having changed nothing, for a newer schema, or for no metadata where
        `may_create` is false; Internal for a damaged file.
        """
        self._directory = directory
        self._place = _directory_in_memory()
        os.symlink(directory / "data.mdb", "data.mdb", dir_fd=self._place)
        try:
            self._env = lmdb.open(
                f"/proc/self/fd/{self._place}",
                map_size=MAP_BYTES,
                mode=0o600,
                max_dbs=16,
                max_readers=_MAX_READERS,
                max_spare_txns=64,
                readahead=False,
                lib_version=0,
            )
        except lmdb.Error as error:
            os.close(self._place)
            raise self._error("opening the metadata", error) from error
        try:
            self._cover_map()
            self._env.reader_check()
            self._check_version(may_create)
            self._databases = self._open_databases()
            # LMDB syncs its file, and not the directory that names it.
            sync_directory(directory, "sync.metadata")
        except BaseException as error:
            self._close_files()
            if isinstance(error, lmdb.Error):
                raise self._error("opening the metadata", error) from error
            raise
        self.batches = 0
        self._waiting: deque[_Request] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._writer = threading.Thread(target=self._write_loop, name="meta-writer", daemon=True)
        self._writer.start()

    def close(self, deadline_s: float = math.inf) -> None:
        """Commits what waits, then closes. Idempotent. When the writer still hangs in the kernel at `deadline_s`
        (time.monotonic), the end of the process closes."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        join_until(self._writer, deadline_s)
        if not self._writer.is_alive():
            self._close_files()

    def _close_files(self) -> None:
        self._env.close()
        if self._place >= 0:
            os.close(self._place)
        self._place = -1

    def engine_version(self) -> str:
        return ".".join(map(str, self._env.lib_version()))

    @contextmanager
    def read(self) -> Iterator[Tx]:
        """A consistent view. Keep it short: old pages cannot be reused meanwhile. Raises Internal for damage."""
        try:
            with self._env.begin() as txn:
                yield Tx(txn, self._databases)
        except lmdb.Error as error:
            raise self._error("reading the metadata", error) from error

    def write(self, act: Callable[[Tx], T]) -> T:
        """Runs `act` on the writer thread and returns its result once it is durable.

        `act` must be quick and touch nothing but the transaction: others wait for it. What it raises is
        raised here, and nothing of it is stored.
        """
        future: Future[T] = Future()
        with self._wake:
            if self._closing:
                raise Unavailable("the daemon is stopping; call again when it runs")
            self._waiting.append(_Request(act, future))
            self._wake.notify()
        with waiting_for(lambda: [self._writer.native_id or 0]):
            return future.result()

    def copy(self, directory: Path) -> None:
        """Writes a consistent copy of the file into an empty directory. Raises Internal, ResourceExhausted."""
        try:
            self._env.copy(str(directory))
        except lmdb.Error as error:
            raise self._error("copying the metadata", error) from error

    def _cover_map(self) -> None:
        """A file shorter than its meta page says would kill the process (SIGBUS) where the map ends behind it; read as
        zeros, a page that is missing is an error like any other. Free pages at the end may rightly be missing."""
        needed_bytes = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        data = self._directory / "data.mdb"
        if data.stat().st_size < needed_bytes:
            os.truncate(data, needed_bytes)

    def _check_version(self, may_create: bool) -> None:
        version = self._stored_version()
        if version is None and not may_create:
            raise metadata_is_lost(self._directory)
        schema.refuse_newer(version or 0, self._directory)

    def _stored_version(self) -> int | None:
        try:
            store = self._env.open_db(b"store", create=False)
        except lmdb.NotFoundError:
            return None
        with self._env.begin() as txn:
            found = txn.get(b"version", db=store)
        return None if found is None else schema.decode_u32(found)

    def _open_databases(self) -> dict[str, Any]:
        databases = {name: self._env.open_db(name.encode()) for name in schema.DATABASES}
        with self._env.begin(write=True) as txn:
            found = txn.get(b"version", db=databases["store"])
            version = schema.SCHEMA_VERSION if found is None else schema.decode_u32(found)
            tx = Tx(txn, databases)
            while version < schema.SCHEMA_VERSION:
                schema.MIGRATIONS[version](tx)
                version += 1
            if found != schema.encode_u32(version):  # a start that changes nothing writes nothing
                txn.put(b"version", schema.encode_u32(version), db=databases["store"])
        return databases

    def _write_loop(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._closing:
                    self._wake.wait()
                batch = list(self._waiting)
                self._waiting.clear()
            if not batch:
                return
            self._write_batch(batch)

    def _write_batch(self, batch: list[_Request]) -> None:
        outcomes: list[tuple[_Request, Any, BaseException | None]] = []
        try:
            failpoint.hit("meta.before-batch")
            with self._env.begin(write=True) as txn:
                outcomes.extend((request, *self._attempt(txn, request)) for request in batch)
        except (lmdb.Error, OSError) as error:
            # The transaction as a whole did not happen, whatever the single acts said.
            failure = self._error("writing the metadata", error)
            outcomes = [(request, None, failure) for request in batch]
        self.batches += 1
        for request, result, problem in outcomes:
            if problem is None:
                request.future.set_result(result)
            else:
                request.future.set_exception(problem)

    def _attempt(self, parent: Txn, request: _Request) -> tuple[Any, BaseException | None]:
        try:
            with self._env.begin(parent=parent, write=True) as child:
                return request.act(Tx(child, self._databases)), None
        except SnapshotterError as error:
            return None, error
        except lmdb.Error as error:
            return None, self._error("writing the metadata", error)
        except Exception as error:  # a bug in one act must not stop the writer for all
            return None, error

    def _error(self, act: str, error: lmdb.Error | OSError) -> SnapshotterError:
        # liblmdb hands errno values on, of which py-lmdb keeps the text; a short write it calls EIO.
        exhausted = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
        full = isinstance(error, lmdb.MapFullError) or any(text in str(error) for text in exhausted)
        if os.strerror(errno.EIO) in str(error):
            full = os.statvfs(self._directory).f_bavail * os.statvfs(self._directory).f_frsize < _SHORT_OF_SPACE_BYTES
        cls = ResourceExhausted if full else Internal
        return cls(f"{act} in {self._directory}: {error}")


def _directory_in_memory() -> int:
    """A tmpfs that is mounted nowhere and goes with this descriptor. Raises OSError."""
    filesystem = linux.fsopen("tmpfs")
    try:
        linux.fsconfig(filesystem, linux.FSCONFIG_CMD_CREATE)
        return linux.fsmount(filesystem, 0)
    finally:
        os.close(filesystem)
