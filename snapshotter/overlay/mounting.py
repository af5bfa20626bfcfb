"""Mounting an overlay with the system calls themselves.

mount(2) while the options fit its page; else the mount API, which takes the layers one by one:
"lowerdir+" and "datadir+" since Linux 6.7 (Documentation/filesystems/overlayfs.rst).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from snapshotter import linux


@dataclass(frozen=True, slots=True)
class Overlay:
    """One overlay to be mounted. `switches` are options by their kernel names: "on", "off", or None for a flag."""

    lowers: tuple[Path, ...]
    upper: Path | None = None
    work: Path | None = None
    data: Path | None = None
    """A data-only layer below all others."""
    switches: Mapping[str, str | None] = field(default_factory=dict)

    def option_text(self) -> str:
        """The options for mount(2)."""
        lowers = ":".join(map(str, self.lowers)) + (f"::{self.data}" if self.data else "")
        return ",".join(
            [f"lowerdir={lowers}"]
            + ([f"upperdir={self.upper}", f"workdir={self.work}"] if self.upper else [])
            + [name if value is None else f"{name}={value}" for name, value in self.switches.items()]
        )

    def fits_page(self) -> bool:
        """Whether mount(2) takes the options whole."""
        return len(os.fsencode(self.option_text())) < linux.MOUNT_DATA_BYTES

    def fits_strings(self) -> bool:
        """Whether fsconfig(2) takes each path."""
        paths = [path for path in (*self.lowers, self.upper, self.work, self.data) if path]
        return all(len(os.fsencode(path)) <= linux.FSCONFIG_STRING_BYTES for path in paths)


def mount(overlay: Overlay, target: Path, source: str) -> None:
    """Mounts at `target`; without an upper it is read-only. Raises OSError with what the kernel said."""
    if overlay.fits_page():
        flags = 0 if overlay.upper else linux.MS_RDONLY
        linux.mount(source, str(target), "overlay", flags, overlay.option_text())
        return
    fs_fd = linux.fsopen("overlay")
    try:
        _configure(fs_fd, overlay, source)
        mount_fd = linux.fsmount(fs_fd, 0 if overlay.upper else linux.MOUNT_ATTR_RDONLY)
        try:
            linux.move_mount(mount_fd, str(target))
        finally:
            os.close(mount_fd)
    except OSError as error:
        said = "; ".join(linux.filesystem_messages(fs_fd))
        raise OSError(error.errno, f"{error.strerror} ({said})" if said else error.strerror, str(target)) from error
    finally:
        os.close(fs_fd)


def has_lowerdir_plus(directory: Path) -> bool:
    """Whether this kernel takes layers one by one. Mounts nothing."""
    try:
        fs_fd = linux.fsopen("overlay")
    except OSError:
        return False
    try:
        linux.fsconfig(fs_fd, linux.FSCONFIG_SET_STRING, "lowerdir+", str(directory))
    except OSError:
        return False
    finally:
        os.close(fs_fd)
    return True


def _configure(fs_fd: int, overlay: Overlay, source: str) -> None:
    _set(fs_fd, "source", source)
    for lower in overlay.lowers:
        _set(fs_fd, "lowerdir+", str(lower))
    if overlay.data:
        _set(fs_fd, "datadir+", str(overlay.data))
    if overlay.upper:
        _set(fs_fd, "upperdir", str(overlay.upper))
        _set(fs_fd, "workdir", str(overlay.work))
    else:
        linux.fsconfig(fs_fd, linux.FSCONFIG_SET_FLAG, "ro")
    for name, value in overlay.switches.items():
        if value is None:
            linux.fsconfig(fs_fd, linux.FSCONFIG_SET_FLAG, name)
        else:
            _set(fs_fd, name, value)
    linux.fsconfig(fs_fd, linux.FSCONFIG_CMD_CREATE)


def _set(fs_fd: int, key: str, value: str) -> None:
    linux.fsconfig(fs_fd, linux.FSCONFIG_SET_STRING, key, value)
