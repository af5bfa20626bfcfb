"""What the store and each snapshot take, measured now and then in the background.

Sharing makes it a question of all layers what one of them takes. So nothing is kept up to date with each call:
a pass reads the link counts of what every layer refers to, in a worker process, some time after a change.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from snapshotter.content.stubs import is_stub_ref
from snapshotter.durable import Stopped
from snapshotter.meta.schema import Facts
from snapshotter.model import NO_EXTENT, Extent, Kind, SnapshotId, SnapshotSpace, Space, Usage
from snapshotter.progress import join_until, waiting_for
from snapshotter.root import SHARDS_OF_OBJECTS, Root
from snapshotter.usage import Tally
from snapshotter.walker import OPEN_DIRECTORY, walk
from snapshotter.workers.pool import Workers

log = structlog.get_logger()

_QUIET_S = 10.0
"""How long after a change a pass begins."""
_REST = 20
"""And how many times as long as the last pass took after that."""

_OFF = "off"
_MOST_BYTES = (1 << 63) - 1
"""That fit into an answer: files of holes have any size."""
_LINKS_BESIDE_PATHS = 2
"""Of an object: its name in the store, and one in refs/ of each layer."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One snapshot to be measured."""

    id: SnapshotId
    name: str
    kind: Kind
    usage: Usage
    """Of a layer: what its tree takes by itself."""
    facts: Facts | None


@dataclass(frozen=True, slots=True)
class Counted:
    apparent_bytes: int
    directory: Extent
    """The directory that all of it is in."""
    own: Extent
    """That, and whatever is in it, but for objects."""
    objects: Extent
    """That it uses."""
    exclusive_objects: Extent
    """Those of them that nobody else uses."""


class Accountant:
    """Owns the thread. `close` it."""

    def __init__(self, root: Root, workers: Workers, subjects: Callable[[], Sequence[Subject]]) -> None:
        """`subjects`: all snapshots as the metadata has them."""
        self._root = root
        self._workers = workers
        self._subjects = subjects
        self._wake = threading.Condition()
        self._due_s: float | None = 0.0
        self._stopping = False
        self._begun = 0
        """Passes, as `_ended`."""
        self._ended = 0
        self._last: Space | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="accountant", daemon=True)
        self._thread.start()

    def changed(self) -> None:
        """Something was committed or removed: makes a pass in a while."""
        with self._wake:
            if self._due_s is None:
                rest_s = _REST * self._last.took_ns / 1e9 if self._last else 0.0
                self._due_s = time.monotonic() + max(_QUIET_S, rest_s)
                self._wake.notify_all()

    def space(self, now: bool) -> Space:
        """As of the last pass, or, with `now`, of one that begins after this was called; waits for it.

        Raises Stopped, and what the pass raised.
        """
        with self._wake:
            wanted = 1
            if now:
                wanted = self._begun + 1
                self._due_s = 0.0
                self._wake.notify_all()
            with waiting_for(lambda: [self._thread.native_id or 0]):
                while self._ended < wanted and not self._stopping:
                    self._wake.wait()
            if self._stopping:
                raise Stopped("space")
            if self._failure or self._last is None:
                raise self._failure or Stopped("space")
            return self._last

    def stop(self) -> None:
        """Answers who waits."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()

    def close(self, deadline_s: float) -> None:
        self.stop()
        join_until(self._thread, deadline_s)

    def _run(self) -> None:
        while self._wait_until_due():
            found, failure = None, None
            try:
                found = self._measure()
            except Stopped:
                return
            except Exception as error:  # who waits must not wait for ever
                log.warning("space.failed", reason=str(error))
                failure = error
            with self._wake:
                self._ended, self._failure, self._last = self._begun, failure, found or self._last
                self._wake.notify_all()

    def _wait_until_due(self) -> bool:
        """False when it is time to end."""
        with self._wake:
            while not self._stopping:
                left_s = None if self._due_s is None else self._due_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    self._due_s = None
                    self._begun += 1
                    return True
                self._wake.wait(left_s)
        return False

    def _measure(self) -> Space:
        as_of_ns, began_ns = time.time_ns(), time.monotonic_ns()
        found: list[SnapshotSpace] = []
        own, unshared, private = NO_EXTENT, NO_EXTENT, Counter[str]()
        for subject in self._subjects():
            try:
                counted = self._workers.call(count_snapshot, self._root.directory(subject.id), subject.facts)
            except FileNotFoundError:
                if subject.kind is not Kind.VIEW:  # which often has no directory
                    continue  # removed meanwhile
                counted = Counted(0, NO_EXTENT, NO_EXTENT, NO_EXTENT, NO_EXTENT)
            found.append(_space(subject, counted))
            own += counted.own
            unshared += _unshared(subject, counted)
            private.update(found[-1].private)
        objects = self._workers.call(count_objects, self._root.objects)
        filesystem = os.statvfs(self._root.path)
        return Space(
            as_of_ns=as_of_ns,
            took_ns=time.monotonic_ns() - began_ns,
            snapshots=tuple(found),
            apparent_bytes=min(_MOST_BYTES, sum(space.apparent_bytes for space in found)),
            allocated=objects + own,
            unshared=unshared,
            objects=objects,
            filesystem_inodes=filesystem.f_files,
            filesystem_inodes_free=filesystem.f_ffree,
            filesystem_bytes=filesystem.f_blocks * filesystem.f_frsize,
            filesystem_bytes_free=filesystem.f_bfree * filesystem.f_frsize,
            private=dict(private),
        )


def _space(subject: Subject, counted: Counted) -> SnapshotSpace:
    strategy, private = "", {}
    if subject.kind is Kind.COMMITTED:
        strategy = subject.facts.strategy if subject.facts else _OFF
        private = dict(subject.facts.private) if subject.facts else {}
    return SnapshotSpace(
        name=subject.name,
        kind=subject.kind,
        strategy=strategy,
        apparent_bytes=min(_MOST_BYTES, counted.apparent_bytes),
        allocated=counted.own + counted.objects,
        shared=counted.objects - counted.exclusive_objects,
        exclusive=counted.own + counted.exclusive_objects,
        private=private,
    )


def _unshared(subject: Subject, counted: Counted) -> Extent:
    if subject.kind is not Kind.COMMITTED:
        return counted.own
    return counted.directory + Extent(subject.usage.size_bytes, subject.usage.inodes)


# -- in worker processes


def count_snapshot(directory: Path, facts: Facts | None) -> Counted:
    """What is below a snapshot's directory. Raises FileNotFoundError without one, OSError."""
    refs = directory / "refs"
    names_of = Counter(facts.many_names) if facts else Counter[str]()
    used = _refs(refs)
    if facts and facts.own:
        own = Extent(facts.own.size_bytes, facts.own.inodes)
        apparent_bytes = facts.apparent_bytes
    else:
        refs_of = {status.st_ino: ref for ref, status in used.items()}
        own, apparent_bytes = _scan([directory / "fs", directory / "work"], refs_of, names_of)
    objects, exclusive = NO_EXTENT, NO_EXTENT
    for ref, status in used.items():
        extent = Extent.of(status)
        objects += extent
        paths = 0 if is_stub_ref(ref) else max(1, names_of[ref])
        if status.st_nlink <= _LINKS_BESIDE_PATHS + paths:
            exclusive += extent
    top = Extent.of(directory.stat())
    own += top
    if used:
        own += Extent.of(refs.stat())
    return Counted(apparent_bytes, top, own, objects, exclusive)


def count_objects(directory: Path) -> Extent:
    """All objects. Raises OSError."""
    total = NO_EXTENT
    for shard in SHARDS_OF_OBJECTS:
        with os.scandir(directory / shard) as entries:
            for entry in entries:
                try:
                    total += Extent.of(entry.stat(follow_symlinks=False))
                except FileNotFoundError:
                    continue
    return total


def _refs(directory: Path) -> dict[str, os.stat_result]:
    try:
        with os.scandir(directory) as entries:
            return {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
    except FileNotFoundError:
        return {}


def _scan(trees: Sequence[Path], objects: dict[int, str], names_of: Counter[str]) -> tuple[Extent, int]:
    """What some trees take, but for objects, and the sizes of all files in the first; counts the paths of objects."""
    tally, apparent_bytes = Tally(), 0
    for tree in trees:
        try:
            fd = os.open(tree, OPEN_DIRECTORY)
        except FileNotFoundError:
            if tree is trees[0]:
                raise
            continue
        try:
            tally.add(os.fstat(fd))
            for entry in walk(fd):
                if (ref := objects.get(entry.status.st_ino)) is None:
                    tally.add(entry.status)
                else:
                    apparent_bytes += 0 if names_of[ref] else entry.status.st_size
                    names_of[ref] += 1
        finally:
            os.close(fd)
    usage = tally.usage()
    return Extent(usage.size_bytes, usage.inodes), apparent_bytes + tally.apparent_bytes
