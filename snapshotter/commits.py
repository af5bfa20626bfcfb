"""Commit: an active snapshot becomes a committed one, with a commit point before which all can be refused, and after
which it is finished, by this run or the next. `seal` makes the layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import structlog

from snapshotter import failpoint
from snapshotter.claims import Claims
from snapshotter.durable import Stopped
from snapshotter.errors import NotFound, ResourceExhausted, SnapshotterError, Unavailable, from_os_error, quote
from snapshotter.gc import Trash, attempt
from snapshotter.meta import snapshots
from snapshotter.meta.snapshots import Layer
from snapshotter.meta.store import Store, Tx
from snapshotter.model import Commitment, Kind, SnapshotId
from snapshotter.mounts import Target
from snapshotter.mounts.mounter import Mounter
from snapshotter.progress import join_until
from snapshotter.root import Root
from snapshotter.seal import NotBegun, Sealer

log = structlog.get_logger()

STOPPING = "the daemon is stopping; call again when it runs"


class Commits:
    """`close` it."""

    def __init__(
        self,
        root: Root,
        store: Store,
        claims: Claims,
        mounter: Mounter,
        sealer: Sealer,
        trash: Trash,
        check_running: Callable[[], None],
    ) -> None:
        """`check_running` raises Unavailable when nothing may reach its commit point any more."""
        self._root = root
        self._store = store
        self._claims = claims
        self._mounter = mounter
        self._sealer = sealer
        self._trash = trash
        self._check_running = check_running
        self._finisher: threading.Thread | None = None

    def finish_in_background(self, snapshot_ids: Sequence[SnapshotId]) -> None:
        """What an earlier run left half done."""
        self._finisher = threading.Thread(target=self._finish_all, args=(snapshot_ids,), name="finisher", daemon=True)
        self._finisher.start()

    def close(self, deadline_s: float) -> None:
        """Waits until `deadline_s` (time.monotonic) at most."""
        if self._finisher:
            join_until(self._finisher, deadline_s)

    def commit(self, want: Commitment) -> SnapshotId:
        """The id of what was active. Raises Busy, SnapshotterError."""
        with self._store.read() as tx:
            active = snapshots.check_committable(tx, want)
            target = Target(
                active.id,
                want.key,
                active.kind,
                snapshots.chain_below(tx, active),
                active.features,
                active.materialized,
            )
        with self._claims.hold(target.id):
            try:
                with self._sealer.finished(target) as made:
                    failpoint.hit("commit.before-transaction")
                    self._check_running()
                    self._store.write(lambda tx: _commit_point(tx, target, want, made))
            except Stopped as error:
                raise Unavailable(STOPPING) from error
            except OSError as error:
                raise from_os_error(f"committing snapshot {quote(want.key)}", error) from error
            failpoint.hit("commit.after-transaction")
            if made.sealing:
                self.finish(made.id, target)
            elif made.id == target.id:
                # Left behind by a kill here: the sweep takes the work directory of a committed snapshot.
                self._trash.try_to_discard(self._root.work(made.id), f"{made.id}.work")
        log.info("snapshot.committed", name=want.name, id=made.id, size_bytes=made.usage.size_bytes)
        return target.id

    def finish(self, snapshot_id: SnapshotId, was: Target | None = None) -> None:
        """Finishes a commit, unless that was done meanwhile; call it under the claim.

        A failure leaves it to whoever needs the snapshot next, or to Remove. The way back is open only to who has just
        committed what `was` active, as long as nothing of it was changed: raises ResourceExhausted then.
        """
        with self._store.read() as tx:
            record = snapshots.by_id(tx, snapshot_id) if snapshots.knows_id(tx, snapshot_id) else None
            if record is None or not record.sealing:
                return
            below = snapshots.chain_below(tx, record).ids
        try:
            outcome = self._sealer.seal(record, below)
            failpoint.hit("seal.done")
            self._store.write(lambda tx: snapshots.sealed(tx, snapshot_id, outcome), frees_space=True)
        except (OSError, Stopped, NotBegun, ResourceExhausted, Unavailable) as error:
            if isinstance(error, NotBegun) and was and self._take_back(was):
                raise ResourceExhausted(
                    f"no space to commit snapshot {quote(was.key)} as {quote(record.name)}, which takes a copy while "
                    f"somebody has it mounted ({quote(str(error))}): unmount it there, or free space"
                ) from error
            log.error("commit.seal_failed", name=record.name, id=snapshot_id, reason=str(error))
            raise Unavailable(
                f"snapshot {quote(record.name)} is committed, but its layer could not be finished "
                f"({quote(str(error))}); try again, or remove it"
            ) from error
        failpoint.hit("seal.after-transaction")
        # Left behind by a kill here: the sweep takes them.
        attempt(lambda: self._sealer.tidy(snapshot_id, Kind.COMMITTED))

    def _take_back(self, was: Target) -> bool:
        """Undoes the commit point; False where that fails: then the snapshot stays committed."""
        try:
            # A kill from here on leaves a mount of a committed snapshot, which the next start drops.
            self._mounter.provide(was)
            failpoint.hit("commit.taking-back")
            self._store.write(lambda tx: snapshots.take_back(tx, was.id), frees_space=True)
        except (SnapshotterError, OSError) as error:
            log.warning("commit.not_taken_back", id=was.id, reason=str(error))
            self._mounter.release(was.id, wait=True)
            return False
        # And from here one of an active snapshot that may be frozen, which the next start thaws.
        failpoint.hit("commit.taken-back")
        if was.materialized:
            self._mounter.thaw(was.id)
        attempt(lambda: self._sealer.tidy(was.id, Kind.ACTIVE))
        return True

    def _finish_all(self, snapshot_ids: Sequence[SnapshotId]) -> None:
        """What an earlier run left half done; who needs one of them meanwhile waits for it."""
        for snapshot_id in snapshot_ids:
            try:
                with self._claims.hold(snapshot_id):
                    self.finish(snapshot_id)
            except Exception as error:  # the others must not wait for a call that needs them
                log.warning("commit.left_to_who_needs_it", id=snapshot_id, reason=str(error))


def _commit_point(tx: Tx, target: Target, want: Commitment, made: Layer) -> None:
    if snapshots.check_committable(tx, want).id != target.id:
        raise NotFound(f"snapshot {quote(want.key)} was removed meanwhile")
    snapshots.commit(tx, want, made)
