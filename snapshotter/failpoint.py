"""Named points in the code that tests make fail, stall or kill the process.

DEDUP_FAILPOINTS="commit.before-transaction=kill;remove.after-transaction=stall:2" arms them at start;
without the variable `hit` is one dictionary look-up. Actions: `kill` (SIGKILL to ourselves), `error`
(raises OSError EIO), `enospc`, `stall:SECONDS`. An armed name that is not in NAMES is refused, so that
a test cannot silently test nothing.
"""

from __future__ import annotations

import errno
import os
import signal
import time

NAMES = frozenset({
    "prepare.after-directory",
    "prepare.after-transaction",
    "prepare.mounted",
    "mount.made-mountpoint",
    "mount.before-mount",
    "mount.mounted",
    "mount.detached",
    "commit.frozen",
    "commit.refused",
    "commit.before-transaction",
    "commit.after-transaction",
    "trial.mounted",
    "copy.made",
    "copy.committed",
    "copy.released",
    "seal.unmounted",
    "seal.copied",
    "seal.exchanged",
    "seal.moved-work",
    "seal.moved-tree",
    "seal.stripped",
    "seal.done",
    "remove.after-transaction",
    "remove.detached",
    "remove.after-rename",
    "delete.entry",
    "meta.before-batch",
})  # fmt: skip


def _parse(text: str) -> dict[str, str]:
    armed = dict(item.split("=", 1) for item in text.split(";") if item)
    if unknown := armed.keys() - NAMES:
        raise ValueError(f"unknown failpoint {', '.join(sorted(unknown))}")
    return armed


_armed = _parse(os.environ.get("DEDUP_FAILPOINTS", ""))


def hit(name: str) -> None:
    """Does what the environment asks for at this point; nothing, normally."""
    action = _armed.get(name)
    if action is None:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "error":
        raise OSError(errno.EIO, f"failpoint {name}")
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action.startswith("stall:"):
        time.sleep(float(action.removeprefix("stall:")))
    else:
        raise ValueError(f"failpoint {name}: unknown action {action!r}")
