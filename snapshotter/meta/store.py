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
that page fault waits, and with it, inside liblmdb, whoever wants the interpreter; without space, or on one that became
read-only, it is SIGBUS. So the table is in memory, on a tmpfs that only this process has, where a link stands for the
data file; the root's lock already keeps other writers away.

After a failed write of a meta page nothing can be read or written (MDB_PANIC) until the environment is opened again. On
a full disk what frees space still works (meta.reserve).
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
from typing import Any, TypeAlias, TypeVar

import lmdb
import structlog

from snapshotter import failpoint, linux
from snapshotter.durable import sync_directory
from snapshotter.errors import (
    NO_SPACE,
    READ_ONLY_HINT,
    Internal,
    ResourceExhausted,
    SnapshotterError,
    Unavailable,
    from_os_error,
)
from snapshotter.meta import schema
from snapshotter.meta.reserve import ENOUGH_BYTES, LEAST_BYTES, Reserve
from snapshotter.progress import join_until, waiting_for
from snapshotter.root import metadata_is_lost

log = structlog.get_logger()

MAP_BYTES = 1 << 40
_MAX_READERS = 1024
_SHORT_OF_SPACE_BYTES = 1 << 20
_LOCK_FILE_BYTES = 128 << 10
"""More than a header and 64 bytes a reader."""

T = TypeVar("T")
Txn = Any
"""An lmdb.Transaction; the typed stub cannot say which of its two forms we hold."""


@dataclass(slots=True)
class _Request:
    act: Callable[[Tx], Any]
    frees_space: bool
    future: Future[Any]


_Outcome: TypeAlias = tuple[_Request, Any, BaseException | None]


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
        self._gate = threading.Condition()
        self._readers = 0
        self._broken: str | None = None
        """Why the environment is closed."""
        try:
            self._open(may_create)
            # LMDB syncs its file, and not the directory that names it.
            sync_directory(directory, "sync.metadata")
            self._reserve = Reserve(directory / "data.mdb")
        except OSError as error:
            raise from_os_error(f"opening the metadata in {directory}", error) from error
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
            self._env.close()

    def engine_version(self) -> str:
        return ".".join(map(str, self._env.lib_version()))

    @contextmanager
    def read(self) -> Iterator[Tx]:
        """A consistent view. Keep it short: old pages cannot be reused meanwhile; and never open one inside another.
        Raises Internal for damage, Unavailable where the metadata was closed and cannot be opened again."""
        if self._broken:
            # Most calls read before they write: were it left to those, it would stay closed.
            self.write(lambda _tx: None, frees_space=True)
        try:
            with self._begin_reading() as txn:
                yield Tx(txn, self._databases)
        except lmdb.Error as error:
            raise self._error("reading the metadata", error) from error

    @contextmanager
    def _begin_reading(self) -> Iterator[Txn]:
        txn = None
        with self._gate:
            while txn is None:
                if self._broken:
                    raise Unavailable(self._broken)
                try:
                    txn = self._env.begin()
                except lmdb.PanicError:
                    # The writer has met it, too, and opens the environment again.
                    with waiting_for(lambda: [self._writer.native_id or 0]):
                        self._gate.wait()
            self._readers += 1
        try:
            with txn:
                yield txn
        finally:
            with self._gate:
                self._readers -= 1
                self._gate.notify_all()

    def write(self, act: Callable[[Tx], T], frees_space: bool = False) -> T:
        """Runs `act` on the writer thread and returns its result once it is durable.

        `act` must be quick and touch nothing but the transaction: others wait for it; it may run more than once. What
        it raises is raised here, and nothing of it is stored. Where the disk is full, only what `frees_space` may use
        the last of the reserve; everything else is ResourceExhausted.
        """
        future: Future[T] = Future()
        with self._wake:
            if self._closing:
                raise Unavailable("the daemon is stopping; call again when it runs")
            self._waiting.append(_Request(act, frees_space, future))
            self._wake.notify()
        with waiting_for(lambda: [self._writer.native_id or 0]):
            return future.result()

    def copy(self, directory: Path) -> None:
        """Writes a consistent copy of the file into an empty directory. Raises Internal, ResourceExhausted."""
        try:
            with self._begin_reading():  # so that nobody opens the environment again meanwhile
                self._env.copy(str(directory))
        except lmdb.Error as error:
            raise self._error("copying the metadata", error) from error

    def _open(self, may_create: bool) -> None:
        """Raises SnapshotterError, OSError; then nothing is open."""
        try:
            self._env = _open_environment(self._directory)
        except lmdb.Error as error:
            raise self._error("opening the metadata", error) from error
        try:
            self._cover_map()
            self._check_version(may_create)
            self._databases = self._open_databases()
        except lmdb.Error as error:
            self._env.close()
            raise self._error("opening the metadata", error) from error
        except BaseException:
            self._env.close()
            raise

    def _reopen(self) -> None:
        """On the writer thread: makes the environment usable again, once nobody reads from it."""
        with self._gate:
            while self._readers:
                self._gate.wait()
            self._env.close()
            try:
                self._open(may_create=False)
                self._broken = None
                log.warning("metadata.reopened", directory=str(self._directory))
            except (SnapshotterError, OSError) as error:
                self._broken = f"the metadata cannot be opened again: {error}"
                log.error("metadata.closed", directory=str(self._directory), reason=str(error))
            self._gate.notify_all()

    def _has_panicked(self) -> bool:
        try:
            self._env.begin().abort()
        except lmdb.PanicError:
            return True
        except lmdb.Error:
            return False
        return False

    def _last_transaction(self) -> int:
        return int(self._env.info()["last_txnid"])

    def _used_bytes(self) -> int:
        return int((self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"])

    def _cover_map(self) -> None:
        """A file shorter than its meta page says would kill the process (SIGBUS) where the map ends behind it; read as
        zeros, a page that is missing is an error like any other. Free pages at the end may rightly be missing."""
        needed_bytes = self._used_bytes()
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
        if self._broken:
            self._reopen()
        if self._broken:
            outcomes: list[_Outcome] = [(request, None, Unavailable(self._broken)) for request in batch]
        else:
            spare_bytes = self._top_up()
            if len(batch) == 1:
                outcomes = self._commit_one(batch[0], spare_bytes)
            elif spare_bytes < ENOUGH_BYTES or _is_short_of_space(outcomes := self._commit(batch)):
                # Each takes its turn: those that free space must not fail for what the others want.
                for request in batch:
                    self._write_batch([request])
                return
        for request, result, problem in outcomes:
            if problem is None:
                request.future.set_result(result)
            else:
                request.future.set_exception(problem)

    def _commit_one(self, request: _Request, spare_bytes: int) -> list[_Outcome]:
        if spare_bytes < LEAST_BYTES and not request.frees_space:
            what = f"no space is left for the metadata in {self._directory}: remove snapshots, or free space otherwise"
            return [(request, None, ResourceExhausted(what))]
        outcomes = self._commit([request])
        if request.frees_space and _is_short_of_space(outcomes) and self._reserve.spend() and not self._broken:
            outcomes = self._commit([request])
        return outcomes

    def _top_up(self) -> int:
        """The reserve, in bytes."""
        try:
            return self._reserve.top_up(self._used_bytes())
        except OSError as error:
            log.warning("metadata.no_reserve", directory=str(self._directory), reason=str(error))
            return ENOUGH_BYTES  # what is wrong, the write will say

    def _commit(self, batch: list[_Request]) -> list[_Outcome]:
        """One transaction."""
        outcomes: list[_Outcome] = []
        before = self._last_transaction()
        try:
            failpoint.hit("meta.before-batch")
            with self._env.begin(write=True) as txn:
                outcomes.extend((request, *self._attempt(txn, request)) for request in batch)
        except (lmdb.Error, OSError) as error:
            # The transaction as a whole did not happen, whatever the single acts said.
            failure = self._error("writing the metadata", error)
            if self._has_panicked():
                self._reopen()
                if not self._broken and self._last_transaction() > before:
                    return outcomes  # it did: its meta page was written, and only what came then failed
            outcomes = [(request, None, failure) for request in batch]
        self.batches += 1
        return outcomes

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
        text = f"{act} in {self._directory}: {error}"
        if os.strerror(errno.EROFS) in str(error):
            return Unavailable(f"{text}: {READ_ONLY_HINT}")
        full = isinstance(error, lmdb.MapFullError) or any(os.strerror(number) in str(error) for number in NO_SPACE)
        if os.strerror(errno.EIO) in str(error):
            full = os.statvfs(self._directory).f_bavail * os.statvfs(self._directory).f_frsize < _SHORT_OF_SPACE_BYTES
        return ResourceExhausted(text) if full else Internal(text)


def _open_environment(directory: Path) -> Any:
    """Raises lmdb.Error, OSError."""
    place = _directory_in_memory()
    try:
        os.symlink(directory / "data.mdb", "data.mdb", dir_fd=place)
        lock = os.open("lock.mdb", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=place)
        try:
            os.posix_fallocate(lock, 0, _LOCK_FILE_BYTES)
        finally:
            os.close(lock)
        return lmdb.open(
            f"/proc/self/fd/{place}",
            map_size=MAP_BYTES,
            mode=0o600,
            max_dbs=16,
            max_readers=_MAX_READERS,
            max_spare_txns=64,
            readahead=False,
            lib_version=0,
        )
    finally:
        os.close(place)  # what is open stays


def _directory_in_memory() -> int:
    """A tmpfs that is mounted nowhere and goes with what is open in it. Raises OSError."""
    filesystem = linux.fsopen("tmpfs")
    try:
        linux.fsconfig(filesystem, linux.FSCONFIG_CMD_CREATE)
        return linux.fsmount(filesystem, 0)
    finally:
        os.close(filesystem)


def _is_short_of_space(outcomes: list[_Outcome]) -> bool:
    """Of all of them: then nothing is stored."""
    return all(isinstance(problem, ResourceExhausted) for _, _, problem in outcomes)
