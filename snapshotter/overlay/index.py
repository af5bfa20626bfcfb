"""The index of an upper (work/index), as far as hard links go.

With index=on the kernel copies up a hard-linked file of the lowers once, into the index, and links the
names under which it is used from there. A name that nobody has used since is still in the lowers only,
and finds the new content through the index alone: drop the index, and the name has the old content.

    work/index/<hex of the origin's file handle>    the inode, with trusted.overlay.nlink = "U+k" or "L+k":
                                                    links in the merged view = st_nlink + k (U: of this inode)

Source: fs/overlayfs/namei.c (ovl_get_index_name), util.c (ovl_get_nlink), overlayfs.h (struct ovl_fb).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from snapshotter import linux
from snapshotter.overlay.attributes import by_name
from snapshotter.walker import OPEN_DIRECTORY, Entry, walk

_NLINK = "trusted.overlay.nlink"
_COMPLETE = b"U-1"
"""Every name of the merged view is a link of the upper inode, which has the index's name beside."""

_MAGIC = 0xFB
_HEADER_BYTES = 21
"""struct ovl_fb: version, magic, length, flags, type (a byte each), a uuid of 16 bytes; then the handle."""


@dataclass(frozen=True, slots=True)
class _Indexed:
    names: int
    """How many names of it the upper has."""


def complete(merged: Path, index: Path) -> None:
    """Brings every name of an indexed hard link into the upper, through the mount. Raises OSError."""
    wanted = _incomplete(index)
    if not wanted:
        return
    fd = os.open(merged, OPEN_DIRECTORY)
    try:
        for entry in walk(fd):
            if entry.status.st_ino in wanted and not entry.is_directory:
                _copy_up(entry)
    finally:
        os.close(fd)


def is_complete(merged: Path, index: Path) -> bool:
    """Whether the index may go without any name of the merged view changing. True only lasts while frozen."""
    wanted = _incomplete(index)
    if not wanted:
        return True
    names = dict.fromkeys(wanted, 0)
    fd = os.open(merged, OPEN_DIRECTORY)
    try:
        for entry in walk(fd):
            if entry.status.st_ino in names and not entry.is_directory:
                names[entry.status.st_ino] += 1
    finally:
        os.close(fd)
    return all(names[inode] == indexed.names for inode, indexed in wanted.items())


def _incomplete(index: Path) -> dict[int, _Indexed]:
    """Inode numbers (of the origins, which the merged view shows) whose names may not all be in the upper."""
    try:
        entries = list(os.scandir(index))
    except FileNotFoundError:
        return {}
    found = {}
    mount_fd = os.open(index, OPEN_DIRECTORY)
    try:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode) or _is_whiteout(status) or _nlink(entry.path) == _COMPLETE:
                continue
            inode = _origin_inode(mount_fd, entry.name)
            if inode is not None:
                found[inode] = _Indexed(status.st_nlink - 1)
    finally:
        os.close(mount_fd)
    return found


def _is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _nlink(path: str) -> bytes:
    try:
        return os.getxattr(path, _NLINK, follow_symlinks=False)
    except OSError:
        return b""


def _origin_inode(mount_fd: int, name: str) -> int | None:
    """The inode number of the lower file behind an index entry; None for what is no entry, or has no origin."""
    try:
        raw = bytes.fromhex(name)
    except ValueError:
        return None
    if len(raw) <= _HEADER_BYTES or raw[1] != _MAGIC:
        return None
    try:
        fd = linux.open_by_handle_at(mount_fd, raw[4], raw[_HEADER_BYTES:], os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def _copy_up(entry: Entry) -> None:
    """Links the index's inode under this name into the upper, and changes nothing but its ctime.

    chown(-1, -1) copies up and sets no attribute, but the kernel takes set-user-id, set-group-id and
    capabilities away with it (chown(2)): where there are any, the times are set to what they are.
    """
    directory, name, status = entry.directory_fd, entry.name, entry.status
    try:
        attributes = os.listxattr(by_name(directory, name), follow_symlinks=False)
        if status.st_mode & 0o6000 or "security.capability" in attributes:
            times = (status.st_atime_ns, status.st_mtime_ns)
            os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)
        else:
            os.chown(name, -1, -1, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return
