"""From upper to layer.

    before the commit point   hard links completed, the mount frozen, the tree durable (`finished`)
    after it                  unmounted, nothing of the dead upper left in the layer, its files shared (`seal`)

The upper becomes the layer in place when nobody else has it, which a trial mount tells. Otherwise the
layer is a copy (shared extents where possible): when somebody forgot a bind of the frozen mount, since the
kernel would refuse the upper as a lower (EBUSY), and when somebody still has a file open for writing. A
tree of hard links would not do in the first case: link counts would be wrong in both trees, and change in
the layer when the other goes.

A kill after the commit point leaves a snapshot that is marked as sealing; `seal` can be repeated. Only what nobody
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
from snapshotter.content import files, plan
from snapshotter.content.share import OFF, STUB, Layout, Outcome, Rules, clear_up, share
from snapshotter.durable import Stopped, remove_tree, sync_directory
from snapshotter.errors import Unavailable, quote
from snapshotter.gc import Trash
from snapshotter.ids import Ids
from snapshotter.meta.schema import Facts, Record
from snapshotter.meta.snapshots import Layer, Sealed
from snapshotter.model import Kind, SnapshotId, Usage
from snapshotter.mounts import Target
from snapshotter.mounts.mounter import Mounter
from snapshotter.overlay import index
from snapshotter.overlay.attributes import Names
from snapshotter.overlay.features import OF_STUBS, Feature
from snapshotter.overlay.trial import is_upper_in_use
from snapshotter.root import Root
from snapshotter.walker import OPEN_DIRECTORY
from snapshotter.workers.pool import Workers

log = structlog.get_logger()

_ATTEMPTS = 5
"""How often new names of hard links may appear between their completion and the freeze."""


_SHARINGS = 2
"""How often to begin when a worker dies."""


class Sealer:
    """Works on snapshots whose claim the caller holds."""

    def __init__(
        self,
        root: Root,
        mounter: Mounter,
        trash: Trash,
        ids: Ids,
        names: Names,
        trial: Mapping[str, str | None] | None,
        rules: Rules,
        workers: Workers,
        stopping: Callable[[], bool],
    ) -> None:
        """`trial`: how to ask the kernel whether an upper is in use (overlay.trial), None if it cannot tell."""
        self._root = root
        self._mounter = mounter
        self._trash = trash
        self._ids = ids
        self._names = names
        self._trial = trial
        self._rules = rules
        self._workers = workers
        self._in_order = plan.keeps_order(root.path)
        self._stopping = stopping

    @contextmanager
    def finished(self, target: Target) -> Iterator[Layer]:
        """The durable tree that the active snapshot is to become; the block is the commit point.

        When the block raises, the snapshot is mounted and writable as before. Raises Unavailable, durable.Stopped,
        OSError.
        """
        if target.materialized:
            self._mounter.provide(target)
            if self._freeze(target):
                try:
                    failpoint.hit("commit.frozen")
                    yield self._in_place(target, self._rules.strategy, self._names)
                except BaseException:
                    failpoint.hit("commit.refused")
                    self._mounter.thaw(target.id)
                    raise
                return
        elif not self._in_use(self._root.fs(target.id)):
            # Only of what containerd unpacks we know that nobody goes on writing after Commit.
            can_share = target.is_extraction and self._trial is not None
            # The client's overlay had metacopy and redirect_dir only if the chain needs them.
            unpacked = target.is_extraction or not target.chain.features
            names = self._names.of_an_unpacked_layer() if unpacked else self._names
            yield self._in_place(target, self._rules.strategy if can_share else OFF, names)
            return
        with self._copy(target) as copied:
            yield copied

    def seal(self, record: Record, below: Sequence[SnapshotId]) -> Sealed:
        """Makes the tree of a committed snapshot, which stands on the layers `below`, a layer and nothing but.
        Raises OSError."""
        snapshot_id = record.id
        names = self._names_for(is_lowest=not below)
        self._mounter.release(snapshot_id, wait=True)
        failpoint.hit("seal.unmounted")
        self._finish_exchange(snapshot_id)
        if self._in_use(self._root.fs(snapshot_id)):
            return Sealed(self._make_new_tree(snapshot_id, names), record.features, None)
        planned = plan.read_plan(self._root.seal(snapshot_id))
        was_interrupted = self._root.refs(snapshot_id).exists() or bool(self._stages(snapshot_id))
        usage = record.usage
        if planned is None or planned.strip:
            stripped = self._workers.call(layer.strip, self._root.fs(snapshot_id), names)
            usage = record.usage if was_interrupted else stripped
            self._drop_index(snapshot_id)
        failpoint.hit("seal.stripped")
        if planned is None:
            return Sealed(usage, record.features, None)
        outcome = self._share(record, below, planned, was_interrupted)
        return _sealed(planned, usage, outcome)

    def is_untidy(self, snapshot_id: SnapshotId) -> bool:
        """Whether `tidy` might find something."""
        return self._root.seal(snapshot_id).exists() or self._root.work(snapshot_id).exists()

    def tidy(self, snapshot_id: SnapshotId, kind: Kind) -> None:
        """Discards what sealing needed, once it is over or was not begun. Raises OSError."""
        if kind is Kind.COMMITTED:
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

    def _names_for(self, is_lowest: bool) -> Names:
        return self._names.of_the_lowest_layer() if is_lowest else self._names

    def _in_use(self, tree: Path) -> bool:
        return self._trial is not None and tree.exists() and is_upper_in_use(tree, self._root.spool, self._trial)

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

    def _in_place(self, target: Target, strategy: str, names: Names) -> Layer:
        if not target.chain.ids:
            names = names.of_the_lowest_layer()  # if Commit gives it no parent, which `seal` will know
        found = self._workers.call(layer.finish, self._root.fs(target.id), names)
        least_bytes = self._rules.stub_min_bytes if strategy == STUB else 1
        if found.largest_bytes < least_bytes:
            strategy = OFF
        strip = target.materialized or found.has_dead_attributes
        directory = self._root.seal(target.id)
        self._trash.discard(directory, f"{target.id}.seal")  # of a commit that failed
        if strategy != OFF:
            try:
                plan.Plan(
                    strategy,
                    self._rules.stub_min_bytes,
                    self._rules.never_link,
                    strip,
                    found.needs,
                    found.apparent_bytes,
                    found.mtimes_ns,
                ).write(directory)
            except OSError as error:
                log.warning("commit.not_shared", snapshot_key=target.key, id=target.id, reason=str(error))
                self._trash.discard(directory, f"{target.id}.seal")
                strategy = OFF
        sealing = strip or strategy != OFF
        needs = found.needs | OF_STUBS if strategy == STUB else found.needs
        return Layer(target.id, found.usage, needs, sealing)

    def _share(
        self, record: Record, below: Sequence[SnapshotId], planned: plan.Plan, was_interrupted: bool
    ) -> Outcome | None:
        """Replaces files of the tree by objects, or stubs of objects. What fails leaves the rest of the files private.

        None if part of it was done by a run that was killed.
        """
        snapshot_id, tree = record.id, self._root.fs(record.id)
        stages = self._root.seal(snapshot_id)
        layout = Layout(
            tree,
            self._root.refs(snapshot_id),
            stages,
            self._root.objects,
            tuple(map(self._root.directory, below)),
            was_interrupted,
        )
        rules = replace(
            self._rules,
            strategy=planned.strategy,
            stub_min_bytes=planned.stub_min_bytes,
            never_link=planned.never_link,
        )
        outcome = Outcome()
        for _ in range(_SHARINGS):
            try:
                if was_interrupted:
                    self._clear_stages(snapshot_id, layout)
                layout.refs.mkdir(mode=0o700, exist_ok=True)
                sync_directory(layout.refs.parent)
                failpoint.hit("seal.sharing")
                current = replace(layout, is_resumed=was_interrupted)
                for part in self._workers.share_out(share, current, rules):
                    outcome.add(part)
                break
            except Stopped:
                raise
            except Exception as error:  # whatever it is, the layer is whole, and the commit must not fail
                log.error("commit.sharing_failed", name=record.name, id=snapshot_id, reason=repr(error))
                was_interrupted, outcome = True, Outcome()
        else:
            self._clear_stages(snapshot_id, layout)
        if was_interrupted and layout.refs.exists():
            self._workers.call(clear_up, layout)
        with suppress(OSError):  # ENOTEMPTY, nearly always
            layout.refs.rmdir()
        failpoint.hit("seal.shared")
        self._workers.call(plan.settle, tree, planned.mtimes_ns, was_interrupted, self._in_order)
        failpoint.hit("seal.settled")
        log.info(
            "commit.shared",
            name=record.name,
            id=snapshot_id,
            strategy=planned.strategy,
            files=outcome.shared_inodes,
            new_objects=outcome.new_objects,
            private=dict(outcome.private),
        )
        return None if was_interrupted else outcome

    def _stages(self, snapshot_id: SnapshotId) -> list[Path]:
        """Of a run that was killed."""
        directory = self._root.seal(snapshot_id)
        return [path for path in directory.iterdir() if path.name.isdecimal()] if directory.exists() else []

    def _clear_stages(self, snapshot_id: SnapshotId, layout: Layout) -> None:
        """After a kill. Here and not in the background: links that are left count in st_nlink."""
        stages = self._stages(snapshot_id)
        self._workers.call(files.finish_swaps, layout.tree, stages)
        for stage in stages:
            remove_tree(stage.parent, stage.name, self._stopping)

    @contextmanager
    def _copy(self, target: Target) -> Iterator[Layer]:
        with self._ids.reserve() as new_id:
            directory = self._root.directory(new_id)
            try:
                directory.mkdir(mode=0o700)
                names = self._names_for(is_lowest=not target.chain.ids)
                self._workers.call_once(
                    clone.copy_tree, self._root.fs(target.id), self._root.fs(new_id), names, self._rules.reflink
                )
                failpoint.hit("copy.made")
                found = self._workers.call(layer.finish, self._root.fs(new_id), self._names)
                sync_directory(directory)
                sync_directory(self._root.snapshots)
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
            sync_directory(work)

    def _make_new_tree(self, snapshot_id: SnapshotId, names: Names) -> Usage:
        directory = self._root.directory(snapshot_id)
        try:
            self._workers.call_once(
                clone.copy_tree, self._root.fs(snapshot_id), directory / "new", names, self._rules.reflink
            )
            usage = self._workers.call(layer.finish, directory / "new", names).usage
        except BaseException:
            self._trash.discard(directory / "new", f"{snapshot_id}.new")
            raise
        failpoint.hit("seal.copied")
        fd = os.open(directory, OPEN_DIRECTORY)
        try:
            linux.renameat2(fd, b"fs", fd, b"new", linux.RENAME_EXCHANGE)
            os.fsync(fd)
        finally:
            os.close(fd)
        log.info("commit.new_tree", id=snapshot_id)
        failpoint.hit("seal.exchanged")
        self._finish_exchange(snapshot_id)
        return usage

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


def _sealed(planned: plan.Plan, usage: Usage, outcome: Outcome | None) -> Sealed:
    facts = Facts(planned.strategy, planned.apparent_bytes)
    if outcome is None:
        return Sealed(usage, _features(planned, has_stubs=planned.strategy == STUB), facts)
    size_bytes = usage.size_bytes - outcome.shared_bytes + outcome.stub_bytes
    inodes = usage.inodes if planned.strategy == STUB else usage.inodes - outcome.shared_inodes
    return Sealed(
        usage,
        _features(planned, has_stubs=planned.strategy == STUB and outcome.shared_inodes > 0),
        replace(facts, own=Usage(size_bytes, inodes), private=dict(outcome.private), many_names=outcome.many_names),
    )


def _features(planned: plan.Plan, has_stubs: bool) -> Feature:
    return planned.needs | OF_STUBS if has_stubs else planned.needs
