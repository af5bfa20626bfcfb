"""What sealing a layer has to know, set down before the commit point, and what it puts right at the end.

    snapshots/<id>/seal/plan    JSON: the fields of Plan
    snapshots/<id>/seal/<n>     the stage of worker n (files.Stage)

Sharing a file changes the times of the directory that it is in. They are put back at the end; a kill in
between must not lose them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from snapshotter.durable import FULL, NONE, sync, sync_directory
from snapshotter.overlay.features import OF_STUBS, Feature
from snapshotter.walker import OPEN_DIRECTORY, walk_names

_PLAN = "plan"


@dataclass(frozen=True, slots=True)
class Plan:
    strategy: str
    """This, and the next two, as configured at the commit."""
    stub_min_bytes: int
    never_link: tuple[str, ...]
    strip: bool
    """Whether there are attributes of a dead upper."""
    needs: Feature
    """What reading the tree takes as it is."""
    apparent_bytes: int
    """The sizes of its files."""
    mtimes_ns: Mapping[int, int]
    """Of every directory, by its inode."""
    durability: str = FULL
    """As configured at the commit, after which nobody can tell whether the files were synced."""
    run: str = ""
    """Of the daemon that committed it: who goes on after a kill finds the objects that were made (content.objects)."""

    def may_need(self) -> Feature:
        """What reading the tree may take once its files are shared."""
        return self.needs | OF_STUBS if self.strategy == "stub" else self.needs

    def write(self, directory: Path) -> None:
        """Makes the directory, and in it the plan, durably, but for the name of the directory. Raises OSError."""
        directory.mkdir(mode=0o700)
        text = json.dumps(asdict(self))
        fd = os.open(directory / _PLAN, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w") as stream:
            stream.write(text)
            stream.flush()
            if self.durability != NONE:
                sync(fd, "sync.plan")
        if self.durability != NONE:
            sync_directory(directory, "sync.plan-directory")


def read_plan(directory: Path) -> Plan | None:
    """None if there is none, or not all of it, as a power cut leaves one that was not synced. Raises OSError."""
    try:
        found = json.loads((directory / _PLAN).read_text())
    except (FileNotFoundError, ValueError):
        return None
    found["mtimes_ns"] = {int(inode): time_ns for inode, time_ns in found["mtimes_ns"].items()}
    return Plan(**found | {"never_link": tuple(found["never_link"]), "needs": Feature(found["needs"])})


def settle(tree: Path, mtimes_ns: Mapping[int, int], was_interrupted: bool, may_sync: bool) -> None:
    """Puts the directories' times back and, with `may_sync`, makes those durable that sharing changed. Raises OSError.

    After an interruption every directory may have changed. Stubs are durable with the names of their layer
    (durable.sync_names).
    """
    top_fd = os.open(tree, OPEN_DIRECTORY)
    try:
        _settle_one(top_fd, mtimes_ns, was_interrupted, may_sync)
        for found in walk_names(top_fd):
            if found.is_directory:
                fd = os.open(found.name, OPEN_DIRECTORY, dir_fd=found.directory_fd)
                try:
                    _settle_one(fd, mtimes_ns, was_interrupted, may_sync)
                finally:
                    os.close(fd)
    finally:
        os.close(top_fd)


def _settle_one(fd: int, mtimes_ns: Mapping[int, int], was_interrupted: bool, may_sync: bool) -> None:
    status = os.fstat(fd)
    wanted_ns = mtimes_ns.get(status.st_ino, status.st_mtime_ns)
    if wanted_ns != status.st_mtime_ns:
        os.utime(fd, ns=(status.st_atime_ns, wanted_ns))
    elif not was_interrupted:
        return
    if may_sync:
        sync(fd, "sync.shared-directories")
