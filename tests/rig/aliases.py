"""Looks for paths of a chain that share an inode although the image did not hard-link them.

Such a pair is an alias: with `index=on` the kernel takes it for one file, and the first write to either name is a
write to both. Nothing of the project is imported here, so that nothing that it gets wrong is believed: a chain is a
list of directories, and what may be linked is known from the image's archives, or from a look at the tree before
sharing began.

    linked = {layer: links_of_tar(archive), other: links_of_tree(other)}
    assert aliases([[other, layer]], linked) == []
    assert shared(uppers, [objects, layer, other]) == []
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

Groups = frozenset[frozenset[bytes]]
"""The hard links of one layer: sets of the paths that are one file, relative to its top."""

Inode = tuple[int, int]

NO_LINKS: Groups = frozenset()


def aliases(chains: Iterable[Sequence[Path]], linked: Mapping[Path, Groups]) -> list[str]:
    """One line for each inode that is under several paths of a chain and should not be; empty when all is well.

    A chain is the directories of its layers in any order. Two layers never share anything; within a layer, all names
    of an inode must be in one group of `linked`, where a layer that is missing has no links.
    """
    scanned: dict[Path, dict[Inode, list[bytes]]] = {}
    found: dict[str, None] = {}
    for chain in chains:
        users: dict[Inode, list[Path]] = {}
        for layer in dict.fromkeys(chain):
            if layer not in scanned:
                scanned[layer] = linked_inodes(layer)
                found.update(dict.fromkeys(_within(layer, scanned[layer], linked.get(layer, NO_LINKS))))
            for inode in scanned[layer]:
                users.setdefault(inode, []).append(layer)
        for inode, layers in users.items():
            if len(layers) > 1:
                names = " = ".join(_text(layer, scanned[layer][inode][0]) for layer in layers)
                found[f"layers of one chain share inode {inode[1]}: {names}"] = None
    return list(found)


def shared(uppers: Iterable[Path], stored: Iterable[Path]) -> list[str]:
    """One line for each file of a writable tree that is also, by another name, in a directory of what is stored."""
    names: dict[Inode, str] = {}
    for directory in stored:
        for inode, paths in linked_inodes(directory).items():
            names.setdefault(inode, _text(directory, paths[0]))
    return [
        f"a writable file shares inode {inode[1]}: {_text(upper, paths[0])} = {names[inode]}"
        for upper in uppers
        for inode, paths in linked_inodes(upper).items()
        if inode in names
    ]


def links_of_tree(top: Path) -> Groups:
    """The hard links that a tree has now."""
    return frozenset(frozenset(paths) for paths in linked_inodes(top).values() if len(paths) > 1)


def links_of_tar(stream: BinaryIO) -> Groups:
    """The hard links that a layer's archive makes, compressed or not."""
    group_of: dict[bytes, set[bytes]] = {}
    with tarfile.open(fileobj=stream, mode="r:*", encoding="utf-8", errors="surrogateescape") as archive:
        for member in archive:
            path = _relative(member.name)
            group_of.pop(path, set()).discard(path)
            if not member.isdir():
                group = group_of.get(_relative(member.linkname), set()) if member.islnk() else set()
                # Who links to a file of a layer below gets a copy, or a file of its own.
                group.add(path)
                group_of[path] = group
    return frozenset(frozenset(group) for group in group_of.values() if len(group) > 1)


def linked_inodes(top: Path) -> dict[Inode, list[bytes]]:
    """The paths below `top` of every inode that has a second name anywhere, whiteouts left out: the kernel itself
    links those to each other, and they have no content."""
    found: dict[Inode, list[bytes]] = {}
    for path, status in _files(os.fsencode(top)):
        whiteout = stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
        if status.st_nlink > 1 and not whiteout:
            found.setdefault((status.st_dev, status.st_ino), []).append(path)
    return found


def _files(top: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """Everything below `top` but directories."""
    waiting = [b""]
    while waiting:
        directory = waiting.pop()
        with os.scandir(os.path.join(top, directory)) as entries:
            for entry in entries:
                path = os.path.join(directory, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
                else:
                    yield path, os.lstat(os.path.join(top, path))


def _within(layer: Path, inodes: Mapping[Inode, list[bytes]], groups: Groups) -> Iterator[str]:
    for inode, paths in inodes.items():
        if len(paths) > 1 and not any(group.issuperset(paths) for group in groups):
            names = " = ".join(_text(layer, path) for path in sorted(paths))
            yield f"paths of one layer share inode {inode[1]}: {names}"


def _relative(name: str) -> bytes:
    return os.path.normpath(b"/" + name.encode("utf-8", "surrogateescape")).lstrip(b"/")


def _text(directory: Path, path: bytes) -> str:
    return os.fsdecode(os.path.join(os.fsencode(directory), path))
