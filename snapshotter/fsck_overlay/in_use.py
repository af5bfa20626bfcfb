"""Whether a mounted overlay has a layer, in any mount namespace."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from snapshotter import linux
from snapshotter.errors import FailedPrecondition
from snapshotter.fsck_overlay.layers import UPPER, WORK, Layers
from snapshotter.overlay.trial import is_upper_in_use

_WRITERS = {"upperdir", "workdir"}
_FREE, _BUSY, _UNKNOWN = 0, 1, 2


@dataclass(frozen=True, slots=True)
class _Use:
    role: str
    """The mount option that names the directory."""
    pid: int
    mountpoint: str


def refuse_if_mounted(layers: Layers) -> frozenset[int]:
    """Raises FailedPrecondition where an overlay has the upper or the work directory, or a lower as its upper. Returns
    the lowers that are lowers elsewhere: they may be read, and not changed."""
    used = frozenset(_from_mount_tables(layers))
    if _trial(layers) == _BUSY:
        raise FailedPrecondition(
            "the overlay is mounted in some mount namespace, or one of its lowers is the upper of one"
        )
    return used


def _from_mount_tables(layers: Layers) -> Iterator[int]:
    numbers = {}
    for layer in (layers.upper, layers.work, *layers.lowers, *layers.data):
        if layer:
            status = os.fstat(layer.fd)
            numbers[status.st_dev, status.st_ino] = layer.number
    for use, path in _overlay_directories():
        try:
            status = os.stat(path)
        except OSError:
            continue
        number = numbers.get((status.st_dev, status.st_ino))
        if number is None:
            continue
        if number in (UPPER, WORK) or use.role in _WRITERS:
            raise FailedPrecondition(
                f"{layers[number].path} belongs to the overlay mounted at {use.mountpoint} (as process {use.pid} sees "
                "it): unmount it first"
            )
        yield number


def _overlay_directories() -> Iterator[tuple[_Use, str]]:
    """The directories of all mounted overlays, one process for each mount namespace; by paths through that process."""
    seen = set()
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with suppress(OSError):
            namespace = os.readlink(f"/proc/{name}/ns/mnt")
            if namespace not in seen:
                seen.add(namespace)
                text = Path(f"/proc/{name}/mountinfo").read_text(errors="surrogateescape")
                for line in text.splitlines():
                    yield from _directories(line, int(name))


def _directories(line: str, pid: int) -> Iterator[tuple[_Use, str]]:
    """Of one line of mountinfo (proc_pid_mountinfo(5)). A relative path says nothing."""
    before, _, after = line.partition(" - ")
    filesystem, _, options = after.split(" ", 2)
    if filesystem != "overlay":
        return
    for option in options.split(","):
        role, _, value = option.partition("=")
        if role not in {"lowerdir", "lowerdir+", "datadir+", *_WRITERS}:
            continue
        use = _Use(role, pid, _octal(before.split(" ")[4]))
        parts = re.findall(r"(?:\\.|[^\\:])+", _octal(value)) if role == "lowerdir" else [_octal(value)]
        for part in parts:
            path = re.sub(r"\\(.)", r"\1", part)
            if path.startswith("/"):
                yield use, f"/proc/{pid}/root{path}"


def _octal(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _trial(layers: Layers) -> int:
    """Asks the kernel, in a process with mounts of its own, so that none is left behind however it ends."""
    tried = [layer.path for layer in (layers.upper, *layers.lowers) if layer]
    scratch = tempfile.mkdtemp(prefix="fsck.overlay.")
    try:
        pid = os.fork()
        if pid == 0:
            answer = _UNKNOWN
            try:
                answer = _BUSY if _is_any_in_use(tried, Path(scratch)) else _FREE
            finally:
                os._exit(answer)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.rmdir(scratch)


def _is_any_in_use(trees: list[str], scratch: Path) -> bool:
    try:
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount("", "/", None, linux.MS_REC | linux.MS_PRIVATE, None)
        linux.mount("tmpfs", str(scratch), "tmpfs", 0, "mode=700")
    except OSError:
        return False  # without the right to mount nothing can be asked
    bound = scratch / "tree"  # its path has nothing that would have to be escaped in mount options
    bound.mkdir()
    for tree in trees:
        with suppress(OSError):
            linux.mount(tree, str(bound), None, linux.MS_BIND, None)
            try:
                if is_upper_in_use(bound, scratch, {"index": "on"}):
                    return True
            finally:
                linux.umount2(str(bound), linux.MNT_DETACH)
    return False
