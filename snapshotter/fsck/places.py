"""What the metadata says against what there is below the root: directories and mounts.

Not an error is what a kill leaves and the next start of the daemon takes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from snapshotter import mountinfo
from snapshotter.fsck import lost
from snapshotter.fsck.findings import Finding
from snapshotter.fsck.fixes import Detach, FinishSwaps, MakeWork
from snapshotter.fsck.image import Image
from snapshotter.meta.schema import Record
from snapshotter.model import Kind, SnapshotId
from snapshotter.root import SHARDS_OF_OBJECTS, Root

_IN_ROOT = {
    "lock", "metadata", "snapshots", "objects", "mounts", "busy", "empty", "trash", "spool", "memory", lost.NAME,
}  # fmt: skip
_IN_SNAPSHOT = {"fs", "refs", "seal", "work"}
_OF_SEALING = {"new", "old"}
_BUSY = re.compile(r"[0-9]+\.[0-9]+")


def directory_ids(root: Root) -> frozenset[int]:
    """Of the directories in snapshots/."""
    return frozenset(int(name) for name in os.listdir(root.snapshots) if name.isdecimal())


def check(root: Root, image: Image, spared: Collection[int], listed: Collection[int]) -> Iterator[Finding]:
    """`listed`: `directory_ids` before the image was read; `spared`: ids that somebody is changing."""
    for record in image.records.values():
        if record.id not in spared:
            yield from _snapshot(root, image, record)
    for unknown in sorted(set(listed) - image.records.keys() - set(spared)):
        if root.directory(SnapshotId(unknown)).exists():
            yield Finding("left-behind", f"snapshots/{unknown}", "no snapshot has this id", SnapshotId(unknown))
    yield from _strays(root)
    yield from _mounts(root, image, spared)


def _snapshot(root: Root, image: Image, record: Record) -> Iterator[Finding]:
    title, snapshot_id = image.title(record.id), record.id
    if record.sealing:
        yield Finding("sealing", title, "", snapshot_id)
        return
    owns_tree = record.kind is not Kind.VIEW or record.parent_id is None
    if owns_tree and not is_tree(root, snapshot_id):
        children = [image.title(other.id) for other in image.records.values() if other.parent_id == snapshot_id]
        detail = f"below {', '.join(children)}" if children else ""
        yield Finding("tree-missing", title, detail, snapshot_id)
        return
    has_work = root.work(snapshot_id).exists()
    if record.kind is Kind.ACTIVE and (record.parent_id or record.materialized) and not has_work:
        yield Finding("work-missing", title, "", snapshot_id, MakeWork(snapshot_id))
    if record.kind is Kind.COMMITTED and has_work:
        yield Finding("left-behind", f"snapshots/{snapshot_id}/work", title, snapshot_id)
    seal = root.seal(snapshot_id)
    if record.kind is Kind.COMMITTED and any(seal.glob("*/swapping-*")):
        yield Finding("half-sealed", title, "", snapshot_id, FinishSwaps(snapshot_id))
    elif seal.exists():
        yield Finding("left-behind", f"snapshots/{snapshot_id}/seal", title, snapshot_id)


def is_tree(root: Root, snapshot_id: SnapshotId) -> bool:
    """Whether a snapshot has one. What a symlink leads to is not here."""
    directory, tree = root.directory(snapshot_id), root.fs(snapshot_id)
    return tree.is_dir() and not tree.is_symlink() and not directory.is_symlink()


def _strays(root: Root) -> Iterator[Finding]:
    for name in set(os.listdir(root.path)) - _IN_ROOT:
        yield Finding("stray", name)
    for shard in set(os.listdir(root.objects)) - SHARDS_OF_OBJECTS:
        yield Finding("stray", f"objects/{shard}")
    for name in os.listdir(root.busy):
        if not _BUSY.fullmatch(name):
            yield Finding("stray", f"busy/{name}")
    for name in os.listdir(root.mounts):
        if not name.isdecimal():
            yield Finding("stray", f"mounts/{name}")
    for name in os.listdir(root.snapshots):
        if not name.isdecimal():
            yield Finding("stray", f"snapshots/{name}")
            continue
        try:
            inside = set(os.listdir(root.snapshots / name)) - _IN_SNAPSHOT - _OF_SEALING
        except (FileNotFoundError, NotADirectoryError):
            continue
        for stray in inside:
            yield Finding("stray", f"snapshots/{name}/{stray}", snapshot=SnapshotId(int(name)))


def _mounts(root: Root, image: Image, spared: Collection[int]) -> Iterator[Finding]:
    """Of our mount namespace."""
    top = Path(os.path.realpath(root.mounts))
    owned: set[str] = set()
    for mount in reversed(list(mountinfo.read())):
        path = Path(mount.path)
        if not path.is_relative_to(top) or path == top:
            continue
        name = str(path.relative_to(top))
        record = image.records.get(SnapshotId(int(name))) if name.isdecimal() else None
        is_snapshots = record is not None and (record.kind is not Kind.COMMITTED or record.sealing)
        if (name.isdecimal() and int(name) in spared) or (is_snapshots and name not in owned):
            owned.add(name)
            continue
        yield Finding("mount-unowned", f"mounts/{name}", mount.filesystem, fix=Detach(mount.path))


def in_use(root: Root, image: Image) -> dict[SnapshotId, str]:
    """Snapshots whose trees are to be left alone, and why: an active snapshot stands on them, or they are mounted."""
    reasons: dict[SnapshotId, str] = {}
    for record in image.records.values():
        if record.kind is Kind.ACTIVE:
            for layer in image.ancestors(record):
                reasons.setdefault(layer.id, f"{image.title(record.id)} is active and stands on it")
    return {snapshot_id: "it is mounted" for snapshot_id in _mounted(root, image)} | reasons


def _mounted(root: Root, image: Image) -> set[SnapshotId]:
    """Snapshots of which something is mounted, in any mount namespace: as a layer, as an upper, or by a bind."""
    found: set[SnapshotId] = set()
    status = os.stat(root.snapshots)
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    by_path = re.compile(re.escape(os.path.realpath(root.snapshots)) + r"/(\d+)/")
    # containerd cuts what all layers have in common where their options are too long. Such a mount may be of another
    # root: it is, if it has a layer that this one does not.
    by_relative_path = re.compile(r"[=:](\d+)/fs(?=[:,]|$)")
    by_root = re.compile(r"/snapshots/(\d+)/")
    for line in mountinfo.lines_everywhere():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        found.update(SnapshotId(int(number)) for number in by_path.findall(after))
        relative = {SnapshotId(int(number)) for number in by_relative_path.findall(after)}
        if relative <= image.records.keys():
            found |= relative
        if fields[2] == device and (match := by_root.search(f"{fields[3]}/")):
            found.add(SnapshotId(int(match[1])))
    return found
