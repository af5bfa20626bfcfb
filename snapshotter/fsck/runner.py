"""A whole check: what it looks at, in which order, in which processes; and the repair of what it found."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from threading import get_native_id
from typing import Any, TypeVar

from snapshotter.fsck import lost, metadata, objects, overlays, places, trees
from snapshotter.fsck.database import Raw
from snapshotter.fsck.findings import Finding, Progress
from snapshotter.fsck.fixes import RemoveRedirect, RewriteDatabase, Strip
from snapshotter.fsck.image import Image
from snapshotter.fsck.objects import Stored
from snapshotter.fsck.overlays import Unresolved
from snapshotter.fsck.references import References
from snapshotter.fsck.trees import Role, Scanned
from snapshotter.meta.schema import Record
from snapshotter.model import Kind, SnapshotId
from snapshotter.overlay.attributes import Names
from snapshotter.progress import waiting_for
from snapshotter.root import SHARDS_OF_OBJECTS, Root
from snapshotter.workers.pool import Workers

K = TypeVar("K")
Event = Finding | Progress
_Scans = dict[SnapshotId, Scanned]

_PARTS_OF_STORE = 32
"""Where contents are read, which takes different times."""
_MANY_PATHS = 5


@dataclass(frozen=True, slots=True)
class Subject:
    """What is checked, and by what means."""

    root: Root
    workers: Workers
    names: Names
    read: Callable[[], Raw]
    """Reads the metadata. Raises OSError."""
    problems: Callable[[], list[str]]
    """Looks at the metadata file (database.problems). Raises OSError."""
    spared: Callable[[], frozenset[SnapshotId]] = frozenset
    """Ids that somebody is changing."""
    since_ns: int | None = None
    """When the check began, if others change the root meanwhile: what they touch since then is not judged."""


@dataclass(slots=True)
class Check:
    """One check of a root. `events` runs it, once."""

    subject: Subject
    verify_content: bool = False
    image: Image | None = field(default=None, init=False)
    """The metadata as it was at the end; None where it could not be read."""
    _threads: list[int] = field(default_factory=list, init=False)
    """Which it waits for (gettid(2))."""

    def events(self) -> Iterator[Event]:
        """All findings, and how far it is in between. Raises Stopped, OSError, and FailedPrecondition for a newer
        schema."""
        yield Progress("metadata", 0, 1)
        problems, before = self.subject.problems(), None
        try:
            before = Image(self.subject.read())
        except OSError as error:
            yield Finding("database-unreadable", "metadata/data.mdb", str(error))
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            fix = RewriteDatabase() if before else None
            yield Finding("database-damaged", "metadata/data.mdb", problems[0] + more, fix=fix)
        pool = ThreadPoolExecutor(self.subject.workers.cpus, "fsck", lambda: self._threads.append(get_native_id()))
        try:
            yield from self._everything(before, pool)
        finally:  # who gave up does not wait for what is under way
            pool.shutdown(wait=False, cancel_futures=True)

    def _everything(self, before: Image | None, pool: ThreadPoolExecutor) -> Generator[Event, None, None]:
        scans = yield from self._scan_trees(before, pool)
        others = yield from self._scan_others(before, scans, pool)
        stored = yield from self._scan_objects(pool)
        for stray in stored.strays:
            yield Finding("stray", f"objects/{stray}")
        if before is None:
            return
        listed = places.directory_ids(self.subject.root)
        spared = self.subject.spared()  # in this order, as the sweep of the engine has it
        image = self.image = Image(self.subject.read())
        unchanged = {
            snapshot_id for snapshot_id, record in image.records.items() if before.records.get(snapshot_id) == record
        } - spared
        found: list[Finding] = [*metadata.check(image, listed)]
        if not image.damaged:
            named = {finding.snapshot for finding in found if finding.id == "record-lost" and finding.snapshot}
            found += self._places(image, spared | named, listed)
            known = {snapshot_id: scanned for snapshot_id, scanned in scans.items() if snapshot_id in unchanged}
            gone = [scanned for snapshot_id, scanned in scans.items() if snapshot_id not in unchanged]
            found += self._layers(image, known)
            found += yield from self._overlays(image, known, pool)
            references = References(image, known, [*others, *gone], stored, self.subject.since_ns)
            paths = yield from self._users(image, references, stored, pool)
            found += references.check(paths)
        yield from found

    def _places(self, image: Image, spared: frozenset[SnapshotId], listed: frozenset[int]) -> list[Finding]:
        """While others work on the root, only what is so twice: one that was begun or ended after the metadata was read
        is known, or spared, the second time."""
        root = self.subject.root
        found = list(places.check(root, image, spared, listed))
        if self.subject.since_ns is None or not found:
            return found
        spared |= self.subject.spared()  # before the metadata is read, as before
        again = set(places.check(root, Image(self.subject.read()), spared, listed))
        return [finding for finding in found if finding in again]

    def _scan_trees(self, image: Image | None, pool: ThreadPoolExecutor) -> Generator[Event, None, _Scans]:
        root, names = self.subject.root, self.subject.names
        jobs = {
            record.id: (trees.scan, root.directory(record.id), _role(record), names)
            for record in (image.records.values() if image else ())
        }
        return (yield from self._run("layers", jobs, pool))

    def _scan_others(
        self, image: Image | None, scans: _Scans, pool: ThreadPoolExecutor
    ) -> Generator[Event, None, list[Scanned]]:
        """What may have names of the same files. After the snapshots: what is removed meanwhile goes to the trash."""
        root = self.subject.root
        known = {str(snapshot_id) for snapshot_id in (image.records if image else ())}
        directories = [
            *(path for path in root.snapshots.iterdir() if path.name not in known),
            *root.trash.iterdir(), *root.busy.iterdir(), root.spool, root.path / lost.NAME,
        ]  # fmt: skip
        jobs = {path: (trees.scan, path, Role.OTHER, self.subject.names) for path in directories if path.is_dir()}
        seen = {scanned.identity for scanned in scans.values()}
        found = yield from self._run("leftovers", jobs, pool)
        return [scanned for scanned in found.values() if scanned.identity not in seen]

    def _scan_objects(self, pool: ThreadPoolExecutor) -> Generator[Event, None, Stored]:
        shards = sorted(SHARDS_OF_OBJECTS)
        parts = _PARTS_OF_STORE if self.verify_content else self.subject.workers.cpus
        how = self.verify_content, self.subject.workers.cpus, self.subject.since_ns is None
        jobs = {part: (objects.scan, self.subject.root.objects, shards[part::parts], *how) for part in range(parts)}
        stored = Stored()
        for part in (yield from self._run("objects", jobs, pool)).values():
            stored.add(part)
        return stored

    def _users(
        self, image: Image, references: References, stored: Stored, pool: ThreadPoolExecutor
    ) -> Generator[Event, None, dict[str, list[str]]]:
        """Of objects that cannot be read right: the paths at which they are used, for a person."""
        refs = references.lost_objects()
        inodes = {str(stored.inodes[ref][0]): ref for ref in refs if ref in stored.inodes}
        holders = sorted({snapshot_id for ref in refs for snapshot_id in references.holders(ref)})
        jobs = {
            snapshot_id: (trees.users, self.subject.root.directory(snapshot_id), refs, frozenset(map(int, inodes)))
            for snapshot_id in holders
        }
        paths: dict[str, list[str]] = {}
        for snapshot_id, found in sorted((yield from self._run("users", jobs, pool)).items()):
            for key, used in found.items():
                more = f" and {len(used) - _MANY_PATHS} more" if len(used) > _MANY_PATHS else ""
                shown = ", ".join(map(os.fsdecode, used[:_MANY_PATHS])) + more
                paths.setdefault(inodes.get(key, key), []).append(f"{image.title(snapshot_id)} for {shown}")
        return paths

    def _layers(self, image: Image, scans: _Scans) -> Iterator[Finding]:
        """What the trees show by themselves."""
        needs = {
            snapshot_id: scanned.needs
            for snapshot_id, scanned in scans.items()
            if image.records[snapshot_id].kind is Kind.COMMITTED or image.records[snapshot_id].materialized
        }
        yield from metadata.features(image, needs)
        for snapshot_id, scanned in scans.items():
            if image.records[snapshot_id].sealing:
                continue
            if scanned.dead:
                subject = f"snapshots/{snapshot_id}/fs/{os.fsdecode(scanned.dead[0])}"
                detail = f"and others of {image.title(snapshot_id)}" if len(scanned.dead) > 1 else ""
                yield Finding("attribute-dead", subject, detail, snapshot_id, Strip(snapshot_id))
            for path, attribute in scanned.unknown:
                subject = f"snapshots/{snapshot_id}/fs/{os.fsdecode(path)}"
                yield Finding("attribute-unknown", subject, attribute, snapshot_id)

    def _overlays(self, image: Image, scans: _Scans, pool: ThreadPoolExecutor) -> Generator[Event, None, list[Finding]]:
        root, jobs = self.subject.root, {}
        for snapshot_id, scanned in scans.items():
            record = image.records[snapshot_id]
            is_layer = record.kind is Kind.COMMITTED and not record.sealing
            if scanned.uses_lowers and is_layer and image.has_sound_chain(record):
                below = [layer.id for layer in image.ancestors(record)]
                if not all(places.is_tree(root, layer_id) for layer_id in below):
                    continue  # what it refers to is missing with that tree, and may come back with it
                trees_below = [root.fs(layer_id) for layer_id in below]
                jobs[snapshot_id] = (overlays.check, root.fs(snapshot_id), trees_below, self.subject.names)
        found: list[Finding] = []
        for snapshot_id, unresolved in (yield from self._run("redirections", jobs, pool)).items():
            found += _unresolved(snapshot_id, unresolved)
        return found

    def _run(
        self, stage: str, jobs: Mapping[K, tuple[Any, ...]], pool: ThreadPoolExecutor
    ) -> Generator[Event, None, dict[K, Any]]:
        """Calls functions in worker processes. What they look for and is gone, or no directory, is left out."""
        futures = {pool.submit(self.subject.workers.call, *job): key for key, job in jobs.items()}
        results = {}
        done = as_completed(futures)
        for number in range(len(futures)):
            with waiting_for(lambda: self._threads):
                future = next(done)
            yield Progress(stage, number, len(futures))
            with suppress(FileNotFoundError, NotADirectoryError):
                results[futures[future]] = future.result()
        return results


def _role(record: Record) -> Role:
    if record.kind is Kind.COMMITTED:
        return Role.OTHER if record.sealing else Role.LAYER
    return Role.UPPER


def _unresolved(snapshot_id: SnapshotId, found: Unresolved) -> Iterator[Finding]:
    top = f"snapshots/{snapshot_id}/fs/"
    for path, redirect in found.missing:
        fix = RemoveRedirect(snapshot_id, path, redirect)
        detail = f"stands for {os.fsdecode(redirect)}"
        yield Finding("redirect-missing", top + os.fsdecode(path), detail, snapshot_id, fix)
    for first, second, origin in found.twice:
        detail = f"and {os.fsdecode(first)} stand for {os.fsdecode(origin)}"
        yield Finding("redirect-twice", top + os.fsdecode(second), detail, snapshot_id)
    for path in found.no_data:
        yield Finding("metacopy-no-data", top + os.fsdecode(path), "", snapshot_id)
