"""Whether an overlay anywhere, in any mount namespace, has a tree as its upper."""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path

from snapshotter import failpoint, linux
from snapshotter.overlay.mounting import Overlay, mount


def is_upper_in_use(tree: Path, scratch: Path) -> bool:
    """Asks the kernel by mounting `tree` as a lower with index=on, which it refuses (EBUSY) while some overlay has
    it as upper, be it mounted, detached or only bound.

    `scratch` is a directory on the same filesystem. Raises OSError.
    """
    place = Path(tempfile.mkdtemp(prefix="trial.", dir=scratch))
    try:
        upper, work, merged = (place / name for name in ("u", "w", "m"))
        for made in (upper, work, merged):
            made.mkdir()
        try:
            # Volatile, or its unmount would sync the whole filesystem.
            mount(Overlay((tree,), upper, work, switches={"index": "on", "volatile": None}), merged, "trial")
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
