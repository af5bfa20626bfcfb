"""Engines on roots of their own, for the time of a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snapshotter.config import MountConfig, OverlayConfig
from snapshotter.durable import remove_tree
from snapshotter.engine import Engine
from snapshotter.root import claim
from tests.rig.roots import unmount_below


@contextmanager
def opened(directory: Path, overlay: OverlayConfig | None = None, mount: MountConfig | None = None) -> Iterator[Engine]:
    """An engine on a fresh root, which is gone after the block, with all that is mounted there."""
    root, lock = claim(directory)
    try:
        engine = Engine(root, mount or MountConfig(), overlay or OverlayConfig())
        try:
            yield engine
        finally:
            engine.close()
    finally:
        lock.release()
        unmount_below(directory)
        remove_tree(directory.parent, directory.name, lambda: False)
