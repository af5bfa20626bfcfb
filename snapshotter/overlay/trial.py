"""Whether an overlay anywhere, in any mount namespace, has a tree as its upper."""

from __future__ import annotations

import errno
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from snapshotter import failpoint, linux
from snapshotter.errors import NO_SPACE
from snapshotter.overlay.mounting import Overlay, mount
from snapshotter.overlay.probe import Probe


def trial_switches(probe: Probe) -> dict[str, str | None] | None:
    """What to try with on this kernel; None if it cannot tell. Volatile where it can be, or the trial's unmount
    would sync the whole filesystem."""
    if not probe.has("index"):
        return None
    volatile: dict[str, str | None] = {"volatile": None} if probe.has("volatile") else {}
    return {"index": "on", **volatile}


_covering = threading.Lock()


def is_upper_in_use(tree: Path, scratch: Path, switches: Mapping[str, str | None], memory: Path | None = None) -> bool:
    """Asks the kernel by mounting `tree` as a lower with index=on, which it refuses (EBUSY) while some overlay has
    it as upper, be it mounted, detached or only bound.

    `scratch` is a directory on the same filesystem; where that is full, a tmpfs covers the directory `memory`,
    if there is one, meanwhile. Raises OSError.
    """
    try:
        return _try(tree, scratch, switches)
    except OSError as error:
        if memory is None or error.errno not in NO_SPACE:
            raise
    with _covering:
        linux.mount("tmpfs", str(memory), "tmpfs", 0, "size=1m")
        try:
            return _try(tree, memory, switches)
        finally:
            linux.umount2(str(memory), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)


def _try(tree: Path, scratch: Path, switches: Mapping[str, str | None]) -> bool:
    place = Path(tempfile.mkdtemp(prefix="trial.", dir=scratch))
    try:
        upper, work, merged = (place / name for name in ("u", "w", "m"))
        for made in (upper, work, merged):
            made.mkdir()
        try:
            mount(Overlay((tree,), upper, work, switches=switches), merged, "trial")
        except OSError as error:
            if error.errno == errno.EBUSY:
                return True
            raise
        # Left behind by a kill here, the mount is taken away by the next start (root.claim).
        failpoint.hit("trial.mounted")
        linux.umount2(str(merged))
        return False
    finally:
        shutil.rmtree(place)
