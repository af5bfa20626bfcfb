"""The index of an upper, work/index, against the upper and the lowers.

    work/index           attribute "upper" (before Linux 4.16: "origin"): the handle of the upper's root
    work/index/NAME      NAME: the handle of a lower inode, in hex. One of
        the inode that it was copied up to: attributes "origin", the same handle, and "nlink", see _check_nlink
        a directory (nfs_export): attribute "upper", the handle of the upper's directory
        a whiteout (nfs_export): handles to what was removed are stale
        "#...": left by a kill; the next mount removes it

Source: fs/overlayfs/namei.c (ovl_verify_index), util.c (ovl_get_nlink), super.c (ovl_get_indexdir).
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Container, Iterator

from snapshotter.fsck_overlay import handles
from snapshotter.fsck_overlay.findings import Finding, RemoveWhiteout, SetAside, SetAttribute, finding
from snapshotter.fsck_overlay.layers import UPPER, WORK, Inode, Layers, Place, UnknownAttribute
from snapshotter.fsck_overlay.lookup import Lookup, Stack
from snapshotter.fsck_overlay.tree import IndexUse, Seen

_Identity = tuple[int, int]
INDEX = Place(WORK, b"index")
_NLINK = re.compile(rb"([UL])([+-]\d{1,10})")


def use_of_index(layers: Layers) -> IndexUse:
    """How it was used; its descriptor is the layers'. Raises OSError."""
    inode = layers.inode(INDEX) if layers.work else None
    if not inode or not inode.is_directory:
        return IndexUse(None, False)
    has_directories = any(
        entry.is_dir(follow_symlinks=False) and not entry.name.startswith("#")
        for entry in os.scandir(layers.directory(INDEX))
    )
    return IndexUse(os.dup(layers.directory(INDEX)), has_directories)


class IndexCheck:
    def __init__(self, layers: Layers, lookup: Lookup, seen: Seen) -> None:
        self._layers = layers
        self._lookup = lookup
        self._seen = seen
        self._removed: dict[_Identity, Place] = {}
        """Inodes of lower layers that the index has a whiteout for."""

    def run(self) -> Iterator[Finding]:
        """Raises OSError, and UnknownAttribute."""
        inode = self._layers.inode(INDEX)
        assert inode
        self._seen.features.add("index")
        if self._is_foreign(inode):
            yield finding("index-foreign", INDEX, "", SetAside(INDEX, "it is the index of another upper"))
            return
        for name in self._layers.names(INDEX):
            if not name.startswith(b"#"):
                yield from self._entry(INDEX.child(name))
        yield from self._whiteouts()

    def _whiteouts(self) -> Iterator[Finding]:
        """What is said to be removed must not show: the kernel refuses it (EIO)."""
        shown = _shown(self._layers, self._lookup, self._removed) if self._removed else Counter()
        for identity, place in self._removed.items():
            if shown[identity]:
                yield finding("index-whiteout", place, "", RemoveWhiteout(place))

    def _is_foreign(self, inode: Inode) -> bool:
        assert self._layers.upper
        for name in ("upper", "origin"):
            try:
                handle = handles.parse(inode.attributes.get(name, b""))
            except (handles.Malformed, handles.FromTheFuture):
                continue
            if handle.is_readable and not handle.leads_to(self._layers.upper, self._layers.upper.fd):
                return True
        return False

    def _entry(self, place: Place) -> Iterator[Finding]:
        inode = self._layers.inode(place)
        assert inode
        handle = self._handle(place)
        if handle is None:
            yield finding("index-stray", place, "", SetAside(place, "it is no entry of the index"))
        elif not handle.is_readable:
            return
        elif inode.is_whiteout:
            self._note_removed(place, handle)
        elif inode.is_directory:
            yield from self._directory(place, inode, handle)
        else:
            yield from self._file(place, inode, handle)

    def _handle(self, place: Place) -> handles.Handle | None:
        try:
            raw = bytes.fromhex(place.name.decode("ascii"))
            handle = handles.parse(raw)
        except (ValueError, handles.Malformed):
            return None
        except handles.FromTheFuture:
            raise UnknownAttribute(f"{self._layers.show(place)} is of a later version; use a newer fsck") from None
        return handle if handle.raw.hex().encode() == place.name else None

    def _note_removed(self, place: Place, handle: handles.Handle) -> None:
        try:
            lower = handle.status(self._layers.filesystems)
        except handles.CannotDecode:
            self._seen.can_decode = False
            return
        if lower:
            self._removed[_identity(lower)] = place

    def _file(self, place: Place, inode: Inode, handle: handles.Handle) -> Iterator[Finding]:
        try:
            lower = handle.status(self._layers.filesystems)
        except handles.CannotDecode:
            self._seen.can_decode = False
            return
        if lower is None:
            yield finding("index-stale", place, "", SetAside(place, "no lower layer has the file that it is for"))
            return
        if stat.S_IFMT(lower.st_mode) != stat.S_IFMT(inode.status.st_mode):
            yield finding("index-type", place, "", SetAside(place, "the lower file that it is for is of another type"))
            return
        if inode.attributes.get("origin") != handle.raw:
            yield finding("index-origin", place, "", SetAttribute(place, "origin", handle.raw))
        yield from self._nlink(place, inode, lower)

    def _nlink(self, place: Place, inode: Inode, lower: os.stat_result) -> Iterator[Finding]:
        """ "U+k" or "L+k": the names in the overlay are k more than the links of the upper or of the lower inode.

        The kernel looks at it only where the lower inode has several links. At least the names in the upper are there,
        at most all names of the lower inode beside them.
        """
        if lower.st_nlink < 2:
            return
        links = inode.status.st_nlink
        match = _NLINK.fullmatch(inode.attributes.get("nlink", b""))
        if match:
            names = (links if match[1] == b"U" else lower.st_nlink) + int(match[2])
            if links - 1 <= names <= lower.st_nlink + links - 1:
                return
        names = links - 1 + _shown(self._layers, self._lookup, {_identity(lower)}).total()
        value = b"U%+d" % (names - links)
        said = inode.attributes.get("nlink")
        detail = f"it says {os.fsdecode(said)!r}" if said is not None else "it is missing"
        yield finding("index-nlink", place, detail, SetAttribute(place, "nlink", value))

    def _directory(self, place: Place, inode: Inode, name: handles.Handle) -> Iterator[Finding]:
        """A handle that has become stale is no fault: the next mount with nfs_export takes such an entry away."""
        self._seen.features.add("nfs_export")
        assert self._layers.upper
        status = None
        try:
            status = handles.parse(inode.attributes.get("upper", b"")).status([self._layers.upper])
            if status is None:
                return
        except handles.Malformed:
            pass
        except handles.FromTheFuture:
            raise UnknownAttribute(f"{self._layers.show(place)} is of a later version; use a newer fsck") from None
        except handles.CannotDecode:
            self._seen.can_decode = False
            return
        right = self._seen.directories_by_origin.get(name.raw)
        if right is None:
            yield finding("index-directory", place, "", SetAside(place, "it leads to no directory of the upper"))
            return
        found = self._layers.inode(right)
        assert found
        if status and os.path.samestat(status, found.status):
            return
        value = handles.of_directory(self._layers.upper, self._layers.directory(right), of_upper=True)
        assert value
        detail = f"it is for {self._layers.show(right)}"
        yield finding("index-directory", place, detail, SetAttribute(place, "upper", value))


def _shown(layers: Layers, lookup: Lookup, wanted: Container[_Identity]) -> Counter[_Identity]:
    """How many names of the overlay show each of some inodes of lower layers: files that were not copied up, and the
    topmost lower of a directory."""
    found: Counter[_Identity] = Counter()
    pending: list[Stack] = [lookup.roots(UPPER)]
    while pending:
        stack = pending.pop()
        for name in {name for place in stack for name in layers.names(place)}:
            child = lookup.child(stack, name)
            if child.is_directory:
                pending.append(child.stack)
            lowers = [place for place in child.stack[: None if child.is_directory else 1] if place.layer != UPPER]
            inode = layers.inode(lowers[0]) if lowers else None
            if inode and _identity(inode.status) in wanted:
                found[_identity(inode.status)] += 1
    return found


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino
