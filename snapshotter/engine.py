"""The ten operations of the snapshot API, on metadata and directories. Knows nothing of gRPC.

Order on disk: a directory is made and durable before a transaction names it; a transaction forgets
a snapshot before its directory is renamed away. So whatever a kill leaves behind is a directory
that the metadata does not know, and the sweep at the next start or Cleanup takes it.

Every method may be called from any thread and blocks until it is done; only `cleanup` hands back a
future, since it may wait for a long deletion.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog

from snapshotter import failpoint, features, mountinfo
from snapshotter.claims import Busy, Claims
from snapshotter.commits import STOPPING, Commits
from snapshotter.config import STRIP, DedupConfig, MountConfig, OverlayConfig
from snapshotter.content.objects import collect_unused
from snapshotter.content.share import Rules
from snapshotter.durable import FULL, Stopped, sync, sync_directory
from snapshotter.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    from_os_error,
    quote,
)
from snapshotter.filters import compile_filters
from snapshotter.fsck import database
from snapshotter.fsck.database import Raw
from snapshotter.fsck.findings import Finding, Progress
from snapshotter.fsck.runner import Check
from snapshotter.fsck.runner import Subject as ToCheck
from snapshotter.gc import Trash, attempt
from snapshotter.ids import Ids
from snapshotter.meta import snapshots
from snapshotter.meta.check import check
from snapshotter.meta.schema import SCHEMA_VERSION, Record
from snapshotter.meta.snapshots import StillSealing
from snapshotter.meta.store import Store, Tx
from snapshotter.model import MAX_KEY_BYTES, Commitment, Creation, Freed, Info, Kind, Mount, SnapshotId, Space, Usage
from snapshotter.mounts import Target
from snapshotter.mounts.mounter import Mounter
from snapshotter.overlay.attributes import Names, copy_attributes
from snapshotter.overlay.trial import trial_switches
from snapshotter.progress import waiting_for
from snapshotter.root import Root
from snapshotter.seal import Sealer
from snapshotter.sharing import Sharing
from snapshotter.space import Accountant, Subject
from snapshotter.usage import UsageCache, scan
from snapshotter.walker import OPEN_DIRECTORY
from snapshotter.workers.pool import Workers

log = structlog.get_logger()

T = TypeVar("T")

_SWEEP = SnapshotId(0)
"""What a sweep claims among sweeps."""
_CLOCK_NS = 20_000_000
"""How far the time of a change may be behind the clock (two ticks of 100 Hz: the kernel's coarse clock)."""


@dataclass(frozen=True, slots=True)
class Status:
    """What the engine knows of itself, for the administrator."""

    counts: dict[Kind, int]
    pending_deletions: int
    schema_version: int
    lmdb_version: str
    mount_mode: str
    namespace_reach: str
    """mountinfo.namespace_reach: "host", "propagated" or "private"."""
    missing_features: dict[str, str | None]
    """Of each feature that was probed: None if the kernel has it here, else why not."""
    switched_on: frozenset[str]
    strategy: str
    """How files are shared: "stub", "hardlink" or "off"."""
    durability: str


class Engine:
    """Serves one locked root. `close` it."""

    def __init__(
        self,
        root: Root,
        mount: MountConfig,
        overlay: OverlayConfig,
        dedup: DedupConfig | None = None,
        durability: str = FULL,
        keep_open: Sequence[int] = (),
        untrusted_attributes: str = STRIP,
        hang_s: float = 60.0,
    ) -> None:
        """`keep_open`: descriptors that worker processes hold (workers.pool). `hang_s`: what has not got on for so long
        hangs (progress.py).

        Raises FailedPrecondition when this kernel or configuration cannot serve what the root holds.
        """
        dedup = dedup or DedupConfig()
        self._root = root
        self._stop = threading.Event()
        # Whatever may refuse the root comes first, and changes nothing.
        self._workers = Workers(keep_open)
        self._probe, switches = features.settle(root.spool, mount, overlay)
        strategy = features.strategy(dedup.strategy, mount.mode, switches)
        check(root.metadata, self._workers)
        self._store = Store(root.metadata, may_create=not any(root.snapshots.iterdir()))
        with self._store.read() as tx:
            records = list(snapshots.every(tx))
            self._ids = Ids(root, snapshots.next_id(tx))
        self._lacking = features.check_store(records, switches)
        self._trash = Trash(root.trash, root.objects, self._workers, hang_s)
        self._mounter = Mounter(root, mount.mode, switches, layer_by_layer="lowerdir_plus" in switches.on)
        self._usage = UsageCache()
        self._claims = Claims()
        self._sweeps = Claims()
        self._names = switches.attribute_names()
        trial = trial_switches(self._probe)
        self._rules = Rules(
            strategy,
            dedup.stub_min_bytes,
            dedup.never_link,
            "reflink" in switches.on,
            durability,
            run=secrets.token_hex(16),
        )
        self._sealer = Sealer(
            root,
            self._mounter,
            self._trash,
            self._ids,
            self._names,
            untrusted_attributes,
            trial,
            Sharing(root, self._rules, self._workers, self._stop.is_set),
            self._rules.reflink,
            durability,
            self._workers,
            self._stop.is_set,
        )
        self._commits = Commits(
            root, self._store, self._claims, self._mounter, self._sealer, self._trash, self._check_running
        )
        self._mounter.adopt({record.id: record.kind for record in records})
        self._sweep()
        half_done = [record.id for record in records if record.sealing]
        self._accountant = Accountant(root, self._workers, self._subjects)
        self._commits.finish_in_background(half_done)

    def stop(self) -> None:
        """From now on refuses what has not reached its commit point, and ends what waits for deletions."""
        self._stop.set()
        self._trash.stop()
        self._accountant.stop()
        self._workers.stop()

    def close(self, timeout_s: float = 2.0) -> None:
        """Waits for so long at most: what hangs in the kernel is left to the end of the process."""
        self.stop()
        deadline_s = time.monotonic() + timeout_s
        self._commits.close(deadline_s)
        self._accountant.close(deadline_s)
        self._trash.close(deadline_s)
        self._workers.close()
        self._mounter.close(deadline_s)
        self._store.close(deadline_s)

    # -- the ten operations ---------------------------------------------------------------------

    def create(self, want: Creation) -> tuple[Mount, ...]:
        """Prepare and View: a new snapshot, and the mounts to make for it."""
        _check_key("key", want.key)
        _check_key("parent", want.parent, may_be_empty=True)
        if want.kind is Kind.ACTIVE:
            features.refuse_unless_writable(self._lacking, want.key)
        return self._settled(lambda: self._create(want))

    def known_mounts(self, key: str) -> tuple[Mount, ...] | None:
        """What `mounts` would answer, if that takes no mount."""
        _check_key("key", key)
        try:
            target = self._target(key)
        except StillSealing:
            return None
        if target.materialized and not self._mounter.is_mounted(target.id):
            return None
        return self._mounter.describe(target)

    def mounts(self, key: str) -> tuple[Mount, ...]:
        """Mounts what a restart of the host unmounted. Raises NotFound, and FailedPrecondition for a committed one."""
        _check_key("key", key)

        def act() -> tuple[Mount, ...]:
            if (known := self.known_mounts(key)) is not None:
                return known
            target = self._target(key)
            # Mounting would race Commit and Remove.
            with self._claims.hold(target.id):
                return self._mounter.provide(self._target(key, target.id))

        return self._settled(act)

    def commit(self, want: Commitment) -> None:
        """Turns an active snapshot into a committed one; when this returns, the layer is as durable as configured.

        Raises Busy when another call has the snapshot. What has it mounted sees it read-only from now on.
        """
        _check_key("name", want.name)
        _check_key("key", want.key)
        _check_key("parent", want.parent, may_be_empty=True)
        self._settled(lambda: self._commit(want))

    def remove(self, key: str) -> None:
        """Raises Busy when another call has the snapshot."""
        _check_key("key", key)
        self._settled(lambda: self._remove(key))

    def stat(self, key: str) -> Info:
        _check_key("key", key)
        with self._store.read() as tx:
            try:
                record = snapshots.get(tx, key)
            except StillSealing as error:
                if error.shown is None:
                    raise NotFound(f"snapshot {quote(key)} does not exist yet") from error
                record = error.shown
            return record.info(snapshots.parent_name(tx, record))

    def update(self, name: str, labels: dict[str, str], paths: Sequence[str]) -> Info:
        """Changes labels: all of them, or as the field mask `paths` says."""
        _check_key("name", name)
        self._check_running()

        def act(tx: Tx) -> Info:
            record = snapshots.relabel(tx, name, labels, paths)
            return record.info(snapshots.parent_name(tx, record))

        return self._settled(lambda: self._store.write(act))

    @contextmanager
    def select(self, filters: Sequence[str]) -> Iterator[Iterator[Info]]:
        """The infos that match any filter, oldest first, as of one moment. Consume them at once: the
        metadata cannot reuse old pages meanwhile. Raises InvalidArgument for a bad filter."""
        matches = compile_filters(filters)
        with self._store.read() as tx:
            infos = (record.info(snapshots.parent_name(tx, record)) for record in snapshots.visible(tx))
            yield filter(matches, infos)

    def known_usage(self, key: str) -> Usage | None:
        """What `usage` would answer, if that takes no scan."""
        _check_key("key", key)
        try:
            record = self._get(key)
        except StillSealing:
            return None
        return self._usage.known(record.id) if record.kind is Kind.ACTIVE else record.usage

    def usage(self, key: str) -> Usage:
        """What the snapshot alone takes; of an active one as of a short time ago. Raises Busy while another call
        measures the same snapshot."""
        _check_key("key", key)
        record = self._settled(lambda: self._get(key))
        if record.kind is not Kind.ACTIVE:
            return record.usage
        trees = [self._root.fs(record.id), self._root.work(record.id) / "index"]
        try:
            return self._usage.get(record.id, lambda: scan(trees, self._stop.is_set))
        except Stopped as error:
            raise Unavailable(STOPPING) from error
        except OSError as error:
            raise from_os_error(f"measuring snapshot {quote(key)}", error) from error

    def cleanup(self) -> Future[None]:
        """Sweeps leftovers; completes when all that was removed before is gone from the disk. Raises Busy while
        another call sweeps."""
        self._check_running()
        with self._sweeps.hold(_SWEEP):
            self._sweep()
        return self._trash.drained()

    # -- for the administrator ------------------------------------------------------------------

    def status(self) -> Status:
        counts = dict.fromkeys(Kind, 0)
        with self._store.read() as tx:
            for record in snapshots.every(tx):
                counts[record.kind] += 1
        return Status(
            counts,
            self._trash.pending(),
            SCHEMA_VERSION,
            self._store.engine_version(),
            self._mounter.mode,
            mountinfo.namespace_reach(),
            self._probe.missing,
            self._mounter.switched_on(),
            self._rules.strategy,
            self._rules.durability,
        )

    def space(self, now: bool) -> Space:
        """What the store and each snapshot took at the last pass in the background, or, with `now`, take."""
        try:
            return self._accountant.space(now)
        except Stopped as error:
            raise Unavailable(STOPPING) from error
        except OSError as error:
            raise from_os_error("measuring the store", error) from error

    def collect(self, dry_run: bool) -> Freed:
        """Deletes what was removed, and objects that no layer uses; waits until that is done."""
        try:
            if dry_run:
                trees = self._trash.pending()
                return Freed(self._emptied(self._trash.would_free()), trees)
            trees, before = self._trash.pending(), self._trash.freed()
            self._emptied(self.cleanup())
            unused = self._workers.call(collect_unused, self._root.objects)
            return Freed(self._trash.freed() - before + unused, trees)
        except Stopped as error:
            raise Unavailable(STOPPING) from error
        except OSError as error:
            raise from_os_error("collecting unused objects", error) from error

    def check(self, verify_content: bool) -> Iterator[Finding | Progress]:
        """Looks for what does not fit together, and says how far it is; what calls change meanwhile is not judged."""
        subject = ToCheck(
            self._root,
            self._workers,
            self._names,
            self._read_all,
            self._file_problems,
            lambda: self._ids.in_flight() | self._claims.all(),
            time.time_ns() - _CLOCK_NS,
        )
        try:
            yield from Check(subject, verify_content).events()
        except Stopped as error:
            raise Unavailable(STOPPING) from error
        except OSError as error:
            raise from_os_error("checking the store", error) from error

    def _read_all(self) -> Raw:
        with self._store.read() as tx:
            return database.read_from(tx)

    def _file_problems(self) -> list[str]:
        with tempfile.TemporaryDirectory(prefix="check.", dir=self._root.spool) as place:
            self._store.copy(Path(place))
            return self._workers.call(database.problems, Path(place))

    def _subjects(self) -> list[Subject]:
        with self._store.read() as tx:
            return [
                Subject(record.id, record.name, record.kind, record.usage, snapshots.facts_of(tx, record.id))
                for record in snapshots.visible(tx)
            ]

    # -- parts of the operations ----------------------------------------------------------------

    def _emptied(self, answer: Future[T]) -> T:
        """What the trash answers."""
        with waiting_for(lambda: [self._trash.thread_id]):
            return answer.result()

    def _settled(self, act: Callable[[], T]) -> T:
        """Repeats `act` until nothing that it needs is half sealed. Raises Busy where another call is at it."""
        while True:
            try:
                return act()
            except StillSealing as error:
                with self._claims.hold(error.id):
                    self._commits.finish(error.id)

    def _get(self, key: str) -> Record:
        with self._store.read() as tx:
            return snapshots.get(tx, key)

    def _target(self, key: str, expected: SnapshotId | None = None) -> Target:
        with self._store.read() as tx:
            record = snapshots.get(tx, key)
            chain = snapshots.chain_below(tx, record)
        if record.kind is Kind.COMMITTED:
            raise FailedPrecondition(f"snapshot {quote(key)} is committed; only active ones and views have mounts")
        if expected not in (None, record.id):
            raise NotFound(f"snapshot {quote(key)} was removed meanwhile")
        return Target(record.id, key, record.kind, chain, record.features, record.materialized)

    def _create(self, want: Creation) -> tuple[Mount, ...]:
        with self._store.read() as tx:
            above = snapshots.check_creatable(tx, want)
            chain = snapshots.chain_of(tx, above)
        with self._ids.reserve() as snapshot_id:
            target = self._mounter.plan(Target(snapshot_id, want.key, want.kind, chain))
            try:
                if target.writable or not chain.ids:
                    self._make_directory(target, want)
                failpoint.hit("prepare.after-directory")
                mounts = self._mounter.provide(target)
                failpoint.hit("prepare.mounted")
                self._check_running()
                self._store.write(lambda tx: _insert(tx, target, want, above))
            except BaseException:
                self._mounter.release(snapshot_id)
                self._trash.try_to_discard(self._root.directory(snapshot_id), str(snapshot_id))
                raise
        failpoint.hit("prepare.after-transaction")
        log.info("snapshot.created", snapshot_key=want.key, id=snapshot_id, kind=want.kind.name.lower())
        return mounts

    def _make_directory(self, target: Target, want: Creation) -> None:
        root, layers = self._root, target.chain.ids
        try:
            root.directory(target.id).mkdir(mode=0o700)
            root.fs(target.id).mkdir()
            if layers or target.materialized:
                root.work(target.id).mkdir(mode=0o700)
            _dress(root.fs(target.id), root.fs(layers[0]) if layers else None, self._names)
            sync_directory(root.directory(target.id), "sync.snapshot")
            sync_directory(root.snapshots, "sync.snapshots")
        except FileNotFoundError as error:
            raise _parent_is_gone(want) from error
        except OSError as error:
            raise from_os_error(f"making the directory of snapshot {quote(want.key)}", error) from error

    def _commit(self, want: Commitment) -> None:
        active_id = self._commits.commit(want)
        self._usage.forget(active_id)
        self._accountant.changed()

    def _remove(self, key: str) -> None:
        self._check_running()
        try:
            snapshot_id = self._get(key).id
        except StillSealing as error:
            # Its commit was interrupted or could not be finished, unless the claim says that it is under way.
            snapshot_id = error.id
        with self._claims.hold(snapshot_id):
            self._store.write(lambda tx: _remove_exactly(tx, key, snapshot_id), frees_space=True)
            failpoint.hit("remove.after-transaction")
            # Left behind by a kill here, the mount and the directory belong to no snapshot: the next start takes them.
            self._mounter.release(snapshot_id)
            failpoint.hit("remove.detached")
            self._trash.try_to_discard(self._root.directory(snapshot_id), str(snapshot_id))
        self._usage.forget(snapshot_id)
        self._accountant.changed()
        failpoint.hit("remove.after-rename")
        log.info("snapshot.removed", snapshot_key=key, id=snapshot_id)

    # -- housekeeping ---------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Retires directories without a snapshot, and discards what others do not need any more."""
        names = os.listdir(self._root.snapshots)
        # In this order: what was being changed at the listing is claimed or in flight now, or its
        # transaction, which the one below sees, is over.
        spared = self._ids.in_flight() | self._claims.all()
        listed = {SnapshotId(int(name)) for name in names if name.isdecimal()} - spared
        with self._store.read() as tx:
            known = {snapshot_id for snapshot_id in listed if snapshots.knows_id(tx, snapshot_id)}
        for snapshot_id in sorted(listed - known):
            log.info("sweep.unknown_directory", id=snapshot_id)
            attempt(lambda unknown_id=snapshot_id: self._sealer.retire(unknown_id))  # type: ignore[misc]
        for snapshot_id in sorted(known):
            attempt(lambda known_id=snapshot_id: self._tidy(known_id))  # type: ignore[misc]
        attempt(self._sealer.sweep_busy)

    def _tidy(self, snapshot_id: SnapshotId) -> None:
        """Discards what nobody needs of a snapshot that no call is changing."""
        if not self._sealer.is_untidy(snapshot_id):
            return
        with suppress(Busy), self._claims.hold(snapshot_id):
            with self._store.read() as tx:
                record = snapshots.by_id(tx, snapshot_id) if snapshots.knows_id(tx, snapshot_id) else None
            if record and not record.sealing:
                self._sealer.tidy(snapshot_id, record.kind)

    def _check_running(self) -> None:
        if self._stop.is_set():
            raise Unavailable(STOPPING)


def _insert(tx: Tx, target: Target, want: Creation, above: Record | None) -> None:
    record = snapshots.insert(tx, target.id, want, target.features, target.materialized)
    if record.parent_id != (above.id if above else None):
        # The name now means another snapshot than the one that the directory was made for.
        raise _parent_is_gone(want)


def _parent_is_gone(want: Creation) -> NotFound:
    return NotFound(f"parent {quote(want.parent)} of snapshot {quote(want.key)} was removed meanwhile")


def _remove_exactly(tx: Tx, key: str, expected: SnapshotId) -> None:
    if snapshots.remove(tx, key) != expected:
        raise NotFound(f"snapshot {quote(key)} was removed meanwhile")


def _check_key(what: str, key: str, may_be_empty: bool = False) -> None:
    if not key and not may_be_empty:
        raise InvalidArgument(f"the {what} of a snapshot must not be empty")
    if len(key.encode()) > MAX_KEY_BYTES:
        raise InvalidArgument(f"{what} {quote(key)} is longer than {MAX_KEY_BYTES} bytes")


def _dress(upper: Path, parent_tree: Path | None, names: Names) -> None:
    """Gives a new upper's root directory the mode, owner and attributes of its parent's, durably."""
    fd = os.open(upper, OPEN_DIRECTORY)
    try:
        if parent_tree is None:
            os.fchmod(fd, 0o755)
        else:
            parent_fd = os.open(parent_tree, OPEN_DIRECTORY)
            try:
                status = os.fstat(parent_fd)
                os.fchown(fd, status.st_uid, status.st_gid)
                os.fchmod(fd, status.st_mode & 0o7777)
                copy_attributes(parent_fd, fd, names)
            finally:
                os.close(parent_fd)
        sync(fd, "sync.upper")
    finally:
        os.close(fd)
