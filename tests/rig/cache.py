"""What takes a network, kept in the checkout's `.cache/` between runs, and made once if several processes want it."""

from __future__ import annotations

import fcntl
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.rig.namespace import CHECKOUT


def kept(kind: str, identity: Sequence[str], fill: Callable[[Path], object]) -> Path:
    """The directory .cache/KIND/<digest of the identity>, which `fill` fills if it is not there."""
    above = CHECKOUT / ".cache" / kind
    directory = above / hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    above.mkdir(parents=True, exist_ok=True)
    with (above / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.is_dir():
            with tempfile.TemporaryDirectory(dir=above, prefix="partial-") as partial:
                target = Path(partial, "complete")
                target.mkdir()
                fill(target)
                target.rename(directory)
    return directory
