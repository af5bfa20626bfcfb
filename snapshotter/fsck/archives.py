"""Contents out of the archive of a layer: a tar, as it is, or compressed by gzip or zstd. Runs in worker processes.

A content is found by its hash, whatever its name: nothing is extracted by name, and whiteouts, hard links and what a
later entry replaces need no thought. An archive is read once to find out what it has, without writing anything, and
again to take that out. What is found in a damaged archive is as good as any, since its own hash is right.

An archive is an image's: it may be made to harm. It can cost time; not memory, and not disk.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import resource
import shutil
import stat
import sys
import tarfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from blake3 import blake3

from snapshotter.content.links import locator_of
from snapshotter.content.objects import is_unsynced, place_of
from snapshotter.content.stubs import is_stub_ref, locator_of_digest
from snapshotter.fsck.objects import mark_of

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_CHUNK_BYTES = 1 << 20
_MAX_MEMORY_BYTES = 1 << 30
"""Of the process: names, attributes and maps of holes may be of any length."""
_HOLES_BYTES = 4 << 30
"""What is read of holes in one archive: they take no space there, and could take for ever to read."""
_GZIP = b"\x1f\x8b\x08"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPED = b"\x2a\x4d\x18"
"""Behind a byte that begins with 5: a frame that is no data (RFC 8878, 3.1.2), as zstd:chunked has."""
_XATTR = "SCHILY.xattr."
_UNSUPPORTED = (errno.ENOTSUP, errno.EPERM)
_NO_ARCHIVE = (
    tarfile.TarError, zlib.error, zstd.ZstdError, EOFError, ValueError, LookupError, OverflowError, RecursionError,
    MemoryError,
)  # fmt: skip
"""What the readers raise for archives that are none."""


class Searched(NamedTuple):
    """What came of an archive."""

    refs: frozenset[str]
    """Of the objects whose contents were found."""
    trouble: str = ""
    """Why there may be more in it than was found: it cannot be read, or is not what its digest says."""


class _Unreadable(Exception):
    """The archive ends here."""


class _Metadata(NamedTuple):
    """Of a file, as far as an object that is a whole file is found by it."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    attributes: dict[str, bytes]

    def stem(self, digest: bytes, size_bytes: int) -> str:
        return "".join(locator_of(digest, (*self[:4], size_bytes), self.attributes))


class _Wanted:
    """Which objects a content may be for."""

    def __init__(self, refs: Collection[str], objects: Path) -> None:
        self._refs: dict[str, list[str]] = {}
        """By the part of it that is made of hashes: there may be several instances. Or by the hash that the object
        carries, where its name does not say it."""
        self._as_stored: dict[int, list[_Metadata]] = {}
        """Of objects that are whole files and damaged, by their size: an archive need not have these metadata, where
        attributes were taken off the layer."""
        self._any_links = not all(map(is_stub_ref, refs))
        for ref in refs:
            place = objects / place_of(ref)
            key = (mark_of(os.fsencode(place)) or b"").hex() if is_unsynced(ref) else ref.partition(".")[0]
            self._refs.setdefault(key, []).append(ref)
            if not is_stub_ref(ref):
                size_bytes, metadata = _of_stored(place)
                self._as_stored.setdefault(size_bytes, []).append(metadata)

    def refs_of(self, member: tarfile.TarInfo, digest: bytes, size_bytes: int) -> list[str]:
        keys = {"".join(locator_of_digest(digest)), digest.hex()}
        if self._any_links:
            metadata = [_of_member(member), *self._as_stored.get(size_bytes, ())]
            keys.update(each.stem(digest, size_bytes) for each in metadata)
        return [ref for key in keys for ref in self._refs.get(key, ())]


def search(archive: Path, digest: str, refs: frozenset[str], objects: Path, place: Path) -> Searched:
    """Looks for the contents of objects; what is found is a file `place`/<ref>, with the metadata that the archive has.

    `objects`: the store, with what is left of them. `place`: an empty directory, or what a kill left of this call.
    Raises OSError when a content cannot be written.
    """
    wanted, numbers, seen = _Wanted(refs, objects), dict[int, list[str]](), set[str]()
    algorithm, _, name = digest.partition(":")
    state, trouble = hashlib.new(algorithm), ""
    with _little_memory():
        try:
            with _reading(), archive.open("rb", buffering=0) as raw:
                stream = io.BufferedReader(_Hashed(raw, state), _CHUNK_BYTES)
                try:
                    for number, member, content in _files(stream):
                        hashed, size_bytes = _hash(content)
                        found = [ref for ref in wanted.refs_of(member, hashed, size_bytes) if ref not in seen]
                        if found:
                            numbers[number] = found
                            seen.update(found)
                finally:
                    while stream.read(_CHUNK_BYTES):  # what is behind the tar
                        pass
        except _Unreadable as error:
            trouble = f"cannot be read ({error})"
        if state.hexdigest() != name:
            trouble = "is damaged"
        _take_out(archive, numbers, place)
    return Searched(frozenset(seen), trouble)


def _take_out(archive: Path, numbers: Mapping[int, Sequence[str]], place: Path) -> None:
    """Writes the contents of some members. Raises OSError, also when the archive is another one now."""
    if not numbers:
        return
    last = max(numbers)
    try:
        with archive.open("rb") as raw:
            for number, member, content in _files(raw):
                if number in numbers:
                    _write(content, member, [place / ref for ref in numbers[number]])
                if number == last:
                    return
    except _NO_ARCHIVE as error:
        raise OSError(errno.EIO, "it does not read as it did before") from error


@contextmanager
def _little_memory() -> Iterator[None]:
    """Getting more is a MemoryError for the block."""
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _MAX_MEMORY_BYTES if most == resource.RLIM_INFINITY else min(_MAX_MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except (*_NO_ARCHIVE, OSError) as error:
        raise _Unreadable(" ".join(str(error).split()) or type(error).__name__) from error


def _files(stream: io.BufferedReader[Any]) -> Iterator[tuple[int, tarfile.TarInfo, IO[bytes]]]:
    """The regular files of an archive, each with a number that is its own. Raises OSError and _NO_ARCHIVE."""
    with tarfile.open(
        fileobj=_decompressed(stream), mode="r|", bufsize=_CHUNK_BYTES, errors="surrogateescape"
    ) as archive:
        number, holes_left_bytes = 0, _HOLES_BYTES
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            holes_bytes = _holes_bytes(member)
            content = archive.extractfile(member) if member.isreg() and holes_bytes <= holes_left_bytes else None
            if content is not None:
                holes_left_bytes -= holes_bytes
                yield number, member, content
            number += 1


def _holes_bytes(member: tarfile.TarInfo) -> int:
    """Of a sparse file."""
    parts: list[tuple[int, int]] | None = member.sparse  # type: ignore[assignment]
    return member.size - sum(size for _, size in parts) if parts is not None else 0


def _decompressed(stream: io.BufferedReader[Any]) -> IO[bytes]:
    """By what it begins with, as containerd does (pkg/archive/compression)."""
    magic = stream.peek(4)[:4]
    if magic.startswith(_GZIP):
        return gzip.GzipFile(fileobj=stream)  # type: ignore[return-value]
    if magic == _ZSTD or (magic[1:] == _ZSTD_SKIPPED and magic[0] >> 4 == 5):
        return zstd.ZstdFile(stream)  # type: ignore[return-value]
    return stream


class _Hashed(io.RawIOBase):
    """Hashes what is read through it."""

    def __init__(self, raw: io.RawIOBase | io.FileIO, state: hashlib._Hash) -> None:
        self._raw = raw
        self._state = state

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = self._raw.readinto(buffer) or 0
        self._state.update(memoryview(buffer)[:count])
        return count


def _hash(content: IO[bytes]) -> tuple[bytes, int]:
    state, total = blake3(), 0
    while chunk := content.read(_CHUNK_BYTES):
        state.update(chunk)
        total += len(chunk)
    return state.digest(), total


def _write(content: IO[bytes], member: tarfile.TarInfo, places: Sequence[Path]) -> None:
    """Owner before mode and attributes, since chown takes some of both away; time last."""
    for place in places:
        place.unlink(missing_ok=True)
    metadata = _of_member(member)
    with places[0].open("xb") as target:
        shutil.copyfileobj(content, target, _CHUNK_BYTES)
        target.flush()
        fd = target.fileno()
        os.fchown(fd, metadata.uid, metadata.gid)
        os.fchmod(fd, metadata.mode)
        for key, value in metadata.attributes.items():
            try:
                os.setxattr(fd, key, value)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        os.utime(fd, ns=(metadata.mtime_ns, metadata.mtime_ns))
    for place in places[1:]:
        os.link(places[0], place)


def _of_stored(path: Path) -> tuple[int, _Metadata]:
    """The size of a file of the store, too. Raises OSError."""
    status = path.lstat()
    names = os.listxattr(path, follow_symlinks=False)
    attributes = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
    mode = stat.S_IMODE(status.st_mode)
    return status.st_size, _Metadata(mode, status.st_uid, status.st_gid, status.st_mtime_ns, attributes)


def _of_member(member: tarfile.TarInfo) -> _Metadata:
    """As containerd sets them (pkg/archive/tar.go)."""
    headers = member.pax_headers
    attributes = {
        key.removeprefix(_XATTR): value.encode("utf-8", "surrogateescape")
        for key, value in headers.items()
        if key.startswith(_XATTR)
    }
    mtime_ns = _time_ns(headers.get("mtime", str(int(member.mtime))))
    return _Metadata(stat.S_IMODE(member.mode), member.uid, member.gid, mtime_ns, attributes)


def _time_ns(text: str) -> int:
    """Of seconds with decimals, of which nine count. What is before 1970 is 1970, for containerd."""
    seconds, _, decimals = text.partition(".")
    try:
        return max(0, int(seconds) * 10**9 + int(f"{decimals:0<9}"[:9]))
    except ValueError:
        return 0
