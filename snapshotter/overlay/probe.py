"""What overlayfs on this kernel can do in one filesystem, found by trying it.

A kernel's version says little: distributions backport, filesystems differ, user namespaces forbid.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from snapshotter import linux, mountinfo
from snapshotter.overlay.attributes import TRUSTED
from snapshotter.overlay.idmapped import try_idmapped_layer
from snapshotter.overlay.mounting import Overlay, has_lowerdir_plus, mount

SWITCHES = ("index", "metacopy", "redirect_dir", "xino", "nfs_export", "volatile", "userxattr")


@dataclass(frozen=True, slots=True)
class Probe:
    """Each feature: None if it works, else why not, in the kernel's words."""

    missing: dict[str, str | None]

    def has(self, feature: str) -> bool:
        return self.missing[feature] is None


def probe(directory: Path) -> Probe:
    """Tries each feature in a fresh directory below `directory`, and leaves nothing. Raises OSError if even a
    plain overlay cannot be mounted there."""
    with _scratch(directory) as scratch:
        try_switches(scratch, {})
        missing = {
            "index": _failure(lambda: try_switches(scratch, {"index": "on"})),
            "redirect_dir": _failure(lambda: try_switches(scratch, {"redirect_dir": "on"})),
            "metacopy": _failure(lambda: try_switches(scratch, {"redirect_dir": "on", "metacopy": "on"})),
            "xino": _failure(lambda: try_switches(scratch, {"xino": "on"})),
            "nfs_export": _failure(lambda: try_switches(scratch, {"index": "on", "nfs_export": "on"})),
            "volatile": _failure(lambda: try_switches(scratch, {"volatile": None})),
            "userxattr": _failure(lambda: try_switches(scratch, {"userxattr": None})),
            "lowerdir_plus": None if has_lowerdir_plus(scratch) else "unknown to this kernel",
            "data_only": _failure(lambda: _try_data_only(scratch)),
            "reflink": _failure(lambda: _try_reflink(scratch)),
            "idmapped": _failure(lambda: _try_idmapped(scratch)),
        }
    return Probe(missing)


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    scratch = Path(tempfile.mkdtemp(prefix="probe.", dir=directory))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)


def _failure(attempt: Callable[[], None]) -> str | None:
    try:
        attempt()
    except OSError as error:
        return error.strerror or str(error)
    return None


def try_switches(scratch: Path, switches: Mapping[str, str | None]) -> None:
    """Mounts an overlay with these options in a fresh directory below `scratch`, and checks that the kernel did
    not silently fall back from what should be on. Raises OSError."""
    with _scratch(scratch) as place:
        lower, upper, work, merged = (place / name for name in ("l", "u", "w", "m"))
        for made in (lower, upper, work, merged):
            made.mkdir()
        mount(Overlay((lower,), upper, work, switches=switches), merged, "probe")
        try:
            in_force = mountinfo.options_at(merged)
        finally:
            linux.umount2(str(merged))
    for name, value in switches.items():
        if value == "on" and name != "xino" and in_force.get(name) != "on":
            raise OSError(errno.EOPNOTSUPP, f"the kernel falls back to {name}={in_force.get(name, 'off')}")


def _try_data_only(scratch: Path) -> None:
    """A stub of the kind that layers will hold must read as the file it redirects to."""
    with _scratch(scratch) as place:
        lower, other, data, merged = (place / name for name in ("l", "o", "d", "m"))
        for made in (lower, other, data, merged):
            made.mkdir()
        (data / "object").write_bytes(b"content")
        stub = lower / "file"
        stub.touch()
        os.truncate(stub, len(b"content"))
        os.setxattr(stub, TRUSTED.metacopy, b"")
        os.setxattr(stub, TRUSTED.redirect, b"/object")
        switches: dict[str, str | None] = {"metacopy": "on", "redirect_dir": "on"}
        mount(Overlay((lower, other), data=data, switches=switches), merged, "probe")
        try:
            if (merged / "file").read_bytes() != b"content":
                raise OSError(0, "a stub does not read as its object")
        finally:
            linux.umount2(str(merged))


def _try_reflink(scratch: Path) -> None:
    with (scratch / "a").open("wb+") as source, (scratch / "b").open("wb") as copy:
        source.write(b"x" * 8192)
        source.flush()
        fcntl.ioctl(copy.fileno(), linux.FICLONE, source.fileno())


def _try_idmapped(scratch: Path) -> None:
    with _scratch(scratch) as place:
        try_idmapped_layer(place)
