"""A root without its daemon: who checks it, owns it meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from snapshotter.durable import remove_tree
from snapshotter.errors import FailedPrecondition, NotFound
from snapshotter.fsck import database, places
from snapshotter.fsck.findings import Finding, Progress
from snapshotter.fsck.fixes import Bench, Rebuild
from snapshotter.fsck.heal import Lost, OwnFiles, Source
from snapshotter.fsck.image import Image
from snapshotter.fsck.lost import LostAndFound
from snapshotter.fsck.repair import Done, Step, carry_out, plan
from snapshotter.fsck.runner import Check, Subject
from snapshotter.meta.schema import Record
from snapshotter.overlay.attributes import TRUSTED
from snapshotter.root import Root, RootLock
from snapshotter.workers.pool import Workers

_NEEDED = ("metadata", "snapshots", "objects", "mounts", "busy", "trash", "spool")
ROUNDS = 5
"""How often what repair did may show something else to be repaired."""


@contextmanager
def opened(path: Path) -> Iterator[Subject]:
    """Raises NotFound where no root is, FailedPrecondition while a daemon has it."""
    if not (path / "lock").is_file():
        raise NotFound(f"{path} is not the root of a dedup-snapshotter: name the directory that its daemon has as root")
    lock = RootLock(path)
    try:
        if missing := [name for name in _NEEDED if not (path / name).is_dir()]:
            raise FailedPrecondition(
                f"root {path} lacks the directory {missing[0]}: start the daemon once, it makes it"
            )
        root, workers = Root(path), Workers([lock.fileno()])
        try:
            yield Subject(
                root,
                workers,
                TRUSTED,
                read=lambda: workers.call(database.read, root.metadata),
                problems=lambda: workers.call(database.problems, root.metadata),
            )
        finally:
            workers.close()
    finally:
        lock.release()


def steps_for(check: Check, findings: Sequence[Finding]) -> list[Step]:
    """What repair would do about the findings of a check that has ended."""
    root = check.subject.root
    return plan(findings, places.in_use(root, check.image) if check.image else {})


def repair(check: Check, steps: Sequence[Step], sources: Sequence[Source] = ()) -> Iterator[Done | Finding | Progress]:
    """Does what the steps say, checks again, and so on until nothing can be done any more: what was done, then what is
    left. `sources`: where contents may be found, beside the root itself. Raises what a check raises."""
    subject, image = check.subject, check.image
    _clear_spool(subject.root)
    bench = Bench(
        subject.root,
        LostAndFound(subject.root.path),
        subject.workers,
        subject.names,
        (OwnFiles(subject.root), *sources),
    )
    findings = [step.finding for step in steps]
    failed: set[Finding] = set()
    for _ in range(ROUNDS):
        any_done = False
        steps = [step for step in steps if step.finding not in failed]
        users = _users_of_lost(steps, image) if image else {}
        for source in bench.sources:
            source.expect(users)
        for done in carry_out(steps, bench):
            yield done
            any_done = any_done or not done.failure
            if done.failure:
                failed.add(done.step.finding)
        if not any_done:
            break
        again, findings = Check(subject, check.verify_content), []
        for event in again.events():
            if isinstance(event, Finding):
                findings.append(event)
            else:
                yield event
        steps, image = steps_for(again, findings), again.image
    yield from findings


def _clear_spool(root: Root) -> None:
    """Of what a repair left there that was killed when all was done but this."""
    for entry in root.spool.glob("fsck.*"):
        remove_tree(root.spool, entry.name, lambda: False)


def _users_of_lost(steps: Iterable[Step], image: Image) -> dict[Lost, list[Record]]:
    """Of the objects that are to be made anew: the layers that use them."""
    fixes = [step.finding.fix for step in steps if not step.obstacle]
    return {
        fix.lost: [image.records[snapshot_id] for snapshot_id in sorted(fix.touches)]
        for fix in fixes
        if isinstance(fix, Rebuild)
    }
