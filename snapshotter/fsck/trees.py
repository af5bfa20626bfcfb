"""One pass over what is in a snapshot's directory. Runs in worker processes, one snapshot each.

It looks at every inode and its attributes once, reads no content, and hands back little: findings that the tree shows
by itself, and, for what only all trees together show, which inodes have several names, and which objects are used.
"""

from __future__ import annotations

import enum
import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from snapshotter.content.stubs import is_stub_ref, ref_of
from snapshotter.linux import FS_APPEND_FL, FS_IMMUTABLE_FL, get_inode_flags
from snapshotter.overlay.attributes import Names, by_name, list_attributes
from snapshotter.overlay.features import NO_FEATURES, OF_STUBS, Feature
from snapshotter.walker import OPEN_DIRECTORY, Name, walk_names

_MANY = 20
"""Paths that are named where there may be any number."""


class Role(enum.Enum):
    """What a directory with fs/ in it is."""

    LAYER = enum.auto()
    UPPER = enum.auto()
    OTHER = enum.auto()
    """Nothing is said about it; what it links to is counted."""


class Inode(NamedTuple):
    """A file that has, or may have, several names."""

    links: int
    size_bytes: int
    changed_ns: int
    """Its ctime."""


@dataclass(slots=True)
class Scanned:
    """What is in one directory."""

    identity: int
    """The inode of the directory: it stays when that is renamed."""
    inodes: dict[int, Inode] = field(default_factory=dict)
    """Files of the tree with several names."""
    paths: Counter[int] = field(default_factory=Counter)
    """How many names each of them has in the tree."""
    first: dict[int, bytes] = field(default_factory=dict)
    """One of these names."""
    elsewhere: Counter[int] = field(default_factory=Counter)
    """How many names they have in the directory, but not in the tree."""
    refs: dict[str, int] = field(default_factory=dict)
    """The inode of each entry of refs/."""
    needs: Feature = NO_FEATURES
    stubs: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    """Of each object that stubs use: the path of one, and its size."""
    odd: list[tuple[str, bytes, int]] = field(default_factory=list)
    """Stubs of the same object that have another size."""
    unused: list[str] = field(default_factory=list)
    """Entries of refs/ that nothing uses."""
    dead: list[bytes] = field(default_factory=list)
    """Paths with attributes of a dead mount, the first ones."""
    unknown: list[tuple[bytes, str]] = field(default_factory=list)
    """Paths with attributes that no layer has, the first ones."""
    uses_lowers: bool = False
    """Whether there are renamed directories, or files whose content is in a layer below (overlays.py)."""


def scan(directory: Path, role: Role, names: Names) -> Scanned:
    """Raises FileNotFoundError when the directory is gone, OSError."""
    fd = os.open(directory, OPEN_DIRECTORY)
    try:
        scanned = Scanned(os.fstat(fd).st_ino)
        present = os.listdir(fd)
    finally:
        os.close(fd)
    _scan_refs(directory / "refs", scanned)
    if "fs" in present:
        _scan_tree(directory / "fs", role, names, scanned)
    for name in present:
        if name not in ("fs", "refs"):
            _count(directory / name, scanned)
    return scanned


def users(directory: Path, refs: frozenset[str], inodes: frozenset[int]) -> dict[str, list[bytes]]:
    """The paths that use some objects: stubs of `refs`, and files that are one of `inodes`, under the number as text.
    Raises OSError."""
    found: dict[str, list[bytes]] = {}
    for name in _names(directory / "fs"):
        if not name.is_file:
            continue
        key = str(name.inode) if name.inode in inodes else None
        if key is None and refs:
            path = by_name(name.directory_fd, name.name)
            ref = _ref(path, list_attributes(path))
            key = ref if ref in refs else None
        if key is not None:
            found.setdefault(key, []).append(name.directory + name.name)
    return found


def _scan_refs(directory: Path, scanned: Scanned) -> None:
    try:
        fd = os.open(directory, OPEN_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                scanned.refs[entry.name] = entry.inode()
                scanned.elsewhere[entry.inode()] += 1
    finally:
        os.close(fd)


def _scan_tree(tree: Path, role: Role, names: Names, scanned: Scanned) -> None:
    fd = os.open(tree, OPEN_DIRECTORY)
    try:
        if role is not Role.OTHER:
            _judge(by_name(fd, b"."), b".", list_attributes(fd), role, names, scanned)
        for name in walk_names(fd):
            _visit(name, role, names, scanned)
    finally:
        os.close(fd)
    if role is Role.LAYER:
        held = (ref for ref, inode in scanned.refs.items() if ref not in scanned.stubs and inode not in scanned.paths)
        scanned.unused.extend(held)


def _visit(name: Name, role: Role, names: Names, scanned: Scanned) -> None:
    path = by_name(name.directory_fd, name.name)
    try:
        status = os.stat(name.name, dir_fd=name.directory_fd, follow_symlinks=False) if name.is_file else None
        if status and status.st_nlink > 1:
            inode = status.st_ino
            scanned.inodes[inode] = Inode(status.st_nlink, status.st_size, status.st_ctime_ns)
            scanned.paths[inode] += 1
            scanned.first.setdefault(inode, name.directory + name.name)
        if role is Role.OTHER:
            return
        attributes = list_attributes(path)
        if not attributes or not any(attribute.startswith(names.prefix) for attribute in attributes):
            return
        ref = _ref(path, attributes) if status else None
    except FileNotFoundError:  # of an upper that is in use
        return
    if status and ref:
        scanned.needs |= OF_STUBS
        stub = name.directory + name.name, status.st_size
        if scanned.stubs.setdefault(ref, stub)[1] != status.st_size:
            scanned.odd.append((ref, *stub))
    else:
        _judge(path, name.directory + name.name, attributes, role, names, scanned)


def _judge(path: bytes, shown: bytes, attributes: Iterable[str], role: Role, names: Names, scanned: Scanned) -> None:
    """What the attributes of anything but a stub say."""
    for attribute in attributes:
        if attribute == names.metacopy:
            scanned.needs |= Feature.METACOPY
            scanned.uses_lowers = True
        elif attribute == names.redirect:
            scanned.needs |= Feature.REDIRECT_DIR
            scanned.uses_lowers = True
        elif role is not Role.LAYER:
            continue
        elif attribute in names.dead:
            if len(scanned.dead) < _MANY and not _is_locked(path):
                scanned.dead.append(shown)
        elif names.is_untrusted(attribute) and len(scanned.unknown) < _MANY:
            scanned.unknown.append((shown, attribute))


def _ref(path: bytes, attributes: Iterable[str]) -> str | None:
    """The ref of the object of a stub; None of everything else."""
    values = {name: b"" for name in attributes}
    redirect = next((name for name in values if name.endswith(".overlay.redirect")), None)
    if redirect is None:
        return None
    values[redirect] = os.getxattr(path, redirect, follow_symlinks=False)
    ref = ref_of(values)
    return ref if ref and is_stub_ref(ref) else None


def _is_locked(path: bytes) -> bool:
    """Whether its attributes cannot be changed: then they stay when a layer is sealed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return bool(get_inode_flags(fd) & (FS_IMMUTABLE_FL | FS_APPEND_FL))
    except OSError:
        return False
    finally:
        os.close(fd)


def _names(tree: Path) -> Iterable[Name]:
    try:
        fd = os.open(tree, OPEN_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        yield from walk_names(fd)
    finally:
        os.close(fd)


def _count(place: Path, scanned: Scanned) -> None:
    """Files with several names anywhere below a directory, or a file itself."""
    try:
        status = place.lstat()
    except FileNotFoundError:  # temporary
        return
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        scanned.elsewhere[status.st_ino] += 1
    if not stat.S_ISDIR(status.st_mode):
        return
    for name in _names(place):
        if name.is_file:
            try:
                status = os.stat(name.name, dir_fd=name.directory_fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if status.st_nlink > 1:
                scanned.elsewhere[status.st_ino] += 1
