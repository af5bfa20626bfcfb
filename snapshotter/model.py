"""The values that the layers of the program hand each other. Frozen, no I/O.

The words are containerd's: a snapshot is active (writable), a view (read-only) or committed; the
*key* names an active snapshot or a view, the *name* a committed one, in one name space.
"""

from __future__ import annotations

import enum
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
