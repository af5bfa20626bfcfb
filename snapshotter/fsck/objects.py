"""One pass over a part of the object store: names, marks, and, if asked, contents. Runs in worker processes."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from snapshotter.content.files import File
from snapshotter.content.hashing import Hasher
from snapshotter.content.links import locator_of_file
from snapshotter.content.objects import SHARD_CHARS, is_unsynced
from snapshotter.content.stubs import DIGEST, is_stub_ref, locator_of_digest
from snapshotter.fsck.trees import Inode
from snapshotter.overlay.attributes import by_name
from snapshotter.walker import OPEN_DIRECTORY

_LINK_REF = re.compile(r"[0-9a-f]{2}[~A-Za-z0-9_-][A-Za-z0-9_-]{41}(\.[0-9a-f]+)?")
"""The name of a ref to an object that is a whole file (links.py)."""
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOATIME


@dataclass(slots=True)
class Stored:
    """What is in some directories of the store."""

    inodes: dict[str, tuple[int, Inode]] = field(default_factory=dict)
    """The inode of each object, by its ref."""
    strays: list[str] = field(default_factory=list)
    """What is no object, as paths below the store."""
    unmarked: dict[str, str] = field(default_factory=dict)
    """Objects that do not carry the hash that their name begins with, and what is wrong."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Objects whose content is not what the hash says, and what is wrong."""

    def add(self, other: Stored) -> None:
        self.inodes.update(other.inodes)
        self.strays.extend(other.strays)
        self.unmarked.update(other.unmarked)
        self.damaged.update(other.damaged)


def scan(store: Path, shards: Iterable[str], verify_content: bool, threads: int, from_disk: bool) -> Stored:
    """`threads`: for one big file. `from_disk`: contents are read there, and not in memory, where they may still be
    right. Raises OSError."""
    stored, hasher = Stored(), Hasher(threads)
    for shard in shards:
        try:
            fd = os.open(store / shard, OPEN_DIRECTORY)
        except FileNotFoundError:
            continue
        except NotADirectoryError:
            stored.strays.append(shard)
            continue
        try:
            for name in os.listdir(fd):
                with suppress(FileNotFoundError):  # collected meanwhile
                    _visit(fd, shard, name, stored, hasher if verify_content else None, from_disk)
        finally:
            os.close(fd)
    return stored


def digest_by_name(fd: int, ref: str, hasher: Hasher) -> tuple[bytes, bool]:
    """The hash of an open object, and whether its name says the same, which those of `is_unsynced` never do.
    Raises OSError."""
    status = os.fstat(fd)
    digest = hasher.hash(fd, status.st_size).digest
    if is_stub_ref(ref):
        return digest, is_named(ref, digest)
    attributes = {name: os.getxattr(fd, name) for name in os.listxattr(fd)}
    return digest, _ref_of(locator_of_file(File(fd, status, attributes, digest, ()))) == ref.partition(".")[0]


def is_named(ref: str, digest: bytes) -> bool:
    """Whether the name of a content's object is the one for the hash."""
    return _ref_of(locator_of_digest(digest)) == ref.partition(".")[0]


def may_be_marked(ref: str, mark: bytes) -> bool:
    """Whether the name of a content's object allows the hash that it carries."""
    if is_unsynced(ref):
        return locator_of_digest(mark).shard == ref[:SHARD_CHARS]
    return is_named(ref, mark)


def mark_of(path: bytes) -> bytes | None:
    """The hash that an object carries."""
    try:
        return os.getxattr(path, DIGEST, follow_symlinks=False)
    except OSError:
        return None


def _ref_of(locator: tuple[str, str]) -> str:
    return locator[0] + locator[1]


def _visit(shard_fd: int, shard: str, name: str, stored: Stored, hasher: Hasher | None, from_disk: bool) -> None:
    ref, status = shard + name, os.stat(name, dir_fd=shard_fd, follow_symlinks=False)
    is_stub = is_stub_ref(ref)
    if not stat.S_ISREG(status.st_mode) or not (is_stub or _LINK_REF.fullmatch(ref)):
        stored.strays.append(f"{shard}/{name}")
        return
    stored.inodes[ref] = status.st_ino, Inode(status.st_nlink, status.st_size, status.st_ctime_ns)
    mark = mark_of(by_name(shard_fd, name.encode())) if is_stub else None
    is_marked = mark is not None and len(mark) == 32 and may_be_marked(ref, mark)
    if is_stub and not is_marked:
        stored.unmarked[ref] = "it carries none" if mark is None else f"it carries {mark.hex()}"
    if hasher is not None:
        try:
            fd = os.open(name, _OPEN, dir_fd=shard_fd)
        except FileNotFoundError:
            raise
        except OSError as error:
            stored.damaged[ref] = f"it cannot be opened: {error.strerror}"
            return
        try:
            if from_disk:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if wrong := _verify(fd, ref, mark if is_marked else None, hasher):
                stored.damaged[ref] = wrong
        finally:
            os.close(fd)


def _verify(fd: int, ref: str, mark: bytes | None, hasher: Hasher) -> str:
    """What is wrong with the content of an open object; empty if nothing is."""
    try:
        digest, is_right = digest_by_name(fd, ref, hasher)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if is_unsynced(ref):
        is_right = True  # only a mark, which whole files have not, could tell
    return "" if is_right and mark in (None, digest) else f"its hash is {digest.hex()}"
