"""Changes to directories that survive a power cut, and the removal of untrusted trees.

What makes a thing durable: a file's data and inode by fsync of the file, its name by fsync of the
directory (fsync(2)). Symlinks, devices and fifos cannot be opened for that: their names become durable with their
directory, their owners, times and attributes only with all that was changed before (`sync_names`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

from snapshotter import failpoint, linux, mountinfo
from snapshotter.failpoint import Sync

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_NESTING = 128

FULL = "full"
METADATA = "metadata"
NONE = "none"
"""What of a layer is durable when Commit answers (config.Config.durability): all; names and attributes; nothing."""


class Stopped(Exception):
    """A long operation was asked to stop and did, between two steps."""


def sync(fd: int, name: Sync | None = None) -> None:
    """fsync(2). Under its `name` a test leaves it out (failpoint.py); those of repairs have none."""
    if name is None or not failpoint.is_left_out(name):
        os.fsync(fd)


def start_writeback(fd: int, name: Sync) -> None:
    """Of a file that `sync` is called for later, under the same name."""
    if not failpoint.is_left_out(name):
        linux.sync_file_range_start(fd)


def sync_filesystem(fd: int, name: Sync) -> None:
    """syncfs(2): all that is dirty in the filesystem of an open file, other people's included."""
    if not failpoint.is_left_out(name):
        linux.syncfs(fd)


def sync_directory(path: Path, name: Sync | None = None) -> None:
    """Makes the names in a directory durable. `name`: as for `sync`."""
    fd = os.open(path, _DIRECTORY)
    try:
        sync(fd, name)
    finally:
        os.close(fd)


def keeps_order(directory: Path) -> bool:
    """Whether the filesystem makes changes of names and attributes durable in the order in which they were made: those
    that write them to a journal do."""
    filesystem = mountinfo.filesystem_of(directory)
    if filesystem != "ext4":
        return filesystem == "xfs"
    status = os.stat(directory)
    device = Path(f"/sys/dev/block/{os.major(status.st_dev)}:{os.minor(status.st_dev)}").resolve().name
    try:
        return Path("/sys/fs/ext4", device, "journal_task").read_text().strip() != "<none>"
    except OSError:
        return False


def sync_names(directory: Path, in_order: bool, name: Sync) -> None:
    """Makes durable every name and attribute that was changed up to now on the filesystem of a directory of ours.

    `in_order`: they become durable before a last change, to the directory's times, does (`keeps_order`), so that is
    synced. Otherwise it is the whole filesystem, the contents of files included.
    """
    fd = os.open(directory, _DIRECTORY)
    try:
        if in_order:
            os.utime(fd)
            sync(fd, name)
        else:
            sync_filesystem(fd, name)
    finally:
        os.close(fd)


def remove_tree(directory: Path, name: str, stopping: Callable[[], bool]) -> None:
    """Removes `directory`/`name` and all below it; that it is gone already is no error.

    Works relative to descriptors, follows no symlink and enters no mount, clears the immutable and append-only
    flags that a container may have left, and holds few descriptors however deep the tree is: what lies
    deeper than that is moved up into `directory` first. Raises Stopped when `stopping()` says so,
    leaving a smaller tree that can be removed later, and OSError: EXDEV where something is mounted in the tree.
    """
    top = os.open(directory, _DIRECTORY)
    try:
        work = [name]
        while work:
            _remove(top, work.pop(), [top], work, stopping)
    finally:
        os.close(top)


def _remove(parent: int, name: str, open_fds: list[int], deeper: list[str], stopping: Callable[[], bool]) -> None:
    try:
        fd = linux.open_beneath(parent, name, _DIRECTORY)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.EXDEV:
            # A bind of a directory below this one may have brought it here (mount_namespaces(7), peer groups).
            raise OSError(errno.EXDEV, "something is mounted there; unmount it first", name) from error
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        _unlocked(parent, name, partial(os.unlink, name, dir_fd=parent))
        return
    open_fds.append(fd)
    try:
        with os.scandir(fd) as entries:
            children = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for child, is_directory in children:
            if stopping():
                raise Stopped(name)
            failpoint.hit("delete.entry")
            if not is_directory:
                _unlocked(fd, child, partial(os.unlink, child, dir_fd=fd))
            elif len(open_fds) < _MAX_NESTING:
                _remove(fd, child, open_fds, deeper, stopping)
            else:
                moved = f"{os.fstat(fd).st_ino}.{len(deeper)}.deep"
                move = partial(os.rename, child, moved, src_dir_fd=fd, dst_dir_fd=open_fds[0])
                _unlocked(fd, child, move)
                deeper.append(moved)
    finally:
        open_fds.pop()
        os.close(fd)
    _unlocked(parent, name, partial(os.rmdir, name, dir_fd=parent))


def _unlocked(parent: int, name: str, act: Callable[[], None]) -> None:
    """Does `act` on an entry; where inode flags forbid it (EPERM), clears them and tries again."""
    try:
        act()
    except FileNotFoundError:
        return
    except PermissionError:
        _clear_flags(parent)
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
            try:
                _clear_flags(fd)
            finally:
                os.close(fd)
        act()


def _clear_flags(fd: int) -> None:
    flags = linux.get_inode_flags(fd)
    locked = linux.FS_IMMUTABLE_FL | linux.FS_APPEND_FL
    if flags & locked:
        linux.set_inode_flags(fd, flags & ~locked)
