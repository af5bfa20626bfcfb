"""Making an object anew out of an equal content that is somewhere else.

Where that may be is a source's affair: it names candidates, and each is believed only if its hash is the object's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from snapshotter.content.files import File
from snapshotter.content.hashing import Hasher
from snapshotter.content.links import locator_of_file
from snapshotter.content.objects import SHARD_CHARS, is_unsynced, place_of
from snapshotter.content.stubs import DIGEST, is_stub_ref
from snapshotter.fsck.objects import is_named, mark_of
from snapshotter.meta.schema import Record
from snapshotter.root import Root
from snapshotter.walker import OPEN_DIRECTORY, walk

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CHUNK_BYTES = 1 << 20


class Lost(NamedTuple):
    """An object that is to be made anew."""

    ref: str
    size_bytes: int | None
    """None where nobody knows."""

    def path(self, root: Root) -> Path:
        return root.objects / place_of(self.ref)


class Source:
    """Where contents may be found: the root itself, or the archives of images."""

    def expect(self, users: Mapping[Lost, Sequence[Record]]) -> None:
        """What may be asked for next, and by which layers it is used: some find many at once."""

    def candidates(self, lost: Lost) -> Iterator[Path]:
        """Files that may hold the object's content, likeliest first. Raises OSError."""
        raise NotImplementedError

    def why_not(self, lost: Lost) -> str | None:
        """After `candidates`, for a person: why there were none; None if there is nothing to say."""


class NoSource(OSError):
    """No source has the content."""


class OwnFiles(Source):
    """The files of the root: instances of the object, and files of layers that are as long."""

    def __init__(self, root: Root) -> None:
        self._root = root

    def candidates(self, lost: Lost) -> Iterator[Path]:
        place, stem = lost.path(self._root), lost.ref[SHARD_CHARS:].partition(".")[0]
        try:
            names = sorted(os.listdir(place.parent))
        except FileNotFoundError:
            names = []
        yield from (place.parent / name for name in names if name.partition(".")[0] == stem and name != place.name)
        for directory in sorted(self._root.snapshots.iterdir()):
            if (directory / "refs" / lost.ref).exists():
                yield directory / "refs" / lost.ref
        for top in (*(directory / "fs" for directory in sorted(self._root.snapshots.iterdir())), self._root.objects):
            yield from _files_of_size(top, lost.size_bytes)


def _files_of_size(top: Path, size_bytes: int | None) -> Iterator[Path]:
    try:
        fd = os.open(top, OPEN_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        for entry in walk(fd):
            if entry.is_file and size_bytes in (None, entry.status.st_size) and entry.status.st_blocks:
                yield Path(os.readlink(f"/proc/self/fd/{entry.directory_fd}"), os.fsdecode(entry.name))
    finally:
        os.close(fd)


@contextmanager
def made_anew(root: Root, lost: Lost, sources: Sequence[Source]) -> Iterator[Path]:
    """A durable new file that is the object, for the block to link to where it belongs. Raises NoSource, OSError."""
    place = root.spool / f"fsck.{lost.ref}"
    place.unlink(missing_ok=True)
    try:
        if not any(_try(candidate, place, lost, root) for source in sources for candidate in source.candidates(lost)):
            reasons = filter(None, (source.why_not(lost) for source in sources))
            raise NoSource("; ".join([f"no file with the content of object {lost.ref} was found", *reasons]))
        yield place
    finally:
        place.unlink(missing_ok=True)


def _try(candidate: Path, place: Path, lost: Lost, root: Root) -> bool:
    """Whether the candidate had the content; then the object is at `place`."""
    try:
        source = os.open(candidate, _OPEN)
    except OSError:
        return False
    try:
        status = os.fstat(source)
        if not stat.S_ISREG(status.st_mode):
            return False
        try:
            digest = Hasher(1).hash(source, status.st_size).digest
        except OSError:
            return False
        template = _template(source, digest, lost, root)
        if template is None:
            return False
        os.lseek(source, 0, os.SEEK_SET)
        _write(source, place, template)
    finally:
        os.close(source)
    with open(place, "rb") as made:  # what was read twice may differ
        if Hasher(1).hash(made.fileno(), status.st_size).digest == digest:
            return True
    place.unlink()
    return False


def _template(source: int, digest: bytes, lost: Lost, root: Root) -> File | None:
    """The metadata that the object gets, if the content is the one."""
    if is_stub_ref(lost.ref):
        # Of an object that nobody had synced only its mark says what was in it (content.objects).
        mark = mark_of(os.fsencode(lost.path(root)))
        is_it = mark == digest if is_unsynced(lost.ref) else is_named(lost.ref, digest)
        return _file(source, digest)._replace(attributes={DIGEST: digest}) if is_it else None
    damaged: list[int] = []
    with suppress(OSError):
        damaged.append(os.open(lost.path(root), _OPEN))
    try:
        for fd in (*damaged, source):
            file = _file(fd, digest)
            if "".join(locator_of_file(file)) == lost.ref.partition(".")[0]:
                return file
    finally:
        for fd in damaged:
            os.close(fd)
    return None


def _file(fd: int, digest: bytes) -> File:
    attributes = {name: os.getxattr(fd, name) for name in os.listxattr(fd)}
    return File(fd, os.fstat(fd), attributes, digest, ())


def _write(source: int, place: Path, template: File) -> None:
    """Owner before mode and attributes, since chown takes some of both away; times last."""
    status = template.status
    target = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        copy_data(source, target)
        os.fchown(target, status.st_uid, status.st_gid)
        os.fchmod(target, stat.S_IMODE(status.st_mode))
        for key, value in template.attributes.items():
            os.setxattr(target, key, value)
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
        os.fsync(target)
    finally:
        os.close(target)


def duplicate(source_path: Path, place: Path, without: frozenset[str]) -> None:
    """Makes a durable new inode with the content and the metadata of a file, but some attributes. Raises OSError."""
    source = os.open(source_path, _OPEN)
    try:
        file = _file(source, b"")
        kept = {key: value for key, value in file.attributes.items() if key not in without}
        _write(source, place, file._replace(attributes=kept))
    finally:
        os.close(source)


def copy_data(source: int, target: int) -> None:
    """All of the file, holes as holes where they are long."""
    at = 0
    while chunk := os.pread(source, _CHUNK_BYTES, at):
        if chunk.count(0) != len(chunk):
            view = memoryview(chunk)
            while view:
                written = os.pwrite(target, view, at + len(chunk) - len(view))
                view = view[written:]
        at += len(chunk)
    os.ftruncate(target, at)
