"""The values that the layers of the program hand each other. Frozen, no I/O.

The words are containerd's: a snapshot is active (writable), a view (read-only) or committed; the
*key* names an active snapshot or a view, the *name* a committed one, in one name space.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass, field
from typing import NewType

SnapshotId = NewType("SnapshotId", int)
"""Names a snapshot's directories: a small integer, never used again."""

MAX_KEY_BYTES = 64 * 1024
MAX_LABELS_BYTES = 64 * 1024
"""All keys and values of one snapshot's labels together, in UTF-8."""

MAX_CHAIN = 499
"""Most layers in one chain, the snapshot itself included: overlayfs takes 500 lower layers
(fs/overlayfs/params.h, OVL_MAX_STACK), one of which stays free for the object layer."""


class Kind(enum.IntEnum):
    """The numbers are containerd's, on the wire and in our metadata."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


@dataclass(frozen=True, slots=True)
class Info:
    """What containerd may know of a snapshot. Times are nanoseconds since the epoch."""

    name: str
    parent: str
    """The parent's name, empty without one."""
    kind: Kind
    created_ns: int
    updated_ns: int
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a snapshot itself takes, its ancestors not included."""

    size_bytes: int
    """Allocated, not apparent."""
    inodes: int


NO_USAGE = Usage(0, 0)


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount for the client to make: arguments of mount(2), options as in fstab(5)."""

    type: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Creation:
    """What Prepare and View are asked for."""

    kind: Kind
    key: str
    parent: str
    """Empty for none."""
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class Commitment:
    """What Commit is asked for."""

    name: str
    key: str
    parent: str
    """For a snapshot that was prepared without one; else empty, or the one that it has."""
    labels: dict[str, str]


def allocated_bytes(status: os.stat_result) -> int:
    """Of one inode; the unit of st_blocks is 512 bytes, whatever the filesystem's block size (stat(2))."""
    return status.st_blocks * 512


@dataclass(frozen=True, slots=True)
class Extent:
    """What something takes of the filesystem, each inode once."""

    size_bytes: int
    """Allocated, not apparent."""
    inodes: int

    @classmethod
    def of(cls, status: os.stat_result) -> Extent:
        """Of one inode."""
        return cls(allocated_bytes(status), 1)

    def __add__(self, other: Extent) -> Extent:
        return Extent(self.size_bytes + other.size_bytes, self.inodes + other.inodes)

    def __sub__(self, other: Extent) -> Extent:
        return Extent(self.size_bytes - other.size_bytes, self.inodes - other.inodes)


NO_EXTENT = Extent(0, 0)


@dataclass(frozen=True, slots=True)
class SnapshotSpace:
    """What one snapshot takes, its ancestors not included."""

    name: str
    kind: Kind
    strategy: str
    """How its files are stored once: "stub", "hardlink" or "off". Empty for actives and views."""
    apparent_bytes: int
    """The sizes of its files, each inode once."""
    allocated: Extent
    """Its own tree, and every object that it uses."""
    shared: Extent
    """The part of `allocated` that other layers use too."""
    exclusive: Extent
    """What removing it frees."""
    private: dict[str, int]
    """Why files stayed private: the number of files for each reason."""


@dataclass(frozen=True, slots=True)
class Space:
    """What the store and each snapshot took at one time."""

    as_of_ns: int
    """When the pass over the store began, in nanoseconds since the epoch."""
    took_ns: int
    snapshots: tuple[SnapshotSpace, ...]
    apparent_bytes: int
    allocated: Extent
    """Of the whole store, each object once."""
    unshared: Extent
    """What it would take if nothing were shared."""
    objects: Extent
    """The objects alone."""
    filesystem_inodes: int
    """0 where the filesystem has no limit (btrfs)."""
    filesystem_inodes_free: int
    filesystem_bytes: int
    filesystem_bytes_free: int
    private: dict[str, int]
    """As in SnapshotSpace, of all layers."""


@dataclass(frozen=True, slots=True)
class Freed:
    """What a collection freed, or would free."""

    objects: Extent
    """Objects that no layer uses."""
    trees: int
    """Trees that were removed before, and were still to be deleted."""
