"""Overlay mount options for mounts that a client makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from snapshotter.linux import MOUNT_DATA_BYTES
from snapshotter.overlay.features import Feature

_PARAMETERS = Path("/sys/module/overlay/parameters")


def kernel_defaults() -> dict[str, bool]:
    """Which of the switchable features this kernel turns on by itself; a feature it lacks is not in it."""
    found = {}
    for name in ("index", "metacopy", "redirect_dir"):
        try:
            found[name] = (_PARAMETERS / name).read_text().strip() == "Y"
        except FileNotFoundError:
            continue
    return found


def client_options(
    lowers: Sequence[Path],
    upper: Path | None,
    work: Path | None,
    needs: Feature,
    data: Path,
    defaults: Mapping[str, bool],
) -> tuple[str, ...]:
    """Options of an overlay that any client may mount, several at once, and add `redirect_dir=off` to.

    index, metacopy and redirect_dir are off, said aloud only where the kernel's default is on, except
    that a chain whose layers have redirects or metacopy files is unreadable without them. `data` is the data-only
    layer of a chain that has stubs.
    """
    wanted = {
        "index": False,
        "metacopy": Feature.METACOPY in needs,
        "redirect_dir": bool(needs),
    }
    options = [
        f"{name}={'on' if wanted[name] else 'off'}" for name in wanted if wanted[name] != defaults.get(name, False)
    ]
    if upper is not None:
        options += [f"workdir={work}", f"upperdir={upper}"]
    data_only = f"::{data}" if Feature.DATA_ONLY in needs else ""
    options.append("lowerdir=" + ":".join(map(str, lowers)) + data_only)
    return tuple(options)


def fits_page(options: Sequence[str], common: Path) -> bool:
    """Whether mount(2) takes the options once the client has cut `common`/ from the lower directories, as
    containerd's mount package does where they do not fit as they are."""
    data = ",".join(options)
    prefix = f"{common}/"
    if "::" in data:  # an empty path: there is no common directory then
        return len(data.encode()) < MOUNT_DATA_BYTES
    cut = data.count(f"lowerdir={prefix}") + data.count(f":{prefix}")
    return len(data.encode()) - cut * len(prefix.encode()) < MOUNT_DATA_BYTES
