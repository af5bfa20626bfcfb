"""A filesystem on a disk whose power can be cut.

The disk is a file on an XFS, behind a loop device. A cut is a clone of that file at an instant (FICLONE; XFS lets no
write in between), so it holds what was submitted to the disk by then: everything, and nothing later. What a real disk
might still lose of that, since it was never flushed, is there; a sync that is left out altogether shows.

    with outer(base) as directory, Disk("ext4", directory, base / "disk") as disk:
        ...                                 # something writes below disk.mountpoint
        image = disk.cut()
        disk.unplug()
        with disk.plugged(image): ...       # the same place, as it recovers from the cut
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from snapshotter import linux
from tests.rig.filesystem import attach, detach, filesystem, make

_OUTER_BYTES = 20 << 30
_DISK_BYTES = 600 << 20
_OPTIONS = {"xfs": ("nouuid",)}


@contextmanager
def outer(base: Path) -> Iterator[Path]:
    """A directory in which files can be cloned."""
    directory = base / "outer"
    directory.mkdir()
    with filesystem("xfs", directory, _OUTER_BYTES) as mountpoint:
        yield mountpoint


class Disk:
    """Mounted between __enter__ and `unplug`, which __exit__ does too."""

    def __init__(self, kind: str, directory: Path, mountpoint: Path) -> None:
        """`directory` is on an XFS; `mountpoint` is made."""
        self.mountpoint = mountpoint
        self._kind = kind
        self._directory = directory
        self._image = directory / f"{kind}.disk"
        self._count = 0
        self._plugged: Path | None = None

    def __enter__(self) -> Self:
        self.mountpoint.mkdir()
        self._image.touch()
        os.truncate(self._image, _DISK_BYTES)
        make(self._kind, self._image)
        self._plug(self._image)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.unplug()
        self.mountpoint.rmdir()

    def cut(self) -> Path:
        """What is on the disk now, as an image."""
        self._count += 1
        image = self._directory / f"{self._kind}.{self._count}"
        with self._image.open("rb") as source, image.open("xb") as target:
            fcntl.ioctl(target, linux.FICLONE, source.fileno())
        return image

    def unplug(self) -> None:
        """Unmounts it, with all that is mounted on it. Nothing where that was done."""
        if self._plugged:
            detach(self._kind, self._plugged, self.mountpoint)
            self._plugged = None

    @contextmanager
    def plugged(self, image: Path) -> Iterator[None]:
        """What was cut, mounted in the place of the original, and removed at the end."""
        self._plug(image)
        try:
            yield
        finally:
            self.unplug()
            image.unlink()

    def _plug(self, image: Path) -> None:
        attach(self._kind, image, self.mountpoint, *_OPTIONS.get(self._kind, ()))
        self._plugged = image
