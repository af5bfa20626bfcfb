"""Blocks that the metadata has before it needs them, so that what frees space works on a disk without any.

LMDB writes pages in place or behind the last one. So blocks are allocated to data.mdb some way beyond its end, which
stays where it is (fallocate(2), FALLOC_FL_KEEP_SIZE): neither LMDB nor a copy of the file sees them. Whatever was a
hole (in a copy that cp made sparse, say) is filled on the way.

btrfs writes every page to another place and gives a file nothing ahead. There a file of its own, `reserve`, has
the space, and loses it when it is needed; the next to take it might be somebody else.
"""

from __future__ import annotations

import os
from pathlib import Path

from snapshotter import linux, mountinfo
from snapshotter.errors import NO_SPACE

_GOAL_BYTES = 8 << 20
ENOUGH_BYTES = 4 << 20
"""More than that needs no care."""
LEAST_BYTES = 2 << 20
"""What only freeing space may use. One such transaction takes a few dozen pages, and the next but one reuses them."""

_COPIES_ON_WRITE = frozenset({"btrfs"})


class Reserve:
    """The reserve of one environment. For one thread at a time. Changes nothing before the first `top_up`."""

    def __init__(self, data: Path) -> None:
        in_place = mountinfo.filesystem_of(data.parent) not in _COPIES_ON_WRITE
        self._in_place = in_place
        self._path = data if in_place else data.with_name("reserve")
        self._end_bytes = 0
        """Below this there are no holes."""

    def top_up(self, used_bytes: int) -> int:
        """How much there is beyond the `used_bytes` of the metadata, after trying to have enough. Raises OSError,
        but not for want of space."""
        begin_bytes = used_bytes if self._in_place else 0
        for goal_bytes in (_GOAL_BYTES, ENOUGH_BYTES, LEAST_BYTES):
            if self._end_bytes < begin_bytes + min(goal_bytes, ENOUGH_BYTES):
                self._allocate(begin_bytes + goal_bytes)
        return max(0, self._end_bytes - begin_bytes)

    def spend(self) -> bool:
        """Makes room for a write that found none; False if there is nothing to give."""
        if self._in_place or not self._end_bytes:
            return False
        os.truncate(self._path, 0)
        self._end_bytes = 0
        return True

    def _allocate(self, end_bytes: int) -> None:
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | (0 if self._in_place else os.O_CREAT), 0o600)
            try:
                linux.fallocate_keep_size(fd, self._end_bytes, end_bytes - self._end_bytes)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
        else:
            self._end_bytes = end_bytes
