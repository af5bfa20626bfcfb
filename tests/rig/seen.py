"""What a tree shows to who reads it, as values that compare."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Seen:
    """One path. Directories have no size, content or link count."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: tuple[tuple[str, bytes], ...]
    device: int = 0
    links: int = 1
    first_name: str = ""
    """Of the names of this inode in the tree; empty where it is the only one."""
    content: bytes = b""
    """Of a file, or the target of a symlink."""


def seen(top: Path) -> dict[str, Seen]:
    """All paths below a directory, and itself as "."."""
    paths = [top, *sorted(top.rglob("*"))]
    names: dict[int, list[str]] = {}
    for path in paths:
        if not path.is_dir() or path.is_symlink():
            names.setdefault(path.lstat().st_ino, []).append(str(path.relative_to(top)))
    groups = {inode: group[0] for inode, group in names.items() if len(group) > 1}
    return {str(path.relative_to(top)): _look(path, groups) for path in paths}


def without_times(tree: dict[str, Seen]) -> dict[str, Seen]:
    """For comparing trees in which the same was done at different times."""
    return {path: replace(entry, mtime_ns=0) for path, entry in tree.items()}


def xattrs_of(path: Path) -> dict[str, bytes]:
    """All of them, overlay's too where the filesystem shows them."""
    names = os.listxattr(path, follow_symlinks=False)
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in sorted(names)}


def identities(top: Path) -> dict[str, tuple[int, int]]:
    """st_dev and st_ino of all paths below a directory, and of itself; those that scandir shows are checked for
    being the same."""
    found = {".": _identity(top.lstat())}
    for directory, _, _ in os.walk(top):
        with os.scandir(directory) as entries:
            for entry in entries:
                status = os.lstat(entry.path)
                assert entry.inode() == status.st_ino, f"{entry.path}: d_ino is not st_ino"
                found[os.path.relpath(entry.path, top)] = _identity(status)
    return found


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _look(path: Path, groups: dict[int, str]) -> Seen:
    status = path.lstat()
    common = Seen(
        status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, tuple(xattrs_of(path).items()), status.st_rdev
    )
    if stat.S_ISDIR(status.st_mode):
        return common
    content = b""
    if stat.S_ISREG(status.st_mode):
        content = path.read_bytes()
        assert len(content) == status.st_size, f"{path} has {len(content)} bytes, not {status.st_size}"
    elif stat.S_ISLNK(status.st_mode):
        content = os.fsencode(os.readlink(path))
    return replace(common, links=status.st_nlink, first_name=groups.get(status.st_ino, ""), content=content)
