"""What repair can do: one small class an act. They are made by the checks, carried out one by one (repair.py).

Each act is durable when it returns and harmless to repeat after a kill, at whatever point; and none deletes what might
be the only copy of something: that goes to lost+found first.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from snapshotter import failpoint, layer, linux
from snapshotter.content import files
from snapshotter.content.hashing import Hasher
from snapshotter.content.objects import is_unsynced, place_of
from snapshotter.content.plan import read_plan, settle
from snapshotter.content.stubs import DIGEST
from snapshotter.durable import sync_directory
from snapshotter.errors import quote
from snapshotter.fsck import database
from snapshotter.fsck.heal import Lost, Source, duplicate, made_anew
from snapshotter.fsck.lost import LostAndFound
from snapshotter.fsck.objects import digest_by_name, mark_of
from snapshotter.fsck.trees import users
from snapshotter.model import SnapshotId
from snapshotter.overlay.attributes import Names
from snapshotter.root import Root
from snapshotter.walker import OPEN_DIRECTORY
from snapshotter.workers.pool import Workers

_NOBODY: frozenset[SnapshotId] = frozenset()


@dataclass(frozen=True, slots=True)
class Bench:
    """What acts work with."""

    root: Root
    lost: LostAndFound
    workers: Workers
    names: Names
    sources: Sequence[Source]


class CannotRepair(OSError):
    """It turned out that the act would not help, or could harm."""


# -- metadata


@dataclass(frozen=True, slots=True)
class ChangeMetadata:
    """Puts and deletes some entries, in one transaction."""

    changes: tuple[database.Change, ...]
    note: str = ""
    """What is to be written down before."""
    aside: SnapshotId | None = None
    """A snapshot whose directory goes to lost+found."""

    @property
    def touches(self) -> frozenset[SnapshotId]:
        return _NOBODY if self.aside is None else frozenset([self.aside])

    def describe(self) -> str:
        put = sum(value is not None for _, _, value in self.changes)
        text = f"change the metadata ({put} entries written, {len(self.changes) - put} deleted)"
        return text + (f", and move snapshots/{self.aside} to lost+found" if self.aside is not None else "")

    def apply(self, bench: Bench) -> None:
        if self.note:
            bench.lost.note(bench.root.metadata, self.note)
        if self.aside is not None and bench.root.directory(self.aside).exists():
            bench.lost.move(bench.root.directory(self.aside), "its record was lost")
        failpoint.hit("fsck.step")
        bench.workers.call(database.apply, bench.root.metadata, list(self.changes))


@dataclass(frozen=True, slots=True)
class RewriteDatabase:
    """Writes the LMDB file anew from what can be read of it."""

    touches: frozenset[SnapshotId] = _NOBODY

    def describe(self) -> str:
        return "write metadata/data.mdb anew, and move the old one to lost+found"

    def apply(self, bench: Bench) -> None:
        fresh, data = bench.root.spool / "fsck.metadata", bench.root.metadata / database.DATA
        _discard_directory(fresh)
        bench.workers.call(database.write_anew, bench.root.metadata, fresh)
        bench.lost.keep(data, "it broke a rule of LMDB; what is in its place was written from its records")
        failpoint.hit("fsck.step")
        (fresh / database.DATA).rename(data)
        failpoint.hit("fsck.step")
        (bench.root.metadata / "lock.mdb").unlink(missing_ok=True)  # readers of the old one
        sync_directory(bench.root.metadata)
        _discard_directory(fresh)


def _discard_directory(directory: Path) -> None:
    with suppress(FileNotFoundError):
        for entry in directory.iterdir():
            entry.unlink()
        directory.rmdir()


# -- directories and mounts


@dataclass(frozen=True, slots=True)
class MakeWork:
    """Makes the work directory of an active snapshot."""

    snapshot: SnapshotId

    @property
    def touches(self) -> frozenset[SnapshotId]:
        return frozenset([self.snapshot])

    def describe(self) -> str:
        return f"make the directory snapshots/{self.snapshot}/work"

    def apply(self, bench: Bench) -> None:
        bench.root.work(self.snapshot).mkdir(mode=0o700, exist_ok=True)
        sync_directory(bench.root.directory(self.snapshot))


@dataclass(frozen=True, slots=True)
class Detach:
    """Unmounts what is at a path."""

    path: str
    touches: frozenset[SnapshotId] = _NOBODY

    def describe(self) -> str:
        return f"unmount {quote(self.path)}"

    def apply(self, _bench: Bench) -> None:
        linux.umount2(self.path, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)


@dataclass(frozen=True, slots=True)
class FinishSwaps:
    """Gives the names that a file kept to the one that has its other names."""

    snapshot: SnapshotId

    @property
    def touches(self) -> frozenset[SnapshotId]:
        return frozenset([self.snapshot])

    def describe(self) -> str:
        return f"finish what snapshots/{self.snapshot}/seal began"

    def apply(self, bench: Bench) -> None:
        seal = bench.root.seal(self.snapshot)
        stages = [path for path in seal.iterdir() if path.name.isdecimal()]
        tree, plan = bench.root.fs(self.snapshot), read_plan(seal)
        mtimes_ns = plan.mtimes_ns if plan else bench.workers.call(layer.finish, tree, bench.names).mtimes_ns
        bench.workers.call(files.finish_swaps, tree, stages)
        bench.workers.call(settle, tree, mtimes_ns, True, True)
        for swapping in [path for stage in stages for path in stage.glob("swapping-*")]:
            if swapping.stat().st_nlink > 1:  # what counts in the link count of a file of the layer
                swapping.unlink()
        bench.lost.move(seal, "what was left of sharing the layer's files; they are shared now")


# -- objects


@dataclass(frozen=True, slots=True)
class LinkObject:
    """Links an object from the layer that holds it into the store, or the other way."""

    ref: str
    snapshot: SnapshotId
    to_store: bool

    @property
    def touches(self) -> frozenset[SnapshotId]:
        # A name in refs/ changes nothing that a mount shows.
        return frozenset([self.snapshot]) if self.to_store else _NOBODY

    def describe(self) -> str:
        held = f"snapshots/{self.snapshot}/refs/{self.ref}"
        stored = f"objects/{place_of(self.ref)}"
        return f"link {held} to {stored}" if self.to_store else f"link {stored} to {held}"

    def apply(self, bench: Bench) -> None:
        stored, held = Lost(self.ref, None).path(bench.root), bench.root.refs(self.snapshot) / self.ref
        source, target = (held, stored) if self.to_store else (stored, held)
        if self.to_store and not _is_right(held, self.ref):
            raise CannotRepair("what the layer holds is damaged itself, or another file")
        _make_directory(target.parent)
        try:
            os.link(source, target, follow_symlinks=False)
        except FileExistsError as error:  # another layer's finding was the same
            if not stat.S_ISREG(target.lstat().st_mode):
                raise CannotRepair("something that is no file has its name: move that away") from error
        sync_directory(target.parent)
        sync_directory(target.parent.parent)


@dataclass(frozen=True, slots=True)
class ReplaceReference:
    """Makes a layer hold the object that the store has."""

    ref: str
    snapshot: SnapshotId
    touches: frozenset[SnapshotId] = _NOBODY

    def describe(self) -> str:
        return f"replace snapshots/{self.snapshot}/refs/{self.ref} by the object"

    def apply(self, bench: Bench) -> None:
        held, stored = bench.root.refs(self.snapshot) / self.ref, Lost(self.ref, None).path(bench.root)
        if held.samefile(stored):
            return
        if not _is_right(stored, self.ref):
            raise CannotRepair("the object in the store is damaged itself: use --verify-content")
        bench.lost.keep(held, f"snapshot {self.snapshot} held it in the place of an object")
        _put(stored, held, bench.root)


@dataclass(frozen=True, slots=True)
class Remark:
    """Writes its hash to an object."""

    ref: str
    touches: frozenset[SnapshotId]

    def describe(self) -> str:
        return f"write its hash to object {self.ref}"

    def apply(self, bench: Bench) -> None:
        path = Lost(self.ref, None).path(bench.root)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            digest, is_right = digest_by_name(fd, self.ref, Hasher(1))
            if not is_right:
                raise CannotRepair("its content is not what its name says: use --verify-content")
            os.setxattr(fd, DIGEST, digest)
            os.fsync(fd)
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Resize:
    """Gives a stub the size of its object."""

    snapshot: SnapshotId
    path: bytes
    ref: str

    @property
    def touches(self) -> frozenset[SnapshotId]:
        return frozenset([self.snapshot])

    def describe(self) -> str:
        return f"give {quote(os.fsdecode(self.path))} in snapshots/{self.snapshot}/fs the size of its object"

    def apply(self, bench: Bench) -> None:
        stored = Lost(self.ref, None).path(bench.root)
        if not _is_right(stored, self.ref):
            raise CannotRepair("its object is damaged: use --verify-content")
        fd = os.open(_in_tree(bench.root, self.snapshot, self.path), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            os.ftruncate(fd, stored.stat().st_size)
            os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
            os.fsync(fd)
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Makes an object anew from a source (heal.py), for all who use it."""

    lost: Lost
    touches: frozenset[SnapshotId]

    def describe(self) -> str:
        return f"make object {self.lost.ref} anew from an equal file"

    def apply(self, bench: Bench) -> None:
        root, stored = bench.root, self.lost.path(bench.root)
        begun = self._begun(root)
        with nullcontext(begun) if begun else made_anew(root, self.lost, bench.sources) as made:
            old = stored.lstat().st_ino if stored.exists() else None
            if old is not None:
                bench.lost.keep(stored, "its content was not what its name says")
            for snapshot_id in sorted(self.touches):  # first: by these a repetition finds what was made
                held = root.refs(snapshot_id) / self.lost.ref
                _make_directory(held.parent)
                if held.exists() and held.stat().st_ino not in (old, made.stat().st_ino):
                    bench.lost.keep(held, f"snapshot {snapshot_id} held it in the place of an object")
                _put(made, held, root)
            for snapshot_id in sorted(self.touches):
                for path in _paths_of(root, snapshot_id, old):
                    _put(made, path, root)
            _make_directory(stored.parent)
            _put(made, stored, root)  # last: until then a repetition finds it damaged

    def _begun(self, root: Root) -> Path | None:
        """What a repair made that was killed: the names of a file that it did not come to go to the same inode."""
        stored = self.lost.path(root)
        for snapshot_id in sorted(self.touches):
            held = root.refs(snapshot_id) / self.lost.ref
            if held.exists() and not (stored.exists() and held.samefile(stored)) and _is_right(held, self.lost.ref):
                with held.open("rb") as stream:
                    os.fsync(stream.fileno())
                return held
        return None


def _paths_of(root: Root, snapshot_id: SnapshotId, inode: int | None) -> list[Path]:
    """The files of a layer that are an object themselves."""
    if inode is None:
        return []
    found = users(root.directory(snapshot_id), frozenset(), frozenset([inode])).get(str(inode), [])
    return [_in_tree(root, snapshot_id, path) for path in found]


# -- layers


@dataclass(frozen=True, slots=True)
class Separate:
    """Gives a layer or an upper an inode of its own where it has another one's."""

    snapshot: SnapshotId
    inode: int
    together: bool
    """Whether all paths that it has there stay one file."""
    is_content: bool = False
    """Whether the inode is the object of stubs, whose mark the copy must not have."""

    @property
    def touches(self) -> frozenset[SnapshotId]:
        return frozenset([self.snapshot])

    def describe(self) -> str:
        return f"copy inode {self.inode} for snapshots/{self.snapshot}/fs"

    def apply(self, bench: Bench) -> None:
        root = bench.root
        paths = _paths_of(root, self.snapshot, self.inode)
        for group in [paths] if self.together else [[path] for path in paths[1:]]:
            place = root.directory(self.snapshot) / f"fsck.{self.inode}"
            # With other names, it is what a kill left: the rest of the file's names go to the same copy.
            if not (self.together and place.exists() and place.stat().st_nlink > 1):
                place.unlink(missing_ok=True)
                duplicate(group[0], place, frozenset([DIGEST]) if self.is_content else frozenset())
            for path in group:
                _put(place, path, root)
            place.unlink()
        if self.together and root.refs(self.snapshot).exists():
            # What it was an object by is not the layer's any more. The object has its name in the store.
            for entry in os.scandir(root.refs(self.snapshot)):
                if entry.inode() == self.inode and Lost(entry.name, None).path(root).exists():
                    os.unlink(entry.path)
            sync_directory(root.refs(self.snapshot))


@dataclass(frozen=True, slots=True)
class Strip:
    """Removes the attributes of a dead mount from a layer."""

    snapshot: SnapshotId

    @property
    def touches(self) -> frozenset[SnapshotId]:
        return frozenset([self.snapshot])

    def describe(self) -> str:
        return f"remove attributes of a dead mount from snapshots/{self.snapshot}/fs"

    def apply(self, bench: Bench) -> None:
        bench.workers.call(layer.strip, bench.root.fs(self.snapshot), bench.names, True)


@dataclass(frozen=True, slots=True)
class RemoveRedirect:
    """Removes the redirection of a directory, which goes on showing only what it has itself."""

    snapshot: SnapshotId
    path: bytes
    value: bytes

    @property
    def touches(self) -> frozenset[SnapshotId]:
        return frozenset([self.snapshot])

    def describe(self) -> str:
        return f"remove the redirection of {quote(os.fsdecode(self.path))} in snapshots/{self.snapshot}/fs"

    def apply(self, bench: Bench) -> None:
        path = _in_tree(bench.root, self.snapshot, self.path)
        bench.lost.note(path, f"it had {bench.names.redirect} = {self.value!r}, which led to nothing")
        fd = os.open(path, OPEN_DIRECTORY)
        try:
            # What has no redirection is merged with what the layers below have under its name.
            os.setxattr(fd, bench.names.prefix + "opaque", b"y")
            os.removexattr(fd, bench.names.redirect)
            os.fsync(fd)
        finally:
            os.close(fd)


def _in_tree(root: Root, snapshot_id: SnapshotId, path: bytes) -> Path:
    """Nobody changes the tree: so what was no symlink when it was checked is none."""
    return root.fs(snapshot_id) / os.fsdecode(path)


def _is_right(path: Path, ref: str) -> bool:
    """Whether an object is what its name says."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        digest, is_right = digest_by_name(fd, ref, Hasher(1))
    finally:
        os.close(fd)
    mark = mark_of(os.fsencode(path))
    return mark == digest if is_unsynced(ref) else is_right and mark in (None, digest)


def _make_directory(path: Path) -> None:
    """Where there is none. Raises CannotRepair where something else is, be it a symlink that leads to one."""
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise CannotRepair(f"{quote(str(path))} is no directory: move it away")


def _put(source: Path, target: Path, root: Root) -> None:
    """Makes a name one of another inode, durably; the times of its directory stay."""
    stage = root.spool / "fsck.link"
    stage.unlink(missing_ok=True)
    if target.exists() and target.samefile(source):
        return  # rename does nothing with two names of one inode
    os.link(source, stage, follow_symlinks=False)
    status = target.parent.stat()
    failpoint.hit("fsck.step")
    stage.rename(target)
    failpoint.hit("fsck.step")
    os.utime(target.parent, ns=(status.st_atime_ns, status.st_mtime_ns))
    sync_directory(target.parent)
