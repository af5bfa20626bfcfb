"""What a container sees of an image, to the nanosecond, against what the image says.

The container's own tools look (find, sha256sum, getfattr), so that everything is read through the mount on
which the container runs, by the container's kernel view, and not by a path of ours.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from tests.rig.image import Entry, EntryKind

Execute = Callable[[str], bytes]
"""Runs a shell script in the container and returns its output."""

# What runc mounts there, or writes, is not the image's.
_RUNTIME = {b"dev", b"proc", b"sys", b"run", b""}
_TYPES = {
    b"f": EntryKind.FILE, b"d": EntryKind.DIRECTORY, b"l": EntryKind.SYMLINK, b"p": EntryKind.FIFO,
}  # fmt: skip
_FIND = r"find / -xdev -printf '%P\0%y\0%m\0%U\0%G\0%T@\0%s\0%l\0%i\0%n\0'"
_FIELDS = 10
_OCTAL = re.compile(rb"\\([0-7]{3})")
_SUMS = "find / -xdev -type f -exec sha256sum -z {} +"
_XATTRS = "find / -xdev -exec getfattr --dump --no-dereference --absolute-names --match=- --encoding=hex {} +"


@dataclass(frozen=True, slots=True)
class Seen:
    """One path as it looks from inside. Directories have no size, and only files a link count."""

    kind: EntryKind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size_bytes: int = 0
    target: bytes = b""
    sha256: str = ""
    links: int = 1
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tree:
    """All paths, and which of them are one inode."""

    paths: Mapping[bytes, Seen]
    same_inode: frozenset[frozenset[bytes]]


def seen_by(execute: Execute) -> Tree:
    """Looks at the root filesystem of a container that has findutils, coreutils and attr."""
    sums = _sums(execute(_SUMS))
    xattrs = _xattrs(execute(_XATTRS))
    words = execute(_FIND).split(b"\0")
    paths: dict[bytes, Seen] = {}
    inodes: dict[bytes, set[bytes]] = {}
    for at in range(0, len(words) - 1, _FIELDS):
        path, letter, mode, uid, gid, mtime, size, target, inode, links = words[at : at + _FIELDS]
        if path.partition(b"/")[0] in _RUNTIME:
            continue
        kind = _TYPES[letter]
        is_file = kind is EntryKind.FILE
        paths[path] = Seen(
            kind, int(mode, 8), int(uid), int(gid), _time_ns(mtime),
            size_bytes=int(size) if is_file else 0,
            target=target,
            sha256=sums.get(path, "") if is_file else "",
            links=int(links) if is_file else 1,
            xattrs=xattrs.get(path, {}),
        )  # fmt: skip
        if is_file:
            inodes.setdefault(inode, set()).add(path)
    return Tree(paths, frozenset(frozenset(group) for group in inodes.values() if len(group) > 1))


def expected(image: Mapping[bytes, Entry]) -> Tree:
    """What `seen_by` must give for a merged image."""
    first_names = {path: _first_name(entry) for path, entry in image.items()}
    links = Counter(first_names.values())
    groups: dict[bytes, set[bytes]] = {}
    for path, first in first_names.items():
        groups.setdefault(first, set()).add(path)
    paths = {
        path: _expected_entry(entry, links[first_names[path]])
        for path, entry in image.items()
        if path.partition(b"/")[0] not in _RUNTIME
    }
    return Tree(paths, frozenset(frozenset(group) for group in groups.values() if len(group) > 1))


def without_links(tree: Tree) -> Tree:
    """Where layers share inodes, link counts say how often a file is used; which paths are one inode stays."""
    return Tree({path: replace(seen, links=1) for path, seen in tree.paths.items()}, tree.same_inode)


def differences(wanted: Tree, got: Tree) -> list[str]:
    """One line for each difference; empty when the container sees exactly the image."""
    lines = []
    for path in sorted(wanted.paths.keys() | got.paths.keys()):
        one, other = wanted.paths.get(path), got.paths.get(path)
        if one is None or other is None:
            lines.append(f"{path!r}: {'not in the image' if one is None else 'missing'}")
            continue
        for name in Seen.__slots__:
            if getattr(one, name) != getattr(other, name):
                lines.append(f"{path!r}: {name} is {getattr(other, name)!r}, not {getattr(one, name)!r}")
    for group in wanted.same_inode ^ got.same_inode:
        what = "are not one inode" if group in wanted.same_inode else "are one inode"
        lines.append(f"{sorted(group)!r} {what}")
    return lines


def _first_name(entry: Entry) -> bytes:
    return entry.target if entry.kind is EntryKind.HARD_LINK else entry.path


def _expected_entry(entry: Entry, links: int) -> Seen:
    kind = EntryKind.FILE if entry.kind is EntryKind.HARD_LINK else entry.kind
    is_file = kind is EntryKind.FILE
    return Seen(
        kind, entry.mode, entry.uid, entry.gid, entry.mtime_ns,
        size_bytes=len(entry.content) if is_file else 0,
        target=entry.target if kind is EntryKind.SYMLINK else b"",
        sha256=hashlib.sha256(entry.content).hexdigest() if is_file else "",
        links=links if is_file else 1,
        xattrs=dict(entry.xattrs),
    )  # fmt: skip


def _time_ns(text: bytes) -> int:
    """find's %T@: seconds with ten decimals, of which the kernel gave nine."""
    whole, _, fraction = text.partition(b".")
    return int(whole) * 10**9 + int(fraction[:9].ljust(9, b"0"))


def _sums(output: bytes) -> dict[bytes, str]:
    lines = (line.partition(b"  ") for line in output.split(b"\0") if line)
    return {path.lstrip(b"/"): digest.decode() for digest, _, path in lines}


def _xattrs(output: bytes) -> dict[bytes, dict[str, bytes]]:
    """getfattr(1): "# file: PATH", "NAME=0xHEX", an empty line; unusual bytes of a path in octal."""
    found: dict[bytes, dict[str, bytes]] = {}
    for block in output.split(b"\n\n"):
        header, *lines = block.strip().split(b"\n")
        path = _OCTAL.sub(lambda octal: bytes([int(octal[1], 8)]), header.removeprefix(b"# file: "))
        for line in lines:
            name, _, value = line.partition(b"=")
            # A security module's label is the host's affair, not the image's.
            if name != b"security.selinux":
                found.setdefault(path.lstrip(b"/"), {})[name.decode()] = bytes.fromhex(value[2:].decode())
    return found
