"""Mounts what the Mounts call answers: fstab options turned into mount(2) arguments.

The same steps as containerd's mount package (core/mount/mount_linux.go), without its id-mapped,
loop and FUSE mounts, which this daemon never answers.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from snapshotter import errors, linux
from snapshotter.model import Mount

# <sys/mount.h>: what `linux` does not name, since only options from outside ask for it.
_MS_SYNCHRONOUS = 16
_MS_MANDLOCK = 64
_MS_DIRSYNC = 128
_MS_NOATIME = 1024
_MS_NODIRATIME = 2048
_MS_RELATIME = 1 << 21
_MS_STRICTATIME = 1 << 24

_FLAGS = {
    "bind": linux.MS_BIND,
    "dirsync": _MS_DIRSYNC,
    "mand": _MS_MANDLOCK,
    "noatime": _MS_NOATIME,
    "nodev": linux.MS_NODEV,
    "nodiratime": _MS_NODIRATIME,
    "noexec": linux.MS_NOEXEC,
    "nosuid": linux.MS_NOSUID,
    "rbind": linux.MS_BIND | linux.MS_REC,
    "relatime": _MS_RELATIME,
    "remount": linux.MS_REMOUNT,
    "ro": linux.MS_RDONLY,
    "strictatime": _MS_STRICTATIME,
    "sync": _MS_SYNCHRONOUS,
}
_CLEARS = {
    "async": _MS_SYNCHRONOUS,
    "atime": _MS_NOATIME,
    "dev": linux.MS_NODEV,
    "diratime": _MS_NODIRATIME,
    "exec": linux.MS_NOEXEC,
    "nomand": _MS_MANDLOCK,
    "norelatime": _MS_RELATIME,
    "nostrictatime": _MS_STRICTATIME,
    "rw": linux.MS_RDONLY,
    "suid": linux.MS_NOSUID,
}
_REFUSED = ("X-containerd.", "uidmap=", "gidmap=")

_PER_MOUNT = (
    linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC | _MS_NOATIME | _MS_NODIRATIME
)  # fmt: skip
"""Flags of a mount point, not of its filesystem. statvfs(3) shows them as the same numbers."""


@dataclass(frozen=True, slots=True)
class MountArguments:
    """The flags of mount(2) and its data, which the filesystem reads."""

    flags: int
    data: str


def parse_options(options: Sequence[str]) -> MountArguments:
    """Options as in fstab(5): what is no flag is data; of two that contradict each other the last counts.

    Raises: FailedPrecondition for those that need more than mount(2).
    """
    flags = 0
    data = []
    for option in options:
        if option == "loop" or option.startswith(_REFUSED):
            raise errors.FailedPrecondition(f"snapctl cannot mount with the option {errors.quote(option)}")
        if option in _FLAGS:
            flags |= _FLAGS[option]
        elif option in _CLEARS:
            flags &= ~_CLEARS[option]
        elif option != "defaults":
            data.append(option)
    return MountArguments(flags, ",".join(data))


def shorten_lowers(options: Sequence[str]) -> tuple[str, list[str]]:
    """The directory that all lower directories share, and the options relative to it.

    For mounting from inside that directory: the options then need far less of the page that mount(2)
    takes. The directory is empty, and the options are as before, where nothing can be shortened.
    """
    index = next((i for i, option in enumerate(options) if option.startswith("lowerdir=")), -1)
    lowers = split_lowers(options[index].removeprefix("lowerdir=")) if index >= 0 else []
    if not lowers or not all(lower.startswith("/") for lower in lowers):
        return "", list(options)
    common = os.path.commonpath([os.path.dirname(lower) for lower in lowers])
    relative = ":".join(os.path.relpath(lower, common) for lower in lowers)
    return unescape(common), [*options[:index], f"lowerdir={relative}", *options[index + 1 :]]


def split_lowers(value: str) -> list[str]:
    r"""The directories in overlay's `lowerdir=`, escapes kept: a colon in a path is written `\:`."""
    lowers = [""]
    chars = iter(value)
    for char in chars:
        if char == ":":
            lowers.append("")
        else:
            lowers[-1] += char + (next(chars, "") if char == "\\" else "")
    return lowers


def unescape(path: str) -> str:
    """The path that overlay reads out of an option: a backslash stands for the character after it."""
    chars = iter(path)
    return "".join(next(chars, "\\") if char == "\\" else char for char in chars)


def mount_all(mounts: Sequence[Mount], target: str) -> None:
    """Mounts one over the other at the directory `target`; after a failure none of them stays.

    For a single-threaded program: it changes the working directory for a moment.
    """
    target = os.path.realpath(target)
    if not os.path.isdir(target):
        raise errors.NotFound(f'there is no directory {target}; make it with "mkdir -p"')
    done = 0
    try:
        for each in mounts:
            _mount(each, target)
            done += 1
    except BaseException:
        for _ in range(done):
            linux.umount2(target, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        raise


def unmount(target: str, lazy: bool = False) -> None:
    """Unmounts the topmost mount at `target`; `lazy` does not wait until nobody uses it."""
    target = os.path.realpath(target)
    try:
        linux.umount2(target, linux.UMOUNT_NOFOLLOW | (linux.MNT_DETACH if lazy else 0))
    except OSError as error:
        raise _meaning(error, f"cannot unmount {target}", _UNMOUNT_HINTS) from error


def _mount(mount: Mount, target: str) -> None:
    directory, arguments = _fitting_arguments(mount)
    try:
        with _inside(directory):
            linux.mount(mount.source, target, mount.type, arguments.flags, arguments.data or None)
    except OSError as error:
        raise _meaning(error, f"cannot mount at {target}", _MOUNT_HINTS) from error
    if arguments.flags & linux.MS_BIND and arguments.flags & ~(linux.MS_BIND | linux.MS_REC):
        _remount_bind(target, arguments.flags)


def _remount_bind(target: str, flags: int) -> None:
    """mount(2) ignores `ro` and its like when it makes a bind mount; a remount sets them.

    A remount also drops what it does not name, so the flags that came with the source are kept.
    """
    try:
        flags |= os.statvfs(target).f_flag & _PER_MOUNT
        linux.mount("none", target, None, (flags & ~linux.MS_REC) | linux.MS_REMOUNT, None)
    except OSError as error:
        linux.umount2(target, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        raise _meaning(error, f"cannot make the mount at {target} read-only", _MOUNT_HINTS) from error


def _fitting_arguments(mount: Mount) -> tuple[str, MountArguments]:
    """The directory to mount from, empty if any will do, and the arguments.

    Raises: FailedPrecondition for options that mount(2) would silently cut.
    """
    arguments = parse_options(mount.options)
    if _fits(arguments):
        return "", arguments
    directory, options = shorten_lowers(mount.options) if mount.type == "overlay" else ("", mount.options)
    arguments = parse_options(options)
    if not _fits(arguments):
        raise errors.FailedPrecondition(
            f"the mount options take {len(os.fsencode(arguments.data))} bytes, mount(2) takes"
            f" {linux.MOUNT_DATA_BYTES - 1}: the snapshot has too many layers to be mounted this way"
        )
    return directory, arguments


def _fits(arguments: MountArguments) -> bool:
    return len(os.fsencode(arguments.data)) < linux.MOUNT_DATA_BYTES


@contextlib.contextmanager
def _inside(directory: str) -> Iterator[None]:
    """Changes the working directory, and back; does nothing for an empty name."""
    if not directory:
        yield
        return
    before = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.chdir(directory)
        yield
    finally:
        os.fchdir(before)
        os.close(before)


_ROOT_HINT = "run this as root"
_MOUNT_HINTS: dict[int, tuple[type[errors.SnapshotterError], str]] = {
    errno.EPERM: (errors.PermissionDenied, _ROOT_HINT),
    errno.EACCES: (errors.PermissionDenied, _ROOT_HINT),
    errno.ENOENT: (
        errors.FailedPrecondition,
        "a directory of the snapshot is not to be seen from here",
    ),
    errno.EBUSY: (errors.FailedPrecondition, "the snapshot is mounted elsewhere"),
    errno.EINVAL: (errors.FailedPrecondition, "the kernel refuses the mount; its log (dmesg) says why"),
}
_UNMOUNT_HINTS: dict[int, tuple[type[errors.SnapshotterError], str]] = {
    errno.EPERM: (errors.PermissionDenied, _ROOT_HINT),
    errno.EACCES: (errors.PermissionDenied, _ROOT_HINT),
    errno.ENOENT: (errors.NotFound, "it is not there"),
    errno.EINVAL: (errors.FailedPrecondition, "nothing is mounted there"),
    errno.EBUSY: (errors.FailedPrecondition, "it is in use (fuser -m shows by whom); --lazy detaches it now"),
}


def _meaning(
    error: OSError, act: str, hints: dict[int, tuple[type[errors.SnapshotterError], str]]
) -> errors.SnapshotterError:
    if error.errno in hints:
        cls, hint = hints[error.errno]
        return cls(f"{act}: {hint}")
    return errors.from_os_error(act, error)
