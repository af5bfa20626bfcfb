"""The object store.

    objects/xx/NAME            an object: one inode, whose links are this name, one in refs/ of each layer that
                               uses it, and the paths in layers that are the object itself (links.py)
    snapshots/<id>/refs/xxNAME what the layer `id` uses

The link count is the reference count: removing a layer removes its links, and an object with no other
link than its name is garbage. NAME is a locator made of a hash, and if that name belongs to something else, or
its inode takes no more links, "." and the number of an instance behind it.

Of an object that was made of a file whose content nobody had synced, NAME begins with "~", and the hash in it is also
one of the run of the daemon in which it was made. So only layers of the same run find it: a power cut may have taken
its content, and it must never stand for a file that a layer has durably.

Whoever makes, uses or collects an object holds the lock (flock) of its shard, the directory xx. A kill
frees it, and leaves nothing but a link in refs/, which goes when the layer does, or is found when the layer is
sealed again.

    order when an object is made     refs/ link, then the name in the store
    order when it is collected       the name in the store, then the refs/ link
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from snapshotter import failpoint
from snapshotter.durable import sync
from snapshotter.model import NO_EXTENT, Extent
from snapshotter.root import SHARDS_OF_OBJECTS
from snapshotter.walker import OPEN_DIRECTORY

SHARD_CHARS = 2
_MAX_INSTANCES = 256
_INSTANCES_AFTER_A_KILL = 8
_UNSYNCED = "~"


def place_of(ref: str) -> str:
    """Where the object that a ref names is, below the store."""
    return f"{ref[:SHARD_CHARS]}/{ref[SHARD_CHARS:]}"


def is_unsynced(ref: str) -> bool:
    """Whether the name of an object says that nobody had synced its content."""
    return ref.startswith(_UNSYNCED, SHARD_CHARS)


class TooManyLinks(Exception):
    """No instance of the object takes another link."""


class Locator(NamedTuple):
    """Where the first instance of an object is."""

    shard: str
    stem: str

    def instance(self, number: int) -> str:
        return f"{self.stem}.{number:x}" if number else self.stem

    def unsynced(self, run: str) -> Locator:
        """Where such an object of this run is."""
        digest = blake3(f"{run} {self.stem}".encode()).hexdigest()
        return Locator(self.shard, _UNSYNCED + digest[: len(self.stem) - len(_UNSYNCED)])


class Adopted(NamedTuple):
    """An object that the layer now refers to."""

    shard: str
    name: str
    instance: int
    is_new: bool = False
    """The file itself became the object, now or in a run that was killed."""
    made_ref: bool = False
    """The layer did not refer to it before."""

    @property
    def ref(self) -> str:
        return self.shard + self.name


class Wanted(NamedTuple):
    """Which object a file could be replaced by."""

    locator: Locator
    verify: Callable[[int, str], bool]
    """Whether the object at a directory and name is it: a locator says only where to look."""
    prepare: Callable[[int], None]
    """Done to the file, by descriptor, before it becomes the object."""
    may_repeat: bool
    """Whether the layer may use one object for several files."""
    spared: frozenset[str] = frozenset()
    """Refs of instances that it must not use."""


class Objects:
    """The store as one process sees it. `close` it."""

    def __init__(self, directory: Path, unsynced_run: str | None = None) -> None:
        """`unsynced_run`: the files that may become objects were not synced, and this is the run of the daemon."""
        self._directory = directory
        self._unsynced_run = unsynced_run
        self._shards: dict[str, int] = {}
        self._changed: set[str] = set()

    def close(self) -> None:
        for fd in self._shards.values():
            os.close(fd)
        self._shards.clear()

    def sync(self) -> None:
        """Makes durable which objects there are. Raises OSError."""
        for shard in sorted(self._changed):
            sync(self._shards[shard], "sync.objects")
        self._changed.clear()

    @contextmanager
    def locked(self, shard: str) -> Iterator[int]:
        """The shard's directory, with its lock. Hold one at a time."""
        fd = self.shard_fd(shard)
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            yield fd
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)

    def shard_fd(self, shard: str) -> int:
        fd = self._shards.get(shard)
        if fd is None:
            fd = self._shards[shard] = os.open(self._directory / shard, OPEN_DIRECTORY)
        return fd

    def adopt(self, wanted: Wanted, file_fd: int, refs_fd: int) -> Adopted:
        """Refers to an object that is as wanted, or makes the file one.

        Call it with the shard's lock, and keep that until the tree has been changed or `forget` called: others who work
        on the layer may use what this refers to. Raises TooManyLinks, OSError.
        """
        *others, own = self._places(wanted.locator)
        for place in others:
            if found := self._adopt_at(place, wanted, file_fd, refs_fd, may_make=False):
                return found
        if found := self._adopt_at(own, wanted, file_fd, refs_fd, may_make=True):
            return found
        raise TooManyLinks(wanted.locator.stem)

    def forget(self, adopted: Adopted, refs_fd: int, names: int) -> None:
        """Undoes `adopt` for a file with so many names, if nothing came of it, under the same lock. Raises OSError."""
        if not adopted.made_ref:
            return
        status = os.stat(adopted.ref, dir_fd=refs_fd, follow_symlinks=False)
        if adopted.is_new and status.st_nlink == names + 2:
            os.unlink(adopted.name, dir_fd=self.shard_fd(adopted.shard))
        os.unlink(adopted.ref, dir_fd=refs_fd)

    def links_of(self, locator: Locator, fd: int, refs_fd: int) -> int:
        """How many links of the file are in the store and in refs/: not 0 after a kill."""
        status, shard_fd = os.fstat(fd), self.shard_fd(locator.shard)
        numbers = range(_INSTANCES_AFTER_A_KILL)
        names = [place.instance(number) for place in self._places(locator) for number in numbers]
        return sum(_is_same(status, shard_fd, name) + _is_same(status, refs_fd, locator.shard + name) for name in names)

    def is_object(self, status: os.stat_result, ref: str) -> bool:
        """Whether a file is the object that a ref names."""
        return _is_same(status, self.shard_fd(ref[:SHARD_CHARS]), ref[SHARD_CHARS:])

    def _places(self, locator: Locator) -> tuple[Locator, ...]:
        """Where to look for an object; it is made at the last one."""
        return (locator,) if self._unsynced_run is None else (locator, locator.unsynced(self._unsynced_run))

    def _adopt_at(self, place: Locator, wanted: Wanted, file_fd: int, refs_fd: int, may_make: bool) -> Adopted | None:
        """None if no instance will do."""
        shard_fd = self.shard_fd(place.shard)
        for number in range(_MAX_INSTANCES):
            found = Adopted(place.shard, place.instance(number), number)
            if found.ref in wanted.spared:
                continue
            try:
                referred = self._refer(shard_fd, found, file_fd, refs_fd, wanted)
            except FileNotFoundError:
                if not may_make:
                    return None
                wanted.prepare(file_fd)
                self._make(shard_fd, found, file_fd, refs_fd)
                return found._replace(is_new=True, made_ref=True)
            except OSError as error:
                if error.errno != errno.EMLINK:
                    raise
                continue
            if referred:
                return referred
        return None

    def _refer(self, shard_fd: int, found: Adopted, file_fd: int, refs_fd: int, wanted: Wanted) -> Adopted | None:
        """None if this instance will not do. Raises FileNotFoundError if there is none, and OSError."""
        try:
            os.link(found.name, found.ref, src_dir_fd=shard_fd, dst_dir_fd=refs_fd)
        except FileExistsError:
            if _is_same(os.stat(found.ref, dir_fd=refs_fd, follow_symlinks=False), shard_fd, found.name):
                if wanted.may_repeat:
                    return found if wanted.verify(refs_fd, found.ref) else None
                return found._replace(is_new=True) if _is_same(os.fstat(file_fd), shard_fd, found.name) else None
            # A kill left it, before the object had a name, which somebody else's has now.
            os.unlink(found.ref, dir_fd=refs_fd)
            os.link(found.name, found.ref, src_dir_fd=shard_fd, dst_dir_fd=refs_fd)
        try:
            failpoint.hit("share.referred")
            will_do = wanted.verify(refs_fd, found.ref)
        except BaseException:
            os.unlink(found.ref, dir_fd=refs_fd)
            raise
        if will_do:
            return found._replace(made_ref=True)
        os.unlink(found.ref, dir_fd=refs_fd)
        return None

    def _make(self, shard_fd: int, made: Adopted, file_fd: int, refs_fd: int) -> None:
        source = f"/proc/self/fd/{file_fd}"
        try:
            os.link(source, made.ref, dst_dir_fd=refs_fd)
        except FileExistsError:  # a kill left it, before the object had a name
            os.unlink(made.ref, dir_fd=refs_fd)
            os.link(source, made.ref, dst_dir_fd=refs_fd)
        try:
            failpoint.hit("share.linked")
            os.link(made.ref, made.name, src_dir_fd=refs_fd, dst_dir_fd=shard_fd)
            self._changed.add(made.shard)
            try:
                failpoint.hit("share.made-object")
            except BaseException:
                os.unlink(made.name, dir_fd=shard_fd)
                raise
        except BaseException:
            os.unlink(made.ref, dir_fd=refs_fd)
            raise


def release_all(directory: Path, refs: Path) -> Extent:
    """Lets go of all that a layer's refs/ refers to, and of the objects that nobody else uses. Where layers hold
    objects themselves, remove the layer's tree first. Can be repeated. Raises OSError."""
    objects, freed = Objects(directory), NO_EXTENT
    try:
        refs_fd = os.open(refs, OPEN_DIRECTORY)
    except FileNotFoundError:
        return freed
    try:
        for ref in os.listdir(refs_fd):
            with objects.locked(ref[:SHARD_CHARS]) as shard_fd:
                freed += _release(shard_fd, refs_fd, ref, paths=0)
            failpoint.hit("collect.ref")
    finally:
        os.close(refs_fd)
        objects.close()
    return freed


def collect_unused(directory: Path) -> Extent:
    """Takes every object that no layer refers to: nothing is left of those by a kill, but perhaps by a crash of the
    host. Reads the whole store. Raises OSError."""
    objects, freed = Objects(directory), NO_EXTENT
    try:
        for shard in sorted(SHARDS_OF_OBJECTS):
            with objects.locked(shard) as shard_fd:
                for name in os.listdir(shard_fd):
                    status = os.stat(name, dir_fd=shard_fd, follow_symlinks=False)
                    if status.st_nlink == 1:
                        os.unlink(name, dir_fd=shard_fd)
                        freed += Extent.of(status)
    finally:
        objects.close()
    return freed


def release_unused(directory: Path, refs_fd: int, used: Collection[str], paths_of: Mapping[int, int]) -> None:
    """Lets go of what a layer refers to without using it, as a kill leaves it. Raises OSError.

    `paths_of`: how many paths an inode has in the layer's tree.
    """
    objects = Objects(directory)
    try:
        for ref in set(os.listdir(refs_fd)).difference(used):
            inode = os.stat(ref, dir_fd=refs_fd, follow_symlinks=False).st_ino
            with objects.locked(ref[:SHARD_CHARS]) as shard_fd:
                _release(shard_fd, refs_fd, ref, paths_of.get(inode, 0))
    finally:
        objects.close()


def _release(shard_fd: int, refs_fd: int, ref: str, paths: int) -> Extent:
    """Under the shard's lock. The ref goes last: as long as it is there, a repetition finds the object."""
    freed = NO_EXTENT
    name, status = ref[SHARD_CHARS:], os.stat(ref, dir_fd=refs_fd, follow_symlinks=False)
    if status.st_nlink == 2 + paths and _is_same(status, shard_fd, name):
        os.unlink(name, dir_fd=shard_fd)
        freed = Extent.of(status)
    failpoint.hit("collect.object")
    os.unlink(ref, dir_fd=refs_fd)
    return freed


def _is_same(status: os.stat_result, directory_fd: int, name: str) -> bool:
    try:
        return os.path.samestat(status, os.stat(name, dir_fd=directory_fd, follow_symlinks=False))
    except FileNotFoundError:
        return False
