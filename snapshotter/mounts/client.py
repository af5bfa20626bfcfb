"""Mounts that the client makes itself.

active snapshot on a parent    overlay; containerd writes an extraction snapshot's layer straight into
                               upperdir and never mounts it
view of several layers         overlay without upperdir
nothing to overlay             bind of the one directory there is
"""

from __future__ import annotations

from snapshotter.errors import FailedPrecondition, quote
from snapshotter.model import Mount
from snapshotter.mounts import Target
from snapshotter.overlay import options
from snapshotter.overlay.features import Feature
from snapshotter.root import Root


class ClientMounts:
    """Describes mounts; makes none."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._defaults = options.kernel_defaults()

    def describe(self, target: Target) -> tuple[Mount, ...]:
        """Raises FailedPrecondition when the chain's options do not fit into the page of mount(2)."""
        root = self._root
        if not target.chain.ids:
            return (bind(str(root.fs(target.id)), target.writable),)
        lowers = [root.fs(layer) for layer in target.chain.ids]
        if not target.writable and len(lowers) == 1 and Feature.DATA_ONLY not in target.chain.features:
            return (bind(str(lowers[0]), target.writable),)
        text = options.client_options(
            lowers,
            root.fs(target.id) if target.writable else None,
            root.work(target.id) if target.writable else None,
            # Who unpacks a layer reads only directories below it, and so needs no objects.
            target.chain.features & ~Feature.DATA_ONLY if target.is_extraction else target.chain.features,
            root.objects,
            self._defaults,
        )
        if not target.is_extraction and not options.fits_page(text, root.snapshots):
            raise FailedPrecondition(
                f"snapshot {quote(target.key)} stands on {len(lowers)} layers, whose mount options do not fit into "
                "the 4 KiB that mount(2) takes; flatten the image or let the daemon mount (mount.mode)"
            )
        return (Mount("overlay", "overlay", text),)


def bind(source: str, writable: bool) -> Mount:
    return Mount("bind", source, ("rbind", "rw" if writable else "ro"))
