"""The directories behind an overlay, read entry by entry without following a symlink."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from snapshotter import linux
from snapshotter.errors import FailedPrecondition, quote
from snapshotter.overlay.attributes import Names, by_name, list_attributes
from snapshotter.walker import OPEN_DIRECTORY

UPPER = 0
WORK = -1
_CACHED = 768
"""Open directories: more than the 500 layers that one overlay can have."""
_RECENT = 64
_NOT_THERE = {errno.ELOOP, errno.ENAMETOOLONG}
_NO_ATTRIBUTES = {errno.ENOTSUP, errno.ENODATA}


class Place(NamedTuple):
    """One name in one layer."""

    layer: int
    path: bytes
    """Below the layer's root; empty for the root itself."""

    def child(self, name: bytes) -> Place:
        return Place(self.layer, self.path + b"/" + name if self.path else name)

    def parent(self) -> Place:
        return Place(self.layer, self.path.rpartition(b"/")[0])

    @property
    def name(self) -> bytes:
        return self.path.rpartition(b"/")[2]


@dataclass(frozen=True, slots=True)
class Layer:
    number: int
    """UPPER, WORK, or 1 for the topmost lower and so on downwards; data-only layers come last."""
    path: str
    fd: int
    names: Names
    uuid: bytes | None
    """Of its filesystem; None where the kernel does not tell (before Linux 6.9)."""
    is_data_only: bool
    is_writable: bool


@dataclass(frozen=True, slots=True)
class Inode:
    """What a name is. Attributes have no prefix."""

    status: os.stat_result
    attributes: dict[str, bytes]

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.status.st_mode)

    @property
    def is_whiteout(self) -> bool:
        if stat.S_ISCHR(self.status.st_mode):
            return self.status.st_rdev == 0
        return self.is_attribute_whiteout

    @property
    def is_attribute_whiteout(self) -> bool:
        """The kind that Linux 6.8 brought: an empty file."""
        return "whiteout" in self.attributes and self.is_file and self.status.st_size == 0

    @property
    def is_opaque(self) -> bool:
        return self.is_directory and self.attributes.get("opaque", b"")[:1] == b"y"

    @property
    def is_metacopy(self) -> bool:
        return self.is_file and "metacopy" in self.attributes


class UnknownAttribute(FailedPrecondition):
    """An attribute of overlay's that we do not know."""


@dataclass(slots=True)
class Layers:
    """All of one overlay. `lowers` in their order; `data` are the data-only ones."""

    upper: Layer | None
    work: Layer | None
    lowers: tuple[Layer, ...]
    data: tuple[Layer, ...]
    _open: OrderedDict[Place, int] = field(default_factory=OrderedDict)
    _recent: dict[Place, Inode | None] = field(default_factory=dict)
    """The checks of one name ask for the same few inodes."""

    def __getitem__(self, number: int) -> Layer:
        found = self.upper if number == UPPER else self.work if number == WORK else self._lower(number)
        assert found
        return found

    def _lower(self, number: int) -> Layer:
        return self.lowers[number - 1] if number <= len(self.lowers) else self.data[number - 1 - len(self.lowers)]

    @property
    def stacked(self) -> Sequence[Layer]:
        """Those that are merged, from the top down."""
        return (self.upper, *self.lowers) if self.upper else self.lowers

    def show(self, place: Place) -> str:
        """For messages."""
        return quote(os.fsdecode(os.path.join(os.fsencode(self[place.layer].path), place.path).rstrip(b"/")), 1000)

    def directory(self, place: Place) -> int:
        """A descriptor of a directory, ours and valid until some hundred others were asked for. Raises OSError."""
        missing = []
        at = place
        while at.path and at not in self._open:
            missing.append(at)
            at = at.parent()
        fd = self._open[at] if at.path else self[at.layer].fd
        for below in reversed(missing):
            fd = os.open(below.name, OPEN_DIRECTORY, dir_fd=fd)
            self._open[below] = fd
        if place.path:
            self._open.move_to_end(place)
        while len(self._open) > _CACHED:
            os.close(self._open.popitem(last=False)[1])
        return fd

    @property
    def filesystems(self) -> Sequence[Layer]:
        """One lower layer for each filesystem."""
        return list({os.fstat(layer.fd).st_dev: layer for layer in (*self.lowers, *self.data)}.values())

    def forget(self) -> None:
        """Closes what `directory` opened: after a repair, names may be other inodes."""
        self._recent.clear()
        while self._open:
            os.close(self._open.popitem()[1])

    def inode(self, place: Place) -> Inode | None:
        """What is there; None for nothing. Raises OSError, and UnknownAttribute."""
        if place not in self._recent:
            if len(self._recent) >= _RECENT:
                self._recent.clear()
            self._recent[place] = self._look(place)
        return self._recent[place]

    def _look(self, place: Place) -> Inode | None:
        if not place.path:
            status = os.fstat(self[place.layer].fd)
            return Inode(status, self._attributes(place, self[place.layer].fd, status))
        try:
            fd = self.directory(place.parent())
            status = os.stat(place.name, dir_fd=fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise
        return Inode(status, self._attributes(place, by_name(fd, place.name), status))

    def _attributes(self, place: Place, inode: int | bytes, status: os.stat_result) -> dict[str, bytes]:
        """overlay's attributes of an open file, or of a path. Raises UnknownAttribute for one that we do not know."""
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
            return {}
        names = self[place.layer].names
        found = {}
        for name in _list(inode):
            if not name.startswith(names.prefix):
                continue
            if names.is_untrusted(name):
                raise UnknownAttribute(
                    f"{self.show(place)} has the attribute {name}, which this version does not know: it may come "
                    "from a newer kernel; nothing was changed"
                )
            if name in names.dead or name in names.living:
                found[name.removeprefix(names.prefix)] = (
                    os.getxattr(inode, name)
                    if isinstance(inode, int)
                    else os.getxattr(inode, name, follow_symlinks=False)
                )
        return found

    def names(self, place: Place) -> list[bytes]:
        """What is in a directory. Raises OSError."""
        with os.scandir(self.directory(place)) as entries:
            return [os.fsencode(entry.name) for entry in entries]


def _list(inode: int | bytes) -> list[str]:
    try:
        return list_attributes(inode)
    except OSError as error:
        if error.errno in _NO_ATTRIBUTES:
            return []
        raise


@contextmanager
def opened(
    lowers: Sequence[str], data: Sequence[str], upper: str | None, work: str | None, names: Names
) -> Iterator[Layers]:
    """Opens the layers. Raises FailedPrecondition for what cannot be one."""
    _raise_descriptor_limit()
    fds: list[int] = []

    def layer(number: int, path: str, is_data_only: bool = False) -> Layer:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise FailedPrecondition(f"cannot open the directory {quote(path)}: {error.strerror}") from error
        fds.append(fd)
        is_writable = not os.fstatvfs(fd).f_flag & os.ST_RDONLY
        return Layer(number, os.path.abspath(path), fd, names, linux.filesystem_uuid(fd), is_data_only, is_writable)

    try:
        layers = Layers(
            layer(UPPER, upper) if upper else None,
            layer(WORK, work) if work else None,
            tuple(layer(number, path) for number, path in enumerate(lowers, 1)),
            tuple(layer(number, path, True) for number, path in enumerate(data, 1 + len(lowers))),
        )
        try:
            _check_places(layers)
            yield layers
        finally:
            layers.forget()
    finally:
        for fd in fds:
            os.close(fd)


def _check_places(layers: Layers) -> None:
    """As mount(2) does (fs/overlayfs/super.c, ovl_get_upper, ovl_get_workdir)."""
    if not layers.upper or not layers.work:
        return
    upper, work = (os.path.realpath(layer.path) for layer in (layers.upper, layers.work))
    if os.path.commonpath([upper, work]) in (upper, work):
        raise FailedPrecondition("the work directory and the upper must not be one within the other")
    if os.fstat(layers.upper.fd).st_dev != os.fstat(layers.work.fd).st_dev:
        raise FailedPrecondition("the work directory and the upper must be on one filesystem")


def _raise_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 4096) if hard != resource.RLIM_INFINITY else 4096
    if soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
