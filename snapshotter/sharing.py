"""Sharing the files of a layer that is being sealed: what worker processes do of it, in which order, and what is done
when one of them fails or an earlier run was killed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import structlog

from snapshotter import failpoint
from snapshotter.content import files
from snapshotter.content.plan import Plan, settle
from snapshotter.content.share import OFF, STUB, Layout, Outcome, Rules, clear_up, share
from snapshotter.durable import FULL, Stopped, keeps_order, remove_tree
from snapshotter.layer import Found
from snapshotter.meta.schema import Facts, Record
from snapshotter.meta.snapshots import Sealed
from snapshotter.model import SnapshotId, Usage
from snapshotter.root import Root
from snapshotter.workers.pool import Workers

log = structlog.get_logger()

_ATTEMPTS = 2
"""How often to begin when a worker dies."""


class Sharing:
    """Works on snapshots whose claim the caller holds."""

    def __init__(self, root: Root, rules: Rules, workers: Workers, stopping: Callable[[], bool]) -> None:
        self._root = root
        self._rules = rules
        self._workers = workers
        self._stopping = stopping
        self._in_order = keeps_order(root.path)

    def plan(self, snapshot_id: SnapshotId, strip: bool, found: Found) -> Plan | None:
        """Sets down, before the commit point, how the layer's files are to be shared; None if they are not."""
        rules, directory = self._rules, self._root.seal(snapshot_id)
        least_bytes = rules.stub_min_bytes if rules.strategy == STUB else 1
        if rules.strategy == OFF or found.largest_bytes < least_bytes:
            return None
        planned = Plan(
            rules.strategy,
            rules.stub_min_bytes,
            rules.never_link,
            strip,
            found.needs,
            found.apparent_bytes,
            found.mtimes_ns,
            rules.durability,
            rules.run,
        )
        try:
            planned.write(directory)
        except OSError as error:
            log.warning("commit.not_shared", id=snapshot_id, reason=str(error))
            if directory.exists():
                remove_tree(directory.parent, directory.name, self._stopping)
            return None
        return planned

    def was_begun(self, snapshot_id: SnapshotId) -> bool:
        """Whether an earlier run may have shared some of the files."""
        return self._root.refs(snapshot_id).exists() or bool(self._stages(snapshot_id))

    def share(self, record: Record, below: Sequence[SnapshotId], planned: Plan, was_interrupted: bool) -> Sealed:
        """Replaces files of the tree by objects, or by stubs of objects. Where that fails, files stay private.

        `below`: the layers that the snapshot stands on. Raises durable.Stopped, and OSError when what was begun cannot
        be brought to an end.
        """
        tree, refs, seal = (place(record.id) for place in (self._root.fs, self._root.refs, self._root.seal))
        layers = tuple(map(self._root.directory, below))
        layout = Layout(tree, refs, seal, self._root.objects, layers, was_interrupted, self._in_order)
        rules = replace(
            self._rules,
            strategy=planned.strategy,
            stub_min_bytes=planned.stub_min_bytes,
            never_link=planned.never_link,
            durability=planned.durability,
            run=planned.run,
        )
        outcome = None
        for _ in range(_ATTEMPTS):
            try:
                outcome = self._attempt(record.id, layout, rules)
                break
            except Stopped:
                raise
            except Exception as error:  # whatever it is, the layer is whole, and the commit must not fail
                log.error("commit.sharing_failed", name=record.name, id=record.id, reason=repr(error))
                layout = replace(layout, is_resumed=True)
        else:
            self._clear_stages(record.id, tree)
        if layout.is_resumed and refs.exists():
            self._workers.call(clear_up, layout)
        with suppress(OSError):  # ENOTEMPTY, nearly always
            refs.rmdir()
        failpoint.hit("seal.shared")
        may_sync = rules.durability == FULL and layout.in_order
        self._workers.call(settle, tree, planned.mtimes_ns, layout.is_resumed, may_sync)
        failpoint.hit("seal.settled")
        _report(record, planned, outcome or Outcome())
        return _sealed(planned, record.usage, None if layout.is_resumed else outcome)

    def _attempt(self, snapshot_id: SnapshotId, layout: Layout, rules: Rules) -> Outcome:
        if layout.is_resumed:
            self._clear_stages(snapshot_id, layout.tree)
        layout.refs.mkdir(mode=0o700, exist_ok=True)
        failpoint.hit("seal.sharing")
        outcome = Outcome()
        for part in self._workers.share_out(share, layout, rules):
            outcome.add(part)
        return outcome

    def _stages(self, snapshot_id: SnapshotId) -> list[Path]:
        """Of a run that was killed."""
        directory = self._root.seal(snapshot_id)
        return [path for path in directory.iterdir() if path.name.isdecimal()] if directory.exists() else []

    def _clear_stages(self, snapshot_id: SnapshotId, tree: Path) -> None:
        """Here and not in the background: links that are left count in st_nlink."""
        stages = self._stages(snapshot_id)
        self._workers.call(files.finish_swaps, tree, stages)
        for stage in stages:
            remove_tree(stage.parent, stage.name, self._stopping)


def _report(record: Record, planned: Plan, outcome: Outcome) -> None:
    log.info(
        "commit.shared",
        name=record.name,
        id=record.id,
        strategy=planned.strategy,
        files=outcome.shared_inodes,
        new_objects=outcome.new_objects,
        private=dict(outcome.private),
    )


def _sealed(planned: Plan, usage: Usage, outcome: Outcome | None) -> Sealed:
    """Without an outcome: an earlier run shared some of the files, and nobody counted."""
    facts = Facts(planned.strategy, planned.apparent_bytes)
    if outcome is None:
        return Sealed(usage, planned.may_need(), facts)
    size_bytes = usage.size_bytes - outcome.shared_bytes + outcome.stub_bytes
    inodes = usage.inodes if planned.strategy == STUB else usage.inodes - outcome.shared_inodes
    return Sealed(
        usage,
        planned.may_need() if outcome.shared_inodes else planned.needs,
        replace(facts, own=Usage(size_bytes, inodes), private=dict(outcome.private), many_names=outcome.many_names),
    )
