"""Renamed directories of a layer, and files whose content is in a layer below: is what they stand for there?

Looks paths up as the kernel does (ovl_lookup in fs/overlayfs/namei.c): layer by layer from the top, following the
redirections on the way, stopping at whiteouts, at opaque directories and at what is no directory. Runs in a worker
process, one layer each, for the few layers that need it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from snapshotter.fsck.trees import STUB_REF
from snapshotter.overlay.attributes import Names, by_name
from snapshotter.walker import OPEN_DIRECTORY, Name, walk_names


@dataclass(slots=True)
class Unresolved:
    """Paths of the layer."""

    missing: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Renamed directories, and what they stand for."""
    twice: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)
    """Two directories, and what both stand for."""
    no_data: list[bytes] = field(default_factory=list)


def check(tree: Path, below: Sequence[Path], names: Names) -> Unresolved:
    """`below`: the trees of the layers below it, nearest first. Raises OSError."""
    checker = _Checker(below, names)
    fd = os.open(tree, OPEN_DIRECTORY)
    try:
        for name in walk_names(fd):
            checker.visit(name)
    finally:
        os.close(fd)
    return checker.found


class _Checker:
    def __init__(self, below: Sequence[Path], names: Names) -> None:
        self._below = [os.fsencode(tree) for tree in below]
        self._names = names
        self._origins: dict[bytes, bytes | None] = {b"": b""}
        """Of each directory: what path it has in the layers below; None where it hides what is there."""
        self._claims: dict[bytes, bytes] = {}
        self.found = Unresolved()

    def visit(self, name: Name) -> None:
        if not (name.is_directory or name.is_file):
            return
        path = name.directory + name.name
        place = by_name(name.directory_fd, name.name)
        redirect = _attribute(place, self._names.redirect)
        origin = self._origin(name, redirect)
        if name.is_directory:
            is_opaque = _attribute(place, self._names.prefix + "opaque") == b"y"
            self._origins[path] = None if is_opaque else origin
            if not is_opaque and origin is not None:
                self._claim(path, origin, redirect)
        elif _attribute(place, self._names.metacopy) is None or _is_object(redirect):
            return
        elif origin is None or not self._has_data(origin):
            self.found.no_data.append(path)

    def _origin(self, name: Name, redirect: bytes | None) -> bytes | None:
        if redirect is not None and redirect.startswith(b"/"):
            return redirect.strip(b"/")
        above = self._origins.get(name.directory.rstrip(b"/"))
        if above is None:
            return None
        return b"/".join(filter(None, (above, redirect or name.name)))

    def _claim(self, path: bytes, origin: bytes, redirect: bytes | None) -> None:
        first = self._claims.setdefault(origin, path)
        if first != path:
            self.found.twice.append((first, path, origin))
        if redirect is None:
            return
        _, status = next(self._look_up(origin), (b"", None))
        if status is None or not stat.S_ISDIR(status.st_mode):
            self.found.missing.append((path, redirect))

    def _has_data(self, origin: bytes) -> bool:
        for path, status in self._look_up(origin):
            if not stat.S_ISREG(status.st_mode):
                return False
            is_metacopy = _attribute(path, self._names.metacopy) is not None
            if not is_metacopy or _is_object(_attribute(path, self._names.redirect)):
                return True
        return False

    def _look_up(self, path: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
        """What the layers have at a path, from the top one down, as far as each one shows."""
        parts = path.split(b"/")
        for tree in self._below:
            place, origin, is_hidden = tree, list[bytes](), False
            for number, part in enumerate(parts):
                place += b"/" + part
                try:
                    status = os.lstat(place)
                except FileNotFoundError:
                    origin += parts[number:]
                    break
                except NotADirectoryError:
                    return
                if stat.S_ISCHR(status.st_mode):
                    return
                redirect = _attribute(place, self._names.redirect)
                if redirect is not None and redirect.startswith(b"/"):
                    origin = redirect.strip(b"/").split(b"/")
                else:
                    origin.append(redirect or part)
                is_last = number == len(parts) - 1
                if is_last:
                    yield place, status
                if not stat.S_ISDIR(status.st_mode):
                    if not is_last or _attribute(place, self._names.metacopy) is None:
                        return
                elif _attribute(place, self._names.prefix + "opaque") == b"y":
                    is_hidden = True
            if is_hidden:
                return
            parts = origin


def _is_object(redirect: bytes | None) -> bool:
    """Whether a file's content is in the object store (stubs.py)."""
    parts = os.fsdecode(redirect or b"").split("/")
    return len(parts) == 3 and not parts[0] and STUB_REF.fullmatch(parts[1] + parts[2]) is not None


def _attribute(path: bytes, name: str) -> bytes | None:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return None
