"""One pass over each layer: whiteouts, redirects, impure directories, origins, metacopy files, unknown attributes.

What a lower layer hides or refers to is judged by the layers below it, as for the overlay that it was the upper of.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from snapshotter import linux
from snapshotter.fsck_overlay import handles
from snapshotter.fsck_overlay.findings import (
    AddWhiteout,
    DropAttribute,
    Finding,
    RemoveWhiteout,
    SetAside,
    SetAttribute,
    Step,
    finding,
)
from snapshotter.fsck_overlay.layers import UPPER, Inode, Layers, Place, UnknownAttribute
from snapshotter.fsck_overlay.lookup import Lookup, Stack, is_valid_redirect

_UUID_BYTES = 16
_METACOPY_BYTES = 4
"""struct ovl_metacopy without its digest: version, length, flags, digest algorithm."""


@dataclass(frozen=True, slots=True)
class Redirect:
    """A directory with a redirect that leads somewhere, and what it is merged with."""

    place: Place
    stack: Stack


@dataclass(slots=True)
class Seen:
    """What the passes leave to the checks after them."""

    redirects: list[Redirect] = field(default_factory=list)
    features: set[str] = field(default_factory=set)
    origins_right: int = 0
    """Origins in the upper that lead to what the kernel finds by name."""
    origins_wrong: int = 0
    """Those that lead to nothing, or elsewhere."""
    metacopy_wrong: int = 0
    """Those of metacopy files: somebody else's data would be shown."""
    directories_by_origin: dict[bytes, Place] = field(default_factory=dict)
    """Only where the index has directories."""
    can_decode: bool = True


@dataclass(frozen=True, slots=True)
class IndexUse:
    """How the index next to the upper was used."""

    fd: int | None
    has_directories: bool
    """nfs_export."""


class Pass:
    """Over the layer `number`, and what the layers below it make of it."""

    def __init__(self, layers: Layers, lookup: Lookup, number: int, index: IndexUse, seen: Seen) -> None:
        self._layers = layers
        self._lookup = lookup
        self._number = number
        self._is_upper = number == UPPER
        self._index = index
        self._seen = seen
        self._filesystems = layers.filesystems

    def run(self) -> Iterator[Finding]:
        """Raises OSError, and UnknownAttribute."""
        root = Place(self._number, b"")
        inode = self._layers.inode(root)
        assert inode
        device = inode.status.st_dev
        if self._is_upper and len(inode.attributes.get("uuid", bytes(_UUID_BYTES))) != _UUID_BYTES:
            yield finding("uuid-size", root, "", DropAttribute(root, "uuid"))
        pending = [(root, inode, self._lookup.roots(self._number))]
        while pending:
            place, inode, stack = pending.pop()
            for found in self._directory(place, inode, stack):
                if isinstance(found, Finding):
                    yield found
                elif found[1].status.st_dev == device:
                    pending.append(found)

    def _directory(self, place: Place, inode: Inode, stack: Stack) -> Iterator[Finding | tuple[Place, Inode, Stack]]:
        """Findings in a directory, and the directories in it with what they are merged with."""
        is_impure = is_marked = False
        for name in self._layers.names(place):
            child = place.child(name)
            below = self._layers.inode(child)
            if below is None:
                continue
            if below.is_whiteout:
                findings = list(self._whiteout(child, stack))
                yield from findings
                is_marked |= below.is_attribute_whiteout and not findings
            elif below.is_directory:
                found = self._lookup.child(stack, name)
                yield from self._redirect(child, below, stack, found.stack)
                yield from self._directory_origin(child, below, found.stack)
                is_impure |= len(found.stack) > 1 and (self._index.fd is None or "redirect" not in below.attributes)
                yield child, below, found.stack
            else:
                yield from self._metacopy(child, below, stack)
                findings, is_live = self._origin(child, below, stack)
                yield from findings
                is_impure |= is_live
        if is_marked and inode.attributes.get("opaque", b"") not in (b"x", b"y"):
            yield finding("whiteout-unmarked", place, "", SetAttribute(place, "opaque", b"x"))
        if self._is_upper and is_impure and inode.attributes.get("impure") != b"y":
            yield finding("impure-missing", place, "", SetAttribute(place, "impure", b"y"))

    def _whiteout(self, place: Place, stack: Stack) -> Iterator[Finding]:
        if not self._lookup.child(stack[1:], place.name).stack:
            yield finding("whiteout-orphan", place, "", RemoveWhiteout(place))

    def _redirect(self, place: Place, inode: Inode, stack: Stack, merged: Stack) -> Iterator[Finding]:
        value = inode.attributes.get("redirect")
        if value is None or inode.is_opaque:
            return
        self._seen.features.add("redirect_dir")
        if is_valid_redirect(value.partition(b"\0")[0]) and len(merged) > 1:
            self._seen.redirects.append(Redirect(place, merged))
            return
        kind = "redirect-dangling-merge" if self.would_merge(place, stack) else "redirect-dangling"
        yield finding(kind, place, f"it says {os.fsdecode(value)!r}", *self.without_redirect(place, stack))

    def would_merge(self, place: Place, stack: Stack) -> bool:
        """Whether a directory would be merged by its own name. `stack`: of the directory that it is in."""
        return self._lookup.child(stack[1:], place.name).is_directory

    def without_redirect(self, place: Place, stack: Stack) -> tuple[Step, ...]:
        opaque = (SetAttribute(place, "opaque", b"y"),) if self.would_merge(place, stack) else ()
        return (*opaque, DropAttribute(place, "redirect"))

    def _metacopy(self, place: Place, inode: Inode, stack: Stack) -> Iterator[Finding]:
        if not inode.is_metacopy:
            return
        self._seen.features.add("metacopy")
        value = inode.attributes["metacopy"]
        if value and (len(value) < _METACOPY_BYTES or value[1] != len(value)):
            yield finding("metacopy-value", place, "", SetAttribute(place, "metacopy", b""))
            return
        if value and (value[0] or value[2]):
            raise _of_a_later_version(self._layers, place, "metacopy attribute")
        found = self._lookup.child(stack, place.name)
        if found.lacks_data or found.bad_redirect:
            steps = self._set_aside(place, stack) if self._is_upper else ()
            yield finding("metacopy-no-data", place, "", *steps)
            return
        data = self._layers.inode(found.stack[-1])
        assert data
        if data.status.st_size != inode.status.st_size:
            sizes = f"{inode.status.st_size} bytes, and {data.status.st_size} in {self._layers.show(found.stack[-1])}"
            yield finding("metacopy-size", place, sizes)
        if self._is_upper:
            self._compare_metacopy(inode, found.stack[1])

    def _set_aside(self, place: Place, stack: Stack) -> tuple[Step, ...]:
        """The name must not come to show what a lower layer has under it."""
        aside = SetAside(place, "it has metadata only, and no layer has its data")
        shows = bool(self._lookup.child(stack[1:], place.name).stack)
        return (aside, AddWhiteout(place, ())) if shows else (aside,)

    def _compare_metacopy(self, inode: Inode, lower: Place) -> None:
        try:
            handle = handles.parse(inode.attributes.get("origin", b""))
        except (handles.Malformed, handles.FromTheFuture):
            return
        fd = os.open(
            lower.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._layers.directory(lower.parent())
        )
        try:
            is_right = handle.leads_to(self._layers[lower.layer], fd)
        finally:
            os.close(fd)
        self._count(is_right)
        self._seen.metacopy_wrong += not is_right

    def _count(self, is_right: bool) -> None:
        self._seen.origins_right += is_right
        self._seen.origins_wrong += not is_right

    def _parse_origin(self, place: Place, inode: Inode) -> handles.Handle | Finding | None:
        raw = inode.attributes.get("origin") if self._is_upper else None
        if not raw:
            return None
        try:
            handle = handles.parse(raw)
        except handles.Malformed:
            return finding("origin-invalid", place, "", SetAttribute(place, "origin", b""))
        except handles.FromTheFuture:
            raise _of_a_later_version(self._layers, place, "origin") from None
        return handle if handle.is_readable else None

    def _directory_origin(self, place: Place, inode: Inode, merged: Stack) -> Iterator[Finding]:
        handle = self._parse_origin(place, inode)
        if isinstance(handle, Finding):
            yield handle
        if not isinstance(handle, handles.Handle):
            return
        if self._index.has_directories:
            self._seen.directories_by_origin[handle.raw] = place
        if len(merged) == 1:
            if not inode.is_opaque and self._status(handle) is None:
                self._count(False)
            return
        is_right = any(
            handle.leads_to(self._layers[lower.layer], self._layers.directory(lower)) for lower in merged[1:]
        )
        self._count(is_right)
        if is_right or not self._index.has_directories:
            return
        lower = merged[1]
        right = handles.of_directory(self._layers[lower.layer], self._layers.directory(lower), of_upper=False)
        yield finding("origin-directory", place, "", *((SetAttribute(place, "origin", right),) if right else ()))

    def _origin(self, place: Place, inode: Inode, stack: Stack) -> tuple[list[Finding], bool]:
        """Of what is no directory; and whether its directory has to be impure for it."""
        handle = self._parse_origin(place, inode)
        if isinstance(handle, Finding):
            return [handle], False
        if handle is None:
            return [], False
        status = self._status(handle)
        if status is None:
            self._seen.origins_wrong += self._seen.can_decode and not inode.is_metacopy
            return [], False
        if stat.S_IFMT(status.st_mode) != stat.S_IFMT(inode.status.st_mode):
            return [finding("origin-type", place, "", SetAttribute(place, "origin", b""))], False
        return [], self._makes_impure(place, status, stack)

    def _makes_impure(self, place: Place, origin: os.stat_result, stack: Stack) -> bool:
        """A copy-up marks the directory. A rename or link marks the other one only where the kernel shows the origin's
        inode number (ovl_hash_bylower): where there is an index, that depends on what it was mounted with."""
        if origin.st_nlink > 1:
            return False
        if self._index.fd is None:
            return True
        lower = self._lookup.child(stack[1:], place.name).stack
        inode = self._layers.inode(lower[0]) if lower else None
        return bool(inode and os.path.samestat(inode.status, origin))

    def _status(self, handle: handles.Handle) -> os.stat_result | None:
        try:
            return handle.status(self._filesystems)
        except handles.CannotDecode:
            self._seen.can_decode = False
            return None


def _of_a_later_version(layers: Layers, place: Place, what: str) -> UnknownAttribute:
    return UnknownAttribute(
        f"{layers.show(place)} has a {what} of a later version than this one knows; nothing was changed"
    )


def root_origin_is_wrong(layers: Layers) -> bool:
    """Whether the root of the upper says that it was made on another lower. index=on writes and checks it (ESTALE)."""
    inode = layers.inode(Place(UPPER, b""))
    try:
        handle = handles.parse(inode.attributes.get("origin", b"") if inode else b"")
    except (handles.Malformed, handles.FromTheFuture):
        return False
    try:
        linux.name_to_handle_at(layers.lowers[0].fd)
    except OSError:
        return False
    return handle.is_readable and not handle.leads_to(layers.lowers[0], layers.lowers[0].fd)
