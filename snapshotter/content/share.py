"""One pass over a layer's tree that shares what can be shared. Runs in worker processes, each taking the inodes of
its own, so that all names of a hard link are one process's.

Nothing that goes wrong with a file fails the pass: the file stays as it is, and is counted by reason.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from snapshotter import failpoint
from snapshotter.content.files import File, HalfSwapped, Place, Private, Stage
from snapshotter.content.hashing import Hasher
from snapshotter.content.links import Links
from snapshotter.content.objects import Adopted, Objects, TooManyLinks, release_unused
from snapshotter.content.stubs import DIGEST, Stubs, is_stub_ref, ref_of, remove_mark
from snapshotter.durable import FULL, sync
from snapshotter.linux import open_beneath
from snapshotter.model import allocated_bytes
from snapshotter.overlay.attributes import TRUSTED, USER, by_name, list_attributes
from snapshotter.walker import OPEN_DIRECTORY, Name, walk_names

STUB = "stub"
HARDLINK = "hardlink"
OFF = "off"

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOATIME
_HOLES_BYTES = 4 << 30
"""What a process reads of holes in one layer: half a second or so."""
_WORDS = {
    errno.EPERM: "immutable or append-only",
    errno.ENOSPC: "no space",
    errno.EDQUOT: "no space",
    errno.EMLINK: "too many links",
}
_MAX_PATH_BYTES = 4000
"""Of directories with hard links, which are opened again by path. PATH_MAX is 4,096."""
_MAX_PARENTS = 500
"""Directories with names of one inode, all open at a time."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the administrator set (config.DedupConfig)."""

    strategy: str
    stub_min_bytes: int
    never_link: tuple[str, ...]
    reflink: bool
    durability: str = FULL
    """durable.FULL or the like. Files that were not synced become objects that only layers of the same `run` use."""
    run: str = ""
    """Of the daemon, when the layer was committed: a random word."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Directories of the layer, and others that matter."""

    tree: Path
    refs: Path
    stages: Path
    objects: Path
    below: tuple[Path, ...]
    """Directories of the layers below it, each with its fs/ and refs/."""
    is_resumed: bool
    """Whether part of the tree may have been shared, by a run that was killed."""
    in_order: bool
    """durable.keeps_order. Elsewhere nothing is synced by itself, but all at once at the end: a btrfs would take along
    that a file came or lost a name, and not what is in it or came in the place of the name."""


@dataclass(slots=True)
class Outcome:
    """What the pass did."""

    shared_inodes: int = 0
    shared_bytes: int = 0
    """Allocated bytes that are in objects now and were in the tree."""
    stub_bytes: int = 0
    """Allocated by stubs."""
    new_objects: int = 0
    private: Counter[str] = field(default_factory=Counter)
    """Files that were not shared, by reason."""
    many_names: dict[str, int] = field(default_factory=dict)
    """Of refs to objects that are files of the tree under several names: how many."""

    def add(self, other: Outcome) -> None:
        self.shared_inodes += other.shared_inodes
        self.shared_bytes += other.shared_bytes
        self.stub_bytes += other.stub_bytes
        self.new_objects += other.new_objects
        self.private.update(other.private)
        self.many_names.update(other.many_names)


def share(layout: Layout, rules: Rules, number: int, count: int) -> Outcome:
    """Shares the files of part `number` of `count`. Raises OSError when the tree cannot be read, or HalfSwapped."""
    with ExitStack() as stack:
        top_fd = os.open(layout.tree, OPEN_DIRECTORY)
        stack.callback(os.close, top_fd)
        refs_fd = os.open(layout.refs, OPEN_DIRECTORY)
        stack.callback(os.close, refs_fd)
        stage = Stage(layout.stages / str(number))
        stack.callback(stage.close)
        objects = Objects(layout.objects, rules.run if rules.durability != FULL else None)
        stack.callback(objects.close)
        strategy = _strategy(layout, rules, objects, refs_fd, stage)
        sharer = _Sharer(top_fd, refs_fd, objects, rules, strategy, Hasher(count))
        for name in walk_names(top_fd):
            if name.is_file and name.inode % count == number:
                sharer.visit(name)
        sharer.finish()
        if rules.durability == FULL and layout.in_order:
            sync(refs_fd, "sync.refs")
            objects.sync()
    return sharer.outcome


def clear_up(layout: Layout) -> None:
    """Takes off what a run that was killed has left and that the last one did not take up: marks of files that became
    no objects, links to objects that nothing of the layer uses. Raises OSError."""
    used: set[str] = set()
    paths_of: Counter[int] = Counter()
    marked: set[int] = set()
    with ExitStack() as stack:
        top_fd = os.open(layout.tree, OPEN_DIRECTORY)
        stack.callback(os.close, top_fd)
        refs_fd = os.open(layout.refs, OPEN_DIRECTORY)
        stack.callback(os.close, refs_fd)
        for name in walk_names(top_fd):
            if not name.is_file:
                continue
            paths_of[name.inode] += 1
            path = by_name(name.directory_fd, name.name)
            names = list_attributes(path)
            if DIGEST in names:
                marked.add(name.inode)
            elif ref := ref_of({key: os.getxattr(path, key) for key in names if key.startswith(TRUSTED.prefix)}):
                used.add(ref)
        with os.scandir(refs_fd) as entries:
            used.update(entry.name for entry in entries if not is_stub_ref(entry.name) and entry.inode() in paths_of)
        release_unused(layout.objects, refs_fd, used, paths_of)
        for name in walk_names(top_fd) if marked else ():
            if name.inode in marked:
                fd = os.open(name.name, _OPEN, dir_fd=name.directory_fd)
                try:
                    if os.fstat(fd).st_nlink == paths_of[name.inode]:
                        remove_mark(fd)
                finally:
                    os.close(fd)
        if layout.in_order:
            sync(refs_fd, "sync.refs")


def _strategy(layout: Layout, rules: Rules, objects: Objects, refs_fd: int, stage: Stage) -> Stubs | Links:
    if rules.strategy == STUB:
        tops = _names_in(directory / "fs" for directory in layout.below)
        return Stubs(objects, refs_fd, stage, tops, layout.is_resumed)
    used = _names_in(directory / "refs" for directory in layout.below)
    return Links(objects, refs_fd, stage, used, rules.never_link, rules.reflink)


def _names_in(directories: Iterable[Path]) -> frozenset[str]:
    found: set[str] = set()
    for directory in directories:
        try:
            found.update(os.listdir(directory))
        except FileNotFoundError:
            continue
    return frozenset(found)


class _Sharer:
    def __init__(
        self, top_fd: int, refs_fd: int, objects: Objects, rules: Rules, strategy: Stubs | Links, hasher: Hasher
    ) -> None:
        self._top_fd = top_fd
        self._refs_fd = refs_fd
        self._objects = objects
        self._min_bytes = rules.stub_min_bytes if rules.strategy == STUB else 1
        self._strategy = strategy
        self._hasher = hasher
        self._holes_left_bytes = _HOLES_BYTES
        self._linked: dict[int, list[bytes]] = {}
        """Paths of inodes with several names, as far as they were met."""
        self.outcome = Outcome()

    def visit(self, name: Name) -> None:
        try:
            fd = os.open(name.name, _OPEN, dir_fd=name.directory_fd)
        except OSError as error:
            self._count(_word(error))
            return
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return
            path = name.directory + name.name
            if status.st_nlink == 1:
                self._try(fd, status, (Place(name.directory_fd, name.name, path),))
            else:
                self._visit_linked(fd, status, path)
        finally:
            os.close(fd)

    def finish(self) -> None:
        """What has more links than names: from elsewhere, of a run of this that was killed, or an object that another
        worker has put in the place of a file by now."""
        refs = self._refs_by_inode() if isinstance(self._strategy, Links) else {}
        for inode, paths in self._linked.items():
            try:
                if inode in refs and self._objects.is_object(os.stat(refs[inode], dir_fd=self._refs_fd), refs[inode]):
                    continue
                fd = open_beneath(self._top_fd, paths[0], _OPEN)
            except OSError as error:
                self._count(_word(error))
                continue
            try:
                self._share_linked(fd, os.fstat(fd), paths)
            finally:
                os.close(fd)

    def _refs_by_inode(self) -> dict[int, str]:
        with os.scandir(self._refs_fd) as entries:
            return {entry.inode(): entry.name for entry in entries}

    def _visit_linked(self, fd: int, status: os.stat_result, path: bytes) -> None:
        paths = self._linked.setdefault(status.st_ino, [])
        paths.append(path)
        if len(paths) == status.st_nlink:
            del self._linked[status.st_ino]
            self._share_linked(fd, status, paths)

    def _share_linked(self, fd: int, status: os.stat_result, paths: list[bytes]) -> None:
        parents = {path.rpartition(b"/")[0] for path in paths}
        if len(parents) > _MAX_PARENTS or max(map(len, parents)) > _MAX_PATH_BYTES:
            self._count("hard links in too many or too deep directories")
            return
        with ExitStack() as stack:
            directories: dict[bytes, int] = {}
            try:
                for parent in parents:
                    directories[parent] = open_beneath(self._top_fd, parent or b".", OPEN_DIRECTORY)
                    stack.callback(os.close, directories[parent])
            except OSError as error:
                self._count(_word(error))
                return
            split = ((path, *path.rpartition(b"/")) for path in paths)
            places = (Place(directories[parent], name, path) for path, parent, _, name in split)
            self._try(fd, status, tuple(places))

    def _try(self, fd: int, status: os.stat_result, places: tuple[Place, ...]) -> None:
        if status.st_size < self._min_bytes:
            self._count("empty" if not status.st_size else "small")
            return
        holes_bytes = max(0, status.st_size - allocated_bytes(status))
        if holes_bytes > self._holes_left_bytes:
            self._count("too many holes")  # which take no space, and could take for ever to read
            return
        self._holes_left_bytes -= holes_bytes
        try:
            file = self._read(fd, status, places)
            if file is None:
                return
            if status.st_nlink > len(places) + self._own_links(file):
                raise Private("linked from outside the layer")
            adopted = self._strategy.share(file)
        except HalfSwapped:
            raise
        except Private as reason:
            self._count(str(reason))
        except TooManyLinks:
            self._count("too many links")
        except OSError as error:
            self._count(_word(error))
        else:
            self._count_shared(status, adopted, places, file)
            failpoint.hit("share.swapped")

    def _read(self, fd: int, status: os.stat_result, places: tuple[Place, ...]) -> File | None:
        """None for what is no content of its own. Raises Private, OSError."""
        names = os.listxattr(fd)
        attributes = {name: os.getxattr(fd, name) for name in names} if names else {}
        if any(map(_is_overlays, names)):
            return None
        _check_closed(fd)
        hashed = self._hasher.hash(fd, status.st_size)
        after = os.fstat(fd)
        if hashed.size_bytes != status.st_size or _version(after) != _version(status):
            raise Private("changed while it was read")
        return File(fd, status, attributes, hashed.digest, places)

    def _own_links(self, file: File) -> int:
        if file.status.st_nlink == len(file.places):
            return 0
        return self._objects.links_of(self._strategy.locate(file), file.fd, self._refs_fd)

    def _count(self, reason: str) -> None:
        self.outcome.private[reason] += 1

    def _count_shared(self, status: os.stat_result, adopted: Adopted, places: tuple[Place, ...], file: File) -> None:
        outcome = self.outcome
        outcome.shared_inodes += 1
        outcome.shared_bytes += allocated_bytes(status)
        outcome.new_objects += adopted.is_new
        if isinstance(self._strategy, Links):
            if len(places) > 1:
                outcome.many_names[adopted.ref] = len(places)
        elif file.attributes:
            place = places[0]
            made = os.stat(place.name, dir_fd=place.directory_fd, follow_symlinks=False)
            outcome.stub_bytes += allocated_bytes(made)


def _check_closed(fd: int) -> None:
    """A further check: the kernel grants a read lease on a file that nobody has open for writing (fcntl(2))."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise Private("open for writing") from error
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES):
            raise


def _is_overlays(name: str) -> bool:
    """What overlay obeys: escaped names are the data of a nested overlay."""
    return any(
        name.startswith(names.prefix) and not name.startswith(names.prefix + "overlay.") for names in (TRUSTED, USER)
    )


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _word(error: OSError) -> str:
    return _WORDS.get(error.errno or 0) or errno.errorcode.get(error.errno or 0, "unknown error")
