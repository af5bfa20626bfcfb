"""Taking a root down: what the daemon mounted there stays mounted when it stops, and its mountpoints are immutable."""

from __future__ import annotations

from pathlib import Path

from snapshotter import linux
from snapshotter.durable import remove_tree
from tests.rig.namespace import mounts_below


def unmount_below(directory: Path) -> None:
    """Detaches every mount at or below `directory`, the ones on top first."""
    for target in reversed(mounts_below(directory)):
        linux.umount2(target, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)


def tear_down(directory: Path) -> None:
    """Unmounts all there is at and below `directory` and removes it, immutable directories too."""
    unmount_below(directory)
    remove_tree(directory.parent, directory.name, lambda: False)
