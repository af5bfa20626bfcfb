"""From upper to layer: passes over a tree that is about to be committed, or was. They run in worker processes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from snapshotter.durable import sync
from snapshotter.errors import FailedPrecondition, quote
from snapshotter.failpoint import Sync
from snapshotter.linux import sync_file_range_start
from snapshotter.model import Usage
from snapshotter.overlay.attributes import Names, by_name, strip_dead
from snapshotter.overlay.features import NO_FEATURES, Feature
from snapshotter.usage import Tally
from snapshotter.walker import OPEN_DIRECTORY, Entry, walk

_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_BATCH = 256


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


def finish(tree: Path, names: Names, may_sync: bool = True, number: int = 0, count: int = 1) -> Found:
    """Makes durable what the layer brought, with `may_sync`, counts it, and finds out which overlay features reading it
    takes.

    Of a tree that nobody changes, `count` processes may each do the part of their `number` (`merged`). Raises
    FailedPrecondition for an attribute of overlay's that it cannot have, and OSError.
    """
    tally = Tally()
    attributes: set[str] = set()
    is_all_synced = may_sync
    with Syncer(may_sync) as syncer:
        top = os.open(tree, OPEN_DIRECTORY)
        syncer.keep(top)
        mtimes_ns = {}
        if number == 0:
            status = os.fstat(top)
            tally.add(status)
            mtimes_ns[status.st_ino] = status.st_mtime_ns
            attributes.update(os.listxattr(top))
            _check_known(attributes, names, top, b".")
        for entry in walk(top, number, count):
            tally.add(entry.status)
            if entry.is_directory:
                mtimes_ns[entry.status.st_ino] = entry.status.st_mtime_ns
            is_all_synced &= entry.is_file or entry.is_directory
            found = _examine(entry, syncer)
            _check_known(found, names, entry.directory_fd, entry.name)
            attributes.update(found)
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
    except PermissionError:
        # An immutable inode. The attributes mean nothing to a mount that has the tree as a lower.
        return False


def _check_known(attributes: Iterable[str], names: Names, directory_fd: int, name: bytes) -> None:
    for attribute in attributes:
        if names.is_unknown(attribute):
            path = os.path.join(os.readlink(f"/proc/self/fd/{directory_fd}"), os.fsdecode(name))
            raise FailedPrecondition(
                f"{quote(path)} has the attribute {attribute}, which overlayfs would obey and which a layer made like "
                "this one cannot have"
            )


def _examine(entry: Entry, syncer: Syncer) -> list[str]:
    """The names of the entry's attributes."""
    try:
        if not (entry.is_file or entry.is_directory):
            return os.listxattr(by_name(entry.directory_fd, entry.name), follow_symlinks=False)
        fd = open_entry(entry)
    except OSError as error:
        # Replaced or gone since it was looked at: not what this layer keeps.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            raise
        return []
    names = os.listxattr(fd)
    syncer.add(fd, "sync.layer-directories" if entry.is_directory else "sync.layer-files")
    return names


def open_entry(entry: Entry) -> int:
    """A descriptor of a file or directory, only good for fsync and the like. Raises OSError."""
    flags = OPEN_DIRECTORY if entry.is_directory else _OPEN_FILE
    return os.open(entry.name, flags, dir_fd=entry.directory_fd)


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
            for fd, _ in self._fds:
                sync_file_range_start(fd)
        while self._fds:
            if self._may_sync:
                sync(*self._fds[-1])
            os.close(self._fds.pop()[0])
