"""The least that images can take of a disk when every file is stored once, counted from their archives alone.

Nothing of the project is imported here. What is counted is blocks of an ext4 with 256-byte inodes, as du(1) does:

- stub: every distinct content of at least `stub_min_bytes` once; a smaller file for itself;
- hardlink: every distinct identity (content, mode, owner, time to the nanosecond, xattrs) as often as the one chain
  needs it that needs it most, since two paths of a chain may not be one inode; what is never linked for itself;
- either: directories, and symbolic links too long for their inode. Inodes and xattrs are no blocks.

An image is the archives of its layers, the lowest first. Layers that two images have in common, down to the bottom,
are one.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 4096
LONGEST_INLINE_SYMLINK = 59
_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"

Identity = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class File:
    """One inode of a layer, by whatever names."""

    path: str
    size_bytes: int
    content: bytes
    """Its digest."""
    identity: Identity


@dataclass(frozen=True, slots=True)
class Layer:
    files: tuple[File, ...]
    """The ones with content."""
    other_bytes: int


def stub_bound(images: Sequence[Sequence[Path]], stub_min_bytes: int = 4096) -> int:
    """Bytes of disk with strategy stub."""
    contents: dict[bytes, int] = {}
    total = 0
    for layer in _distinct_layers(images):
        total += layer.other_bytes
        for file in layer.files:
            if file.size_bytes >= stub_min_bytes:
                contents[file.content] = _blocks(file.size_bytes)
            else:
                total += _blocks(file.size_bytes)
    return total + sum(contents.values())


def hardlink_bound(images: Sequence[Sequence[Path]], never_link: Sequence[str] = ()) -> int:
    """Bytes of disk with strategy hardlink."""
    total = 0
    for layer in _distinct_layers(images):
        total += layer.other_bytes
        total += sum(_blocks(file.size_bytes) for file in layer.files if _is_below(file.path, never_link))
    needed: Counter[Identity] = Counter()
    sizes: dict[Identity, int] = {}
    for image in images:
        linked = [file for layer in map(_layer, image) for file in layer.files if not _is_below(file.path, never_link)]
        needed |= Counter(file.identity for file in linked)  # the greater number of each
        sizes |= {file.identity: file.size_bytes for file in linked}
    return total + sum(count * _blocks(sizes[identity]) for identity, count in needed.items())


def plain_bytes(images: Sequence[Sequence[Path]]) -> int:
    """Bytes of disk when nothing is shared."""
    layers = _distinct_layers(images)
    return sum(layer.other_bytes + sum(_blocks(file.size_bytes) for file in layer.files) for layer in layers)


def _distinct_layers(images: Sequence[Sequence[Path]]) -> list[Layer]:
    prefixes = {tuple(image[:count]) for image in images for count in range(1, len(image) + 1)}
    return [_layer(prefix[-1]) for prefix in sorted(prefixes)]


_read: dict[Path, Layer] = {}


def _layer(archive: Path) -> Layer:
    """Read once: archives do not change."""
    if archive not in _read:
        _read[archive] = _scan(archive)
    return _read[archive]


def _scan(archive: Path) -> Layer:
    files: dict[str, File] = {}
    symlink_bytes = 0
    directories: dict[str, set[str]] = {"": set()}
    with tarfile.open(archive, encoding="utf-8", errors="surrogateescape") as stream:
        for member in stream:
            path = os.path.normpath("/" + member.name).lstrip("/")
            if os.path.basename(path) != _OPAQUE:
                _enter(directories, path)
            if member.isdir():
                directories.setdefault(path, set())
            elif member.issym() and len(os.fsencode(member.linkname)) > LONGEST_INLINE_SYMLINK:
                symlink_bytes += BLOCK_BYTES
            elif member.isreg() and member.size:
                content = stream.extractfile(member)
                assert content
                digest = hashlib.sha256(content.read()).digest()
                files[path] = File(path, member.size, digest, (digest, *_metadata(member)))
    directory_bytes = sum(_directory_bytes(names) for names in directories.values())
    return Layer(tuple(files.values()), directory_bytes + symlink_bytes)


def _metadata(member: tarfile.TarInfo) -> Iterator[object]:
    yield from (member.mode, member.uid, member.gid, member.pax_headers.get("mtime", member.mtime))
    yield from sorted(item for item in member.pax_headers.items() if item[0].startswith("SCHILY.xattr."))


def _enter(directories: dict[str, set[str]], path: str) -> None:
    """Counts a name in its directory, and the directories that lead there."""
    while path:
        directory, _, name = path.rpartition("/")
        names = directories.setdefault(directory, set())
        names.add(name.removeprefix(_WHITEOUT))
        path = directory


def _directory_bytes(names: set[str]) -> int:
    """ext4_dir_entry_2: eight bytes and the name, in steps of four; with it go two dots and a checksum."""
    return _blocks(3 * 12 + sum(8 + -(-len(os.fsencode(name)) // 4) * 4 for name in names))


def _blocks(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _is_below(path: str, globs: Sequence[str]) -> bool:
    """Whether the path, or a directory above it, is what one of the globs means."""
    parts = path.split("/")
    above = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(_matches(candidate, glob) for glob in globs for candidate in above)


def _matches(path: str, glob: str) -> bool:
    """A star does not reach across a slash."""
    parts, globs = path.split("/"), glob.split("/")
    return len(parts) == len(globs) and all(map(fnmatch.fnmatchcase, parts, globs))
