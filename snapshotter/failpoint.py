"""Named points in the code that tests make fail, stall or kill the process.

DEDUP_FAILPOINTS="commit.before-transaction=kill;remove.after-transaction=stall:2" arms them at start;
without the variable `hit` is one dictionary look-up. Actions: `kill` (SIGKILL to the daemon and its workers),
`die` (to the one process that is at the point), `error` (raises OSError EIO), `enospc`, `emlink`, `stall:SECONDS`;
with "@3" behind it, only at the third time that a process is there. An armed name that is not in NAMES is
refused, so that a test cannot silently test nothing.

DEDUP_FAILPOINTS="sync.layer-files=skip;sync.stripped=skip" leaves out what durable.py would sync under these
names, in the daemon and its workers: so a test shows that it would notice. The names are SYNCS.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import Literal, get_args

NAMES = frozenset({
    "prepare.after-directory",
    "prepare.after-transaction",
    "prepare.mounted",
    "mount.made-mountpoint",
    "mount.before-mount",
    "mount.mounted",
    "mount.detached",
    "detach.close",
    "commit.frozen",
    "commit.refused",
    "commit.before-transaction",
    "commit.after-transaction",
    "trial.mounted",
    "commit.taking-back",
    "commit.taken-back",
    "copy.made",
    "copy.committed",
    "copy.released",
    "seal.unmounted",
    "seal.copied",
    "seal.exchanged",
    "seal.moved-work",
    "seal.moved-tree",
    "seal.stripped",
    "seal.sharing",
    "share.referred",
    "share.linked",
    "share.made-object",
    "share.before-swap",
    "share.staged",
    "share.half-swapped",
    "share.swapped",
    "seal.shared",
    "seal.settled",
    "seal.done",
    "seal.after-transaction",
    "collect.object",
    "collect.ref",
    "remove.after-transaction",
    "remove.detached",
    "remove.after-rename",
    "delete.entry",
    "meta.before-batch",
    "fsck.step",
})  # fmt: skip

Sync = Literal[
    "sync.root",
    "sync.root-parents",
    "sync.metadata",
    "sync.upper",
    "sync.snapshot",
    "sync.snapshots",
    "sync.layer-files",
    "sync.layer-directories",
    "sync.layer-barrier",
    "sync.plan",
    "sync.plan-directory",
    "sync.copies",
    "sync.new-tree",
    "sync.exchange",
    "sync.stripped",
    "sync.refs",
    "sync.objects",
    "sync.shared-directories",
    "sync.sealed-barrier",
]
"""Every place where something is made durable."""
SYNCS: frozenset[Sync] = frozenset(get_args(Sync))


def _parse(text: str) -> dict[str, str]:
    armed = dict(item.split("=", 1) for item in text.split(";") if item)
    if unknown := armed.keys() - NAMES - SYNCS:
        raise ValueError(f"unknown failpoint {', '.join(sorted(unknown))}")
    if wrong := [name for name, action in armed.items() if (name in SYNCS) != (action == "skip")]:
        raise ValueError(f"failpoint {wrong[0]}: unknown action {armed[wrong[0]]!r}")
    return armed


_armed = _parse(os.environ.get("DEDUP_FAILPOINTS", ""))


_victims: list[int] = []
_hits: dict[str, int] = {}


def also_kill(pid: int) -> None:
    """In a worker process: what kills it takes the daemon along, as a power cut would."""
    _victims.append(pid)


def is_left_out(name: Sync) -> bool:
    """Whether the environment asks for this to be left out; never, normally."""
    return name in _armed


def hit(name: str) -> None:
    """Does what the environment asks for at this point; nothing, normally."""
    action = _armed.get(name)
    if action is None:
        return
    action, _, number = action.partition("@")
    _hits[name] = _hits.get(name, 0) + 1
    if number and _hits[name] != int(number):
        return
    if action == "kill":
        for pid in (*_victims, os.getpid()):
            os.kill(pid, signal.SIGKILL)
    elif action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "error":
        raise OSError(errno.EIO, f"failpoint {name}")
    elif action in ("enospc", "emlink"):
        number = getattr(errno, action.upper())
        raise OSError(number, os.strerror(number))
    elif action.startswith("stall:"):
        time.sleep(float(action.removeprefix("stall:")))
    else:
        raise ValueError(f"failpoint {name}: unknown action {action!r}")
