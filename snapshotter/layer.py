"""From upper to layer: passes over a tree that is about to be committed, or was. They run in worker processes."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from snapshotter.durable import start_writeback, sync
from snapshotter.errors import NO_SPACE, FailedPrecondition, quote
from snapshotter.failpoint import Sync
from snapshotter.linux import open_beneath
from snapshotter.model import Usage
from snapshotter.overlay.attributes import Names, by_name, list_attributes, remove_attribute, strip_dead
from snapshotter.overlay.features import NO_FEATURES, Feature
from snapshotter.usage import Tally
from snapshotter.walker import OPEN_DIRECTORY, Entry, open_file, walk

_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_BATCH = 256
_MOST_REPORTED = 10
"""Attributes of one layer, that the log names."""


class Stripped(NamedTuple):
    """An attribute that the tree cannot have and has not any more."""

    path: bytes
    """Below the top."""
    attribute: str


@dataclass(frozen=True, slots=True)
class Found:
    """What the pass over a tree found."""

    usage: Usage
    needs: Feature
    """What reading the tree takes."""
    has_dead_attributes: bool
    """Whether there are attributes that only the mount of the upper had a use for."""
    apparent_bytes: int
    largest_bytes: int
    mtimes_ns: dict[int, int]
    """Of every directory, by its inode."""
    is_all_synced: bool
    """Whether each inode was synced by itself, which those of symlinks, devices and fifos cannot be."""
    stripped: tuple[Stripped, ...] = ()
    """The first of what was taken off."""
    stripped_count: int = 0


def finish(tree: Path, names: Names, may_sync: bool = True, number: int = 0, count: int = 1) -> Found:
    """Makes durable what the layer brought, with `may_sync`, counts it, and finds out which overlay features reading it
    takes. Attributes of overlay's that the tree cannot have are stripped, durably, if `names` say so.

    Of a tree that nobody changes, `count` processes may each do the part of their `number` (`merged`), with less care.
    Raises FailedPrecondition for such attributes otherwise, and OSError.
    """
    tally = Tally()
    attributes: set[str] = set()
    customs = _Customs(names)
    is_all_synced = may_sync
    with Syncer(may_sync) as syncer:
        top = os.open(tree, OPEN_DIRECTORY)
        syncer.keep(top)
        mtimes_ns = {}
        if number == 0:
            status = os.fstat(top)
            tally.add(status)
            mtimes_ns[status.st_ino] = status.st_mtime_ns
            attributes.update(customs.passed(top, b"."))
        for entry in walk(top, number, count):
            tally.add(entry.status)
            if entry.is_directory:
                mtimes_ns[entry.status.st_ino] = entry.status.st_mtime_ns
            is_all_synced &= entry.is_file or entry.is_directory
            attributes.update(_examine(entry, syncer, customs, is_still=count > 1))
    needs = NO_FEATURES
    if names.metacopy in attributes:
        needs |= Feature.METACOPY
    if names.redirect in attributes:
        needs |= Feature.REDIRECT_DIR
    return Found(
        tally.usage(),
        needs,
        not names.dead.isdisjoint(attributes),
        tally.apparent_bytes,
        tally.largest_bytes,
        mtimes_ns,
        is_all_synced,
        tuple(customs.stripped),
        customs.stripped_count,
    )


def merged(parts: Sequence[Found]) -> Found:
    """What the parts found together."""
    needs = NO_FEATURES
    mtimes_ns: dict[int, int] = {}
    for part in parts:
        needs |= part.needs
        mtimes_ns |= part.mtimes_ns
    return Found(
        Usage(sum(part.usage.size_bytes for part in parts), sum(part.usage.inodes for part in parts)),
        needs,
        any(part.has_dead_attributes for part in parts),
        sum(part.apparent_bytes for part in parts),
        max(part.largest_bytes for part in parts),
        mtimes_ns,
        all(part.is_all_synced for part in parts),
        tuple(stripped for part in parts for stripped in part.stripped)[:_MOST_REPORTED],
        sum(part.stripped_count for part in parts),
    )


def strip(tree: Path, names: Names, may_sync: bool) -> Usage:
    """Removes the dead upper's attributes from every inode, with `may_sync` durably; what the tree then costs."""
    tally = Tally()
    top = os.open(tree, OPEN_DIRECTORY)
    try:
        with Syncer(may_sync) as syncer:
            if _strip(by_name(top, b"."), names):
                syncer.add(os.dup(top), "sync.stripped")
            tally.add(os.fstat(top))
            for entry in walk(top):
                status = entry.status
                if _strip(by_name(entry.directory_fd, entry.name), names):
                    # It may have had a block of its own for them.
                    status = os.stat(entry.name, dir_fd=entry.directory_fd, follow_symlinks=False)
                    if entry.is_file or entry.is_directory:
                        syncer.add(open_entry(entry), "sync.stripped")
                tally.add(status)
    finally:
        os.close(top)
    return tally.usage()


def _strip(path: bytes, names: Names) -> bool:
    try:
        return strip_dead(path, names)
    except OSError as error:
        # An immutable inode, or one whose other attributes would need a block of their own. What is left means nothing
        # to a mount that has the tree as a lower.
        if error.errno not in (errno.EPERM, errno.EACCES, *NO_SPACE):
            raise
        return False


class _Customs:
    """Lets no attribute into a layer that overlay would obey and that a layer made like this one cannot have."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self.stripped: list[Stripped] = []
        self.stripped_count = 0

    def passed(self, place: int | bytes, path: bytes) -> list[str]:
        """The names of the attributes that stay at a place, an open one or one that is not followed. `path`: below the
        top. Raises FailedPrecondition, OSError."""
        names = list_attributes(place)
        untrusted = [name for name in names if self._names.is_untrusted(name)]
        for name in untrusted:
            self._take(place, path, name)
        if untrusted and isinstance(place, int):
            # Whatever is configured: were it back after a power cut, the layer would obey it.
            sync(place, "sync.stripped")
        return [name for name in names if name not in untrusted] if untrusted else names

    def _take(self, place: int | bytes, path: bytes, name: str) -> None:
        what = f"{quote(os.fsdecode(path))} has the attribute {quote(name)}, which overlayfs would obey"
        if not self._names.foreign:
            raise FailedPrecondition(
                f"{what} and which no mount of this snapshot can have written; take it off in the snapshot's directory"
            )
        if not self._names.is_stripped:
            raise FailedPrecondition(
                f'{what} and which no image may bring; untrusted_attributes = "strip" would take it off'
            )
        try:
            remove_attribute(place, name)
        except PermissionError as error:
            raise FailedPrecondition(f"{what}; it cannot be taken off, since the inode is immutable") from error
        self.stripped_count += 1
        if len(self.stripped) < _MOST_REPORTED:
            self.stripped.append(Stripped(path, name))


def _examine(entry: Entry, syncer: Syncer, customs: _Customs, is_still: bool) -> list[str]:
    """The names of the entry's attributes, of which only those are left that it may have. `is_still`: what was a file
    when it was looked at is one now."""
    path = entry.directory + entry.name
    try:
        if not (entry.is_file or entry.is_directory):
            return customs.passed(by_name(entry.directory_fd, entry.name), path)
        if is_still and entry.is_file:
            fd = os.open(entry.name, _OPEN_FILE, dir_fd=entry.directory_fd)
        else:
            fd = open_entry(entry)
    except OSError as error:
        # Replaced or gone since it was looked at: not what this layer keeps.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            raise
        return []
    try:
        return customs.passed(fd, path)
    finally:
        syncer.add(fd, "sync.layer-directories" if entry.is_directory else "sync.layer-files")


def open_entry(entry: Entry) -> int:
    """A descriptor of a file or directory, only good for fsync and the like. Raises OSError, and FailedPrecondition for
    what is mounted in the tree: it hides what should be looked at."""
    try:
        if entry.is_directory:
            return open_beneath(entry.directory_fd, entry.name, OPEN_DIRECTORY)
        return open_file(entry.directory_fd, entry.name, os.O_RDONLY)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        path = quote(os.fsdecode(entry.directory + entry.name))
        raise FailedPrecondition(f"something is mounted at {path} in the snapshot's directory; unmount it") from error


class Syncer:
    """Starts the writeback of many files before it waits for each: half the time of fsync one by one."""

    def __init__(self, may_sync: bool) -> None:
        """Without `may_sync` it only closes what it is given."""
        self._may_sync = may_sync
        self._fds: list[tuple[int, Sync]] = []
        self._kept: list[int] = []

    def __enter__(self) -> Syncer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
                for fd in self._kept if self._may_sync else ():
                    sync(fd, "sync.layer-directories")
        finally:
            for fd in (*(fd for fd, _ in self._fds), *self._kept):
                os.close(fd)
            self._fds.clear()
            self._kept.clear()

    def keep(self, fd: int) -> None:
        """Takes over the descriptor of a directory, which stays open to the end."""
        self._kept.append(fd)

    def add(self, fd: int, name: Sync) -> None:
        """Takes over the descriptor of a file or a directory, which is open until others were added."""
        self._fds.append((fd, name))
        if len(self._fds) > _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._may_sync:
            for fd, name in self._fds:
                start_writeback(fd, name)
        while self._fds:
            if self._may_sync:
                sync(*self._fds[-1])
            os.close(self._fds.pop()[0])
