"""Where a root or a socket may be: on which filesystem, and below which directories. Looks, and changes nothing."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from snapshotter import linux, mountinfo
from snapshotter.errors import FailedPrecondition, PermissionDenied

_NETWORK = ("9p", "afs", "ceph", "cifs", "lustre", "nfs", "nfs4", "smb3")
_UNFIT = {
    "overlay": "is an overlay itself, and nothing can be written to an overlay on top of it",
    "tmpfs": "is in memory, so that committed snapshots would be gone after a reboot",
    **dict.fromkeys(_NETWORK, "is a network filesystem, which no overlay can write to and which other hosts change"),
}
_DT_UNKNOWN = 0  # <dirent.h>


def check_filesystem(path: Path) -> None:
    """Raises FailedPrecondition if `path`, which need not exist, is on a filesystem that cannot hold a root."""
    directory = nearest(path)
    if reason := _unfitness(mountinfo.filesystem_of(directory), directory):
        raise FailedPrecondition(f"root {path} cannot be there: {reason}; choose one on ext4, XFS or btrfs")


def _unfitness(filesystem: str, directory: Path) -> str | None:
    if filesystem in _UNFIT:
        return f"the {filesystem} {_UNFIT[filesystem]}"
    if os.statvfs(directory).f_flag & os.ST_RDONLY:
        return f"the {filesystem} is mounted read-only"
    if linux.type_of_first_entry(str(directory)) == _DT_UNKNOWN:
        return f"the {filesystem} does not tell the types of directory entries (d_type), which overlay needs"
    if not _has_trusted_attributes(directory):
        return f"the {filesystem} has no trusted.* extended attributes, which overlay needs"
    return None


def _has_trusted_attributes(directory: Path) -> bool:
    try:
        os.getxattr(directory, "trusted.overlay.opaque")
    except OSError as error:
        return error.errno != errno.EOPNOTSUPP
    return True


def check_ancestors(path: Path) -> None:
    """Raises PermissionDenied if another user could put something else in the place of `path`: whoever may write to
    a directory above it can rename what is in there, unless that has the sticky bit."""
    for directory in dict.fromkeys((*nearest(path.parent).resolve().parents, nearest(path.parent).resolve())):
        status = directory.stat()
        writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
        if status.st_uid not in (0, os.geteuid()) or writable:
            raise PermissionDenied(
                f"{path} is not safe: another user may change {directory}, which belongs to uid {status.st_uid} and "
                f"has mode {stat.S_IMODE(status.st_mode):04o}; choose another place, or make it root's and writable "
                "for nobody else"
            )


def nearest(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    while not path.exists():
        path = path.parent
    return path
