"""Renamed directories of a layer, and files whose content is in a layer below: is what they stand for there?

Looks paths up as the kernel does (ovl_lookup in fs/overlayfs/namei.c): layer by layer from the top, following the
redirections on the way, stopping at whiteouts, at opaque directories and at what is no directory. Runs in a worker
process, one layer each, for the few layers that need it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from snapshotter.content.stubs import is_stub_ref
from snapshotter.fsck_overlay.lookup import is_valid_redirect
from snapshotter.overlay.attributes import Names, by_name
from snapshotter.walker import OPEN_DIRECTORY, Name, is_cut, walk_names


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
        if not (name.is_directory or name.is_file) or is_cut(name.directory):
            return  # what is deeper than any path can say is not judged
        path = name.directory + name.name
        place = by_name(name.directory_fd, name.name)
        redirect = self._redirect(place)
        is_malformed = redirect is not None and not is_valid_redirect(redirect)
        origin = None if is_malformed else self._origin(name, redirect)
        if name.is_directory:
            is_opaque = _attribute(place, self._names.prefix + "opaque") == b"y"
            self._origins[path] = None if is_opaque else origin
            if redirect is not None and is_malformed and not is_opaque:
                self.found.missing.append((path, redirect))
            elif not is_opaque and origin is not None:
                self._claim(path, origin, redirect)
        elif _attribute(place, self._names.metacopy) is None or _is_object(redirect):
            return
        elif origin is None or not self._has_data(origin):
            self.found.no_data.append(path)

    def _origin(self, name: Name, redirect: bytes | None) -> bytes | None:
        if redirect is not None and redirect.startswith(b"/"):
            return redirect[1:]
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
            if not is_metacopy or _is_object(self._redirect(path)):
                return True
        return False

    def _look_up(self, path: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
        """What the layers have at a path, from the top one down, as far as each one shows."""
        parts: list[bytes] | None = path.split(b"/")
        for tree in self._below:
            if parts is not None:
                parts = yield from self._look_up_in(tree, parts)

    def _look_up_in(
        self, tree: bytes, parts: list[bytes]
    ) -> Generator[tuple[bytes, os.stat_result], None, list[bytes] | None]:
        """Returns what is to be looked up in the layers below; None where they do not show. What it yields is valid
        until the next is asked for."""
        origin, is_hidden = list[bytes](), False
        fd = os.open(tree, OPEN_DIRECTORY)
        try:
            for number, part in enumerate(parts):
                place, is_last = by_name(fd, part), number == len(parts) - 1
                try:
                    status = os.lstat(place)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENAMETOOLONG):
                        raise
                    origin += parts[number:]
                    break
                if stat.S_ISCHR(status.st_mode):
                    return None
                redirect = self._redirect(place)
                if redirect is not None and not is_valid_redirect(redirect):
                    return None
                if redirect is not None and redirect.startswith(b"/"):
                    origin = redirect[1:].split(b"/")
                else:
                    origin.append(redirect or part)
                if is_last:
                    yield place, status
                if not stat.S_ISDIR(status.st_mode):
                    if not is_last or _attribute(place, self._names.metacopy) is None:
                        return None
                    continue
                if _attribute(place, self._names.prefix + "opaque") == b"y":
                    is_hidden = True
                if not is_last:
                    above, fd = fd, os.open(part, OPEN_DIRECTORY, dir_fd=fd)
                    os.close(above)
        finally:
            os.close(fd)
        return None if is_hidden else origin

    def _redirect(self, place: bytes) -> bytes | None:
        """As the kernel reads it: up to a zero byte."""
        value = _attribute(place, self._names.redirect)
        return None if value is None else value.partition(b"\0")[0]


def _is_object(redirect: bytes | None) -> bool:
    """Whether a file's content is in the object store (stubs.py)."""
    parts = os.fsdecode(redirect or b"").split("/")
    return len(parts) == 3 and not parts[0] and is_stub_ref(parts[1] + parts[2])


def _attribute(path: bytes, name: str) -> bytes | None:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return None
