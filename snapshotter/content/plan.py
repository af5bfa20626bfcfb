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

from snapshotter import mountinfo
from snapshotter.durable import sync, sync_directory, sync_filesystem
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

    def may_need(self) -> Feature:
        """What reading the tree may take once its files are shared."""
        return self.needs | OF_STUBS if self.strategy == "stub" else self.needs

    def write(self, directory: Path) -> None:
        """Makes the directory, and in it the plan, durably. Raises OSError."""
        directory.mkdir(mode=0o700)
        text = json.dumps(asdict(self))
        fd = os.open(directory / _PLAN, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w") as stream:
            stream.write(text)
            stream.flush()
            sync(fd, "sync.plan")
        sync_directory(directory, "sync.plan-directory")
        sync_directory(directory.parent, "sync.plan-directory")


def read_plan(directory: Path) -> Plan | None:
    """None if there is none. Raises OSError."""
    try:
        found = json.loads((directory / _PLAN).read_text())
    except FileNotFoundError:
        return None
    found["mtimes_ns"] = {int(inode): time_ns for inode, time_ns in found["mtimes_ns"].items()}
    return Plan(**found | {"never_link": tuple(found["never_link"]), "needs": Feature(found["needs"])})


def keeps_order(directory: Path) -> bool:
    """Whether the filesystem makes changes of names and inodes durable in the order in which they were made: those that
    write them to a journal do."""
    filesystem = mountinfo.filesystem_of(directory)
    if filesystem != "ext4":
        return filesystem == "xfs"
    status = os.stat(directory)
    device = Path(f"/sys/dev/block/{os.major(status.st_dev)}:{os.minor(status.st_dev)}").resolve().name
    try:
        return Path("/sys/fs/ext4", device, "journal_task").read_text().strip() != "<none>"
    except OSError:
        return False


def settle(tree: Path, mtimes_ns: Mapping[int, int], was_interrupted: bool, in_order: bool) -> None:
    """Puts the directories' times back and makes durable what sharing changed. Raises OSError.

    `in_order`: syncing a directory whose names changed last makes durable all that was made for it, stubs too
    (`keeps_order`). Else the filesystem is synced as a whole. After an interruption every directory may have changed.
    """
    top_fd = os.open(tree, OPEN_DIRECTORY)
    try:
        _settle_one(top_fd, mtimes_ns, was_interrupted)
        for found in walk_names(top_fd):
            if found.is_directory:
                fd = os.open(found.name, OPEN_DIRECTORY, dir_fd=found.directory_fd)
                try:
                    _settle_one(fd, mtimes_ns, was_interrupted)
                finally:
                    os.close(fd)
        if not in_order:
            sync_filesystem(top_fd, "sync.sealed-barrier")
    finally:
        os.close(top_fd)


def _settle_one(fd: int, mtimes_ns: Mapping[int, int], was_interrupted: bool) -> None:
    status = os.fstat(fd)
    wanted_ns = mtimes_ns.get(status.st_ino, status.st_mtime_ns)
    if wanted_ns != status.st_mtime_ns:
        os.utime(fd, ns=(status.st_atime_ns, wanted_ns))
    elif not was_interrupted:
        return
    sync(fd, "sync.shared-directories")
