"""From upper to layer.

    before the commit point   hard links completed, the mount frozen, the tree durable (`finished`, unless configured
                              otherwise)
    after it                  unmounted, nothing of the dead upper left in the layer, its files shared (`seal`)

The upper becomes the layer in place when nobody else has it, which a trial mount tells. Otherwise the
layer is a copy (shared extents where possible): when somebody forgot a bind of the frozen mount, since the
kernel would refuse the upper as a lower (EBUSY), and when somebody still has a file open for writing. A
tree of hard links would not do in the first case: link counts would be wrong in both trees, and change in
the layer when the other goes.

A kill after the commit point leaves a snapshot that is marked as sealing; `seal` can be repeated. Only where it cannot
begin, for want of space for a copy, can the commit point be taken back. Only what nobody
can write is shared: a tree that was frozen, or that containerd unpacked and no overlay has as its upper; never a
copy of a tree that somebody was writing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import structlog

from snapshotter import clone, failpoint, layer, linux
from snapshotter.config import STRIP
from snapshotter.content.plan import Plan, read_plan
from snapshotter.durable import FULL, NONE, keeps_order, remove_tree, sync, sync_directory, sync_names
from snapshotter.errors import NO_SPACE, Unavailable, quote
from snapshotter.gc import Trash
from snapshotter.ids import Ids
from snapshotter.meta.schema import Record
from snapshotter.meta.snapshots import Layer, Sealed
from snapshotter.model import NO_USAGE, Kind, SnapshotId, Usage
from snapshotter.mounts import Target
from snapshotter.mounts.mounter import Mounter
from snapshotter.overlay import index
from snapshotter.overlay.attributes import Names
from snapshotter.overlay.trial import is_upper_in_use
from snapshotter.root import Root
from snapshotter.sharing import Sharing
from snapshotter.walker import OPEN_DIRECTORY
from snapshotter.workers.pool import WorkerDied, Workers

log = structlog.get_logger()

_ATTEMPTS = 5
"""How often new names of hard links may appear between their completion and the freeze."""


class NotBegun(Exception):
    """There was no space to begin sealing: what the snapshot is made of is what it was at the commit point."""


class Sealer:
    """Works on snapshots whose claim the caller holds."""

    def __init__(
        self,
        root: Root,
        mounter: Mounter,
        trash: Trash,
        ids: Ids,
        names: Names,
        untrusted_attributes: str,
        trial: Mapping[str, str | None] | None,
        sharing: Sharing,
        reflink: bool,
        durability: str,
        workers: Workers,
        stopping: Callable[[], bool],
    ) -> None:
        """`trial`: how to ask the kernel whether an upper is in use (overlay.trial), None if it cannot tell.
        `untrusted_attributes`: config.STRIP or the like. `durability`: durable.FULL or the like."""
        self._root = root
        self._mounter = mounter
        self._trash = trash
        self._ids = ids
        self._names = names
        self._strips = untrusted_attributes == STRIP
        self._trial = trial
        self._sharing = sharing
        self._reflink = reflink
        self._durability = durability
        self._in_order = keeps_order(root.path)
        self._workers = workers
        self._stopping = stopping

    @contextmanager
    def finished(self, target: Target) -> Iterator[Layer]:
        """The tree that the active snapshot is to become, as durable as configured; the block is the commit point.

        When the block raises, the snapshot is mounted and writable as before. Raises Unavailable, durable.Stopped,
        OSError, and FailedPrecondition for attributes that the tree cannot have.
        """
        if target.materialized:
            self._mounter.provide(target)
            if self._freeze(target):
                try:
                    failpoint.hit("commit.frozen")
                    yield self._in_place(target, may_share=True)
                except BaseException:
                    failpoint.hit("commit.refused")
                    self._mounter.thaw(target.id)
                    raise
                return
        elif not self._in_use(self._root.fs(target.id)):
            # Only of what containerd unpacks we know that nobody goes on writing after Commit.
            can_share = target.is_extraction and self._trial is not None
            yield self._in_place(target, can_share)
            return
        with self._copy(target) as copied:
            yield copied

    def seal(self, record: Record, below: Sequence[SnapshotId]) -> Sealed:
        """Makes the tree of a committed snapshot, which stands on the layers `below`, a layer and nothing but.
        Raises OSError, and NotBegun, which means what it says where no earlier run was at it."""
        planned = read_plan(self._root.seal(record.id))
        durability = planned.durability if planned else self._durability
        sealed = self._seal(record, below, planned, durability == FULL)
        if durability != NONE:
            sync_names(self._root.directory(record.id), self._in_order, "sync.sealed-barrier")
        return sealed

    def _seal(self, record: Record, below: Sequence[SnapshotId], planned: Plan | None, may_sync: bool) -> Sealed:
        snapshot_id = record.id
        names = self._names_for(is_lowest=not below)
        self._mounter.unmount(snapshot_id)
        try:
            failpoint.hit("seal.unmounted")
            self._finish_exchange(snapshot_id)
            is_new = self._in_use(self._root.fs(snapshot_id))
            new_usage = self._make_new_tree(snapshot_id, names, may_sync) if is_new else NO_USAGE
        except OSError as error:
            if error.errno in NO_SPACE:
                raise NotBegun(str(error)) from error
            raise
        self._mounter.release(snapshot_id)
        if is_new:
            self._exchange(snapshot_id)
            return Sealed(new_usage, record.features, None)
        was_interrupted = self._sharing.was_begun(snapshot_id)
        usage = record.usage
        if planned is None or planned.strip:
            stripped = self._workers.call(layer.strip, self._root.fs(snapshot_id), names, may_sync)
            usage = record.usage if was_interrupted else stripped
            self._drop_index(snapshot_id)
        failpoint.hit("seal.stripped")
        if planned is None:
            return Sealed(usage, record.features, None)
        return self._sharing.share(replace(record, usage=usage), below, planned, was_interrupted)

    def is_untidy(self, snapshot_id: SnapshotId) -> bool:
        """Whether `tidy` might find something. Raises OSError."""
        return not {"fs", "refs"}.issuperset(os.listdir(self._root.directory(snapshot_id)))

    def tidy(self, snapshot_id: SnapshotId, kind: Kind) -> None:
        """Discards what sealing needed, once it is over or was not begun. Raises OSError."""
        if kind is Kind.COMMITTED:
            # A power cut may undo the renames that ended an exchange, which nothing syncs.
            self._finish_exchange(snapshot_id)
            self._trash.discard(self._root.work(snapshot_id), f"{snapshot_id}.work")
        self._trash.discard(self._root.seal(snapshot_id), f"{snapshot_id}.seal")

    def retire(self, snapshot_id: SnapshotId) -> None:
        """Takes a directory that the metadata does not know out of the way: to the trash, or, while an overlay still
        uses it, to where `sweep_busy` looks again. Raises OSError."""
        directory = self._root.directory(snapshot_id)
        if self._in_use(self._root.fs(snapshot_id)):
            log.info("tree.still_in_use", id=snapshot_id)
            directory.rename(self._root.busy / f"{snapshot_id}.{time.time_ns()}")
        else:
            self._trash.discard(directory, str(snapshot_id))

    def sweep_busy(self) -> None:
        """Discards what has become free. Raises OSError."""
        for directory in self._root.busy.iterdir():
            if not self._in_use(directory / "fs"):
                self._trash.discard(directory, directory.name)

    def _names_in(self, target: Target) -> Names:
        """What its tree may have, as long as Commit may still be refused."""
        if target.is_extraction:
            return self._names.of_an_image(self._strips)
        # A client's overlay had metacopy and redirect_dir only if the chain needs them.
        return self._names.of_a_mount(target.features if target.materialized else target.chain.features)

    def _names_for(self, is_lowest: bool) -> Names:
        return self._names.of_the_lowest_layer() if is_lowest else self._names

    def _in_use(self, tree: Path) -> bool:
        if self._trial is None or not tree.exists():
            return False
        return is_upper_in_use(tree, self._root.spool, self._trial, self._root.memory)

    def _freeze(self, target: Target) -> bool:
        """False if something is open for writing."""
        merged, entries = self._root.mountpoint(target.id), self._root.work(target.id) / "index"
        for _ in range(_ATTEMPTS):
            index.complete(merged, entries)
            if not self._mounter.freeze(target.id):
                log.warning("commit.open_for_writing", snapshot_key=target.key, id=target.id)
                return False
            if index.is_complete(merged, entries):
                return True
            self._mounter.thaw(target.id)
        raise Unavailable(
            f"snapshot {quote(target.key)} cannot be committed: its hard links keep changing; stop what writes there"
        )

    def _finish(self, tree: Path, names: Names, does_not_change: bool) -> layer.Found:
        may_sync = self._durability == FULL
        if does_not_change:
            with suppress(WorkerDied):
                return layer.merged(self._workers.share_out(layer.finish, tree, names, may_sync))
        return self._workers.call(layer.finish, tree, names, may_sync)

    def _sync_names(self, snapshot_id: SnapshotId, found: layer.Found) -> None:
        """The last before the commit point."""
        if self._durability != NONE:
            sync_names(self._root.directory(snapshot_id), self._in_order or found.is_all_synced, "sync.layer-barrier")

    def _in_place(self, target: Target, may_share: bool) -> Layer:
        names = self._names_in(target)
        if not target.chain.ids:
            names = names.of_the_lowest_layer()  # if Commit gives it no parent, which `seal` will know
        found = self._finish(self._root.fs(target.id), names, does_not_change=may_share)
        _report(found, target)
        strip = target.materialized or found.has_dead_attributes
        self._trash.discard(self._root.seal(target.id), f"{target.id}.seal")  # of a commit that failed
        planned = self._sharing.plan(target.id, strip, found) if may_share else None
        needs = planned.may_need() if planned else found.needs
        self._sync_names(target.id, found)
        return Layer(target.id, found.usage, needs, sealing=strip or planned is not None)

    @contextmanager
    def _copy(self, target: Target) -> Iterator[Layer]:
        with self._ids.reserve() as new_id:
            directory = self._root.directory(new_id)
            try:
                directory.mkdir(mode=0o700)
                names = self._names_for(is_lowest=not target.chain.ids)
                self._workers.call_once(
                    clone.copy_tree, self._root.fs(target.id), self._root.fs(new_id), names, self._reflink
                )
                failpoint.hit("copy.made")
                found = self._finish(self._root.fs(new_id), self._names_in(target), does_not_change=False)
                _report(found, target)
                self._sync_names(new_id, found)
                sync_directory(self._root.snapshots, "sync.copies")
                log.info("commit.copied", snapshot_key=target.key, id=target.id, copy=new_id)
                yield Layer(new_id, found.usage, found.needs, sealing=False)
            except BaseException:
                self._trash.discard(directory, str(new_id))
                raise
        # Left behind by a kill or an error here, the old directory belongs to no snapshot: the sweep retires it.
        try:
            failpoint.hit("copy.committed")
            self._mounter.release(target.id)
            failpoint.hit("copy.released")
            self.retire(target.id)
        except OSError as error:
            log.warning("commit.old_tree_left", id=target.id, reason=str(error))

    def _drop_index(self, snapshot_id: SnapshotId) -> None:
        """Here and not in the background: its entries are links of the layer's own files, which st_nlink counts."""
        work = self._root.work(snapshot_id)
        if (work / "index").exists():
            remove_tree(work, "index", self._stopping)

    def _make_new_tree(self, snapshot_id: SnapshotId, names: Names, may_sync: bool) -> Usage:
        directory = self._root.directory(snapshot_id)
        try:
            self._workers.call_once(
                clone.copy_tree, self._root.fs(snapshot_id), directory / "new", names, self._reflink
            )
            found = self._workers.call(layer.finish, directory / "new", names, may_sync)
            failpoint.hit("seal.copied")
            # The plan is about the old tree: it knows directories by their inodes.
            self._trash.discard(self._root.seal(snapshot_id), f"{snapshot_id}.seal")
            if may_sync:
                sync_names(directory, self._in_order or found.is_all_synced, "sync.new-tree")
        except BaseException:
            self._trash.discard(directory / "new", f"{snapshot_id}.new")
            raise
        return found.usage

    def _exchange(self, snapshot_id: SnapshotId) -> None:
        directory = self._root.directory(snapshot_id)
        fd = os.open(directory, OPEN_DIRECTORY)
        try:
            linux.renameat2(fd, b"fs", fd, b"new", linux.RENAME_EXCHANGE)
            sync(fd, "sync.exchange")
        finally:
            os.close(fd)
        log.info("commit.new_tree", id=snapshot_id)
        failpoint.hit("seal.exchanged")
        try:
            self._finish_exchange(snapshot_id)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            log.warning("commit.old_tree_left", id=snapshot_id, reason=str(error))  # to `tidy`

    def _finish_exchange(self, snapshot_id: SnapshotId) -> None:
        """What is called "new" is either half a new tree, whose making was killed, or the old one after the exchange.

        The old one stays whole for its readers, its work directory too: they find hard links through the index.
        """
        directory = self._root.directory(snapshot_id)
        second, old = directory / "new", directory / "old"
        if second.exists():
            if not self._in_use(second):
                self._trash.discard(second, f"{snapshot_id}.new")
            else:
                # "new" goes last: a kill before that comes here again.
                old.mkdir(mode=0o700, exist_ok=True)
                with suppress(FileNotFoundError):
                    self._root.work(snapshot_id).rename(old / "work")
                failpoint.hit("seal.moved-work")
                second.rename(old / "fs")
        if old.exists():
            failpoint.hit("seal.moved-tree")
            old.rename(self._root.busy / f"{snapshot_id}.{time.time_ns()}")


def _report(found: layer.Found, target: Target) -> None:
    """What an image brought that is meant for overlay, and not for who reads it."""
    for path, attribute in found.stripped:
        log.warning(
            "commit.attribute_stripped",
            snapshot_key=target.key,
            id=target.id,
            path=quote(os.fsdecode(path)),
            attribute=quote(attribute),
        )
    if found.stripped_count:
        log.warning("commit.attributes_stripped", snapshot_key=target.key, id=target.id, count=found.stripped_count)
