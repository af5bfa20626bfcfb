"""How the kernel finds a name in a stack of layers (fs/overlayfs/namei.c: ovl_lookup, ovl_lookup_layer,
ovl_lookup_single, ovl_check_redirect)."""

from __future__ import annotations

from dataclasses import dataclass

from snapshotter.fsck_overlay.layers import Inode, Layers, Place

Stack = tuple[Place, ...]
"""The directories that are merged into one, from the top down; or a file, and what has its data."""


@dataclass(frozen=True, slots=True)
class Found:
    """`stack` is empty where nothing shows."""

    stack: Stack
    is_directory: bool = False
    lacks_data: bool = False
    """A file whose metadata is found, and whose data is not."""
    bad_redirect: bool = False
    """A redirect on the way is malformed: the kernel answers EINVAL."""


@dataclass(slots=True)
class _Search:
    """struct ovl_lookup_data."""

    name: bytes
    """To be looked for in the next layer: in the parent's directory there, or from its root if it begins with /."""
    stop: bool = False
    is_directory: bool = False
    is_metacopy: bool = False
    bad_redirect: bool = False


def is_valid_redirect(value: bytes) -> bool:
    """One name, or a path from the root of the layers without empty parts."""
    if not value.startswith(b"/"):
        return bool(value) and b"/" not in value
    return all(value[1:].split(b"/"))


class Lookup:
    def __init__(self, layers: Layers) -> None:
        self._layers = layers

    def roots(self, top: int) -> Stack:
        """The root of the overlay that the layers from `top` downwards make."""
        return tuple(Place(layer.number, b"") for layer in self._layers.stacked if layer.number >= top)

    def child(self, parent: Stack, name: bytes) -> Found:
        """What shows under a name of a merged directory. Raises OSError."""
        search = _Search(name)
        found: list[Place] = []
        places = list(parent)
        while places and not search.stop:
            place = places.pop(0)
            here = self._in_layer(place, search)
            if here:
                found.append(here)
            if search.name.startswith(b"/"):
                places = [root for root in self.roots(place.layer + 1) if root.layer > place.layer]
        if search.is_metacopy and search.name.startswith(b"/"):
            self._find_in_data_layers(found, search)
        lacks_data = search.is_metacopy and bool(found)
        return Found(tuple(found), search.is_directory, lacks_data, search.bad_redirect)

    def _in_layer(self, directory: Place, search: _Search) -> Place | None:
        if not search.name.startswith(b"/"):
            return self._one(directory.child(search.name), search, b"", b"")
        parts = search.name[1:].split(b"/")
        at = Place(directory.layer, b"")
        for number, part in enumerate(parts):
            before = b"/" + b"".join(part + b"/" for part in parts[:number])
            after = b"".join(b"/" + part for part in parts[number + 1 :])
            here = self._one(at.child(part), search, before, after)
            if not here:
                return None
            at = here
        return at

    def _one(self, place: Place, search: _Search, before: bytes, after: bytes) -> Place | None:
        """Looks at one name; `before` and `after` are the rest of the path that is looked for."""
        inode = self._layers.inode(place)
        if inode is None:
            return None
        if inode.is_whiteout or (not after and search.is_metacopy and not inode.is_file):
            search.stop = True
            return None
        if not inode.is_directory:
            if search.is_directory or after:
                search.stop = True
                return None
            search.is_metacopy = inode.is_metacopy
            search.stop = not inode.is_metacopy
            if search.stop:
                return place
        else:
            if not after:
                search.is_directory = True
            if inode.is_opaque:
                search.stop = True
                return place
        _follow_redirect(inode, search, before, after)
        return place

    def _find_in_data_layers(self, found: list[Place], search: _Search) -> None:
        for layer in self._layers.data:
            place = Place(layer.number, search.name[1:])
            inode = self._layers.inode(place)
            if inode and inode.is_file:
                found.append(place)
                search.is_metacopy = False
                return


def _follow_redirect(inode: Inode, search: _Search, before: bytes, after: bytes) -> None:
    value = inode.attributes.get("redirect")
    if value is None:
        return
    value = value.partition(b"\0")[0]
    if not is_valid_redirect(value):
        search.stop = search.bad_redirect = True
    elif value.startswith(b"/"):
        search.stop = False  # an opaque directory further up the path does not stop it
        search.name = value + after
    else:
        search.name = before + value + after
