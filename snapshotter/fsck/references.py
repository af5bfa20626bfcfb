"""Who uses which object, and which files are one: what only all trees together show. Pure: it reads no disk.

links of an inode = its name in the store, one in refs/ of each layer that holds it, its paths in trees
"""

from __future__ import annotations

import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from snapshotter.content.stubs import is_stub_ref
from snapshotter.fsck.findings import Finding
from snapshotter.fsck.fixes import LinkObject, Rebuild, Remark, ReplaceReference, Resize, Separate
from snapshotter.fsck.heal import Lost
from snapshotter.fsck.image import Image
from snapshotter.fsck.objects import Stored
from snapshotter.fsck.trees import Inode, Scanned
from snapshotter.model import Kind, SnapshotId

Scans = Mapping[SnapshotId, Scanned]


class References:
    """What all passes found, put together."""

    def __init__(self, image: Image, scans: Scans, others: Sequence[Scanned], stored: Stored, since_ns: int | None):
        """`scans`: of the snapshots that the image has. `others`: what else may link to the same files. What has
        changed after `since_ns` is not judged: somebody is at it."""
        self._image = image
        self._stored = stored
        self._since_ns = since_ns
        self._layers = {
            snapshot_id: scanned
            for snapshot_id, scanned in scans.items()
            if image.records[snapshot_id].kind is Kind.COMMITTED and not image.records[snapshot_id].sealing
        }
        self._uppers = {
            snapshot_id: scanned
            for snapshot_id, scanned in scans.items()
            if image.records[snapshot_id].kind is Kind.ACTIVE
        }
        self._everywhere = [*scans.values(), *others]
        self._refs_of = {inode: ref for ref, (inode, _) in stored.inodes.items()}
        self._holders: dict[str, set[SnapshotId]] = defaultdict(set)
        for snapshot_id, scanned in self._layers.items():
            for ref in scanned.refs.keys() | scanned.stubs.keys():
                self._holders[ref].add(snapshot_id)

    def holders(self, ref: str) -> frozenset[SnapshotId]:
        """The layers that use an object."""
        return frozenset(self._holders.get(ref, ()))

    def lost_objects(self) -> frozenset[str]:
        """Refs of objects that cannot be read right."""
        missing: set[str] = set()
        for scanned in self._layers.values():
            missing |= scanned.stubs.keys() - scanned.refs.keys() - self._stored.inodes.keys()
        return frozenset(missing | self._stored.damaged.keys())

    def check(self, paths: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
        """`paths`: of the lost objects, where they are used."""
        yield from self._lost(paths)
        yield from self._marks()
        yield from self._held()
        yield from self._sizes()
        yield from self._unused()
        yield from self._links()
        yield from self._aliases()
        yield from self._shared_uppers()

    # -- objects

    def _lost(self, paths: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
        for ref in sorted(self.lost_objects()):
            is_missing = ref not in self._stored.inodes
            what = [] if is_missing else [self._stored.damaged[ref]]
            users = paths.get(ref, ())
            what.append(f"used by {'; '.join(users)}" if users else "used by no layer")
            fix = Rebuild(Lost(ref, self._size_of(ref)), self.holders(ref))
            kind = "object-missing" if is_missing else "object-content"
            yield Finding(kind, _store_path(ref), "; ".join(what), fix=fix)

    def _size_of(self, ref: str) -> int | None:
        """Of the content. A damaged object may have been cut; its stubs have the size that it had."""
        for scanned in self._layers.values():
            if ref in scanned.stubs:
                return scanned.stubs[ref][1]
        return self._stored.inodes[ref][1].size_bytes if ref in self._stored.inodes else None

    def _marks(self) -> Iterator[Finding]:
        for ref, what in self._stored.unmarked.items():
            if ref not in self._stored.damaged:
                yield Finding("object-mark", _store_path(ref), what, fix=Remark(ref, self.holders(ref)))

    def _held(self) -> Iterator[Finding]:
        """What layers hold against what the store has."""
        for snapshot_id, scanned in self._layers.items():
            title = self._image.title(snapshot_id)
            for ref, inode in scanned.refs.items():
                if ref not in self._stored.inodes:
                    fix = LinkObject(ref, snapshot_id, to_store=True)
                    yield Finding("object-unlinked", _store_path(ref), f"held by {title}", snapshot_id, fix)
                elif self._stored.inodes[ref][0] != inode and not self._is_new(self._stored.inodes[ref][1]):
                    replace = ReplaceReference(ref, snapshot_id)
                    yield Finding("reference-foreign", _ref_path(snapshot_id, ref), title, snapshot_id, replace)
            for ref in scanned.stubs.keys() - scanned.refs.keys():
                if ref in self._stored.inodes:
                    detail = f"{title} uses it for {os.fsdecode(scanned.stubs[ref][0])}"
                    link = LinkObject(ref, snapshot_id, to_store=False)
                    yield Finding("reference-missing", _ref_path(snapshot_id, ref), detail, snapshot_id, link)

    def _sizes(self) -> Iterator[Finding]:
        for snapshot_id, scanned in self._layers.items():
            stubs = ((ref, *stub) for ref, stub in scanned.stubs.items())
            for ref, path, size_bytes in itertools.chain(stubs, scanned.odd):
                inode = self._stored.inodes.get(ref)
                if inode is not None and inode[1].size_bytes != size_bytes and ref not in self._stored.damaged:
                    detail = f"{size_bytes} bytes, and its object {_store_path(ref)} has {inode[1].size_bytes}"
                    fix = Resize(snapshot_id, path, ref)
                    yield Finding("stub-size", _tree_path(snapshot_id, path), detail, snapshot_id, fix)

    def _unused(self) -> Iterator[Finding]:
        for snapshot_id, scanned in self._layers.items():
            for ref in scanned.unused:
                yield Finding("reference-unused", _ref_path(snapshot_id, ref), "", snapshot_id)
        for ref, (_, inode) in self._stored.inodes.items():
            if inode.links == 1 and not self._holders.get(ref) and not self._is_new(inode):
                yield Finding("object-unused", _store_path(ref), f"{inode.size_bytes} bytes")

    # -- files that are one

    def _links(self) -> Iterator[Finding]:
        """Only of objects and layers: who writes to an upper links what they like."""
        known = dict(self._stored.inodes.values())
        subjects = {inode: _store_path(ref) for inode, ref in self._refs_of.items()}
        for snapshot_id, scanned in self._layers.items():
            for inode, path in scanned.first.items():
                known.setdefault(inode, scanned.inodes[inode])
                subjects.setdefault(inode, _tree_path(snapshot_id, path))
        found = Counter[int](self._refs_of.keys())
        for scanned in self._everywhere:
            found.update(scanned.paths)
            found.update(scanned.elsewhere)
        for inode, status in known.items():
            if status.links != found[inode] and not self._is_new(status):
                yield Finding(
                    "link-count", subjects[inode],
                    f"inode {inode} has {status.links} names, of which {found[inode]} were found",
                )  # fmt: skip

    def _aliases(self) -> Iterator[Finding]:
        owners: dict[int, list[SnapshotId]] = defaultdict(list)
        for snapshot_id, scanned in self._layers.items():
            for inode in scanned.paths:
                owners[inode].append(snapshot_id)
            yield from self._aliases_within(snapshot_id, scanned)
        for inode, ids in owners.items():
            for snapshot_id in ids if len(ids) > 1 else ():
                below = {above.id for above in self._image.ancestors(self._image.records[snapshot_id])}
                for other in below.intersection(ids):
                    path, theirs = self._layers[snapshot_id].first[inode], self._layers[other].first[inode]
                    fix = Separate(snapshot_id, inode, together=True)
                    detail = f"is also {_tree_path(other, theirs)}, in a layer below"
                    yield Finding("alias", _tree_path(snapshot_id, path), detail, snapshot_id, fix)
                    break

    def _aliases_within(self, snapshot_id: SnapshotId, scanned: Scanned) -> Iterator[Finding]:
        """An object that has more paths in a layer than the file had that became it."""
        facts = self._image.facts(snapshot_id)
        if facts is None or facts.own is None:
            return  # nobody wrote down what the image linked
        for ref, inode in scanned.refs.items():
            wanted = facts.many_names.get(ref, 1)
            if not is_stub_ref(ref) and scanned.paths[inode] > wanted:
                detail = f"has {scanned.paths[inode]} paths there, and the image linked {wanted}"
                # Which of several belong together, nobody knows.
                fix = Separate(snapshot_id, inode, together=False) if wanted == 1 else None
                yield Finding("alias", _tree_path(snapshot_id, scanned.first[inode]), detail, snapshot_id, fix)

    def _shared_uppers(self) -> Iterator[Finding]:
        owners: dict[int, str] = {inode: _store_path(ref) for inode, ref in self._refs_of.items()}
        for snapshot_id, scanned in self._layers.items():
            for inode, path in scanned.first.items():
                owners.setdefault(inode, _tree_path(snapshot_id, path))
        for snapshot_id, scanned in self._uppers.items():
            for inode in scanned.paths:
                if inode in owners and not self._is_new(scanned.inodes[inode]):
                    path = scanned.first[inode]
                    # A name in the index of the upper says that it is linked to others in a way that a copy breaks.
                    is_content = is_stub_ref(self._refs_of.get(inode, ""))
                    is_indexed = bool(scanned.elsewhere[inode])
                    fix = None if is_indexed else Separate(snapshot_id, inode, together=True, is_content=is_content)
                    subject = _tree_path(snapshot_id, path)
                    yield Finding("upper-shared", subject, f"is also {owners[inode]}", snapshot_id, fix)

    def _is_new(self, inode: Inode) -> bool:
        return self._since_ns is not None and inode.changed_ns >= self._since_ns


def _store_path(ref: str) -> str:
    return f"objects/{ref[:2]}/{ref[2:]}"


def _ref_path(snapshot_id: SnapshotId, ref: str) -> str:
    return f"snapshots/{snapshot_id}/refs/{ref}"


def _tree_path(snapshot_id: SnapshotId, path: bytes) -> str:
    return f"snapshots/{snapshot_id}/fs/{os.fsdecode(path)}"
