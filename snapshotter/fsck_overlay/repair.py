"""The steps that mend a finding. Nothing that could be the only copy of something is removed: it is moved to lost+found
in the work directory. Directories keep their times."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress

from snapshotter import linux
from snapshotter.fsck_overlay.findings import (
    AddWhiteout,
    Consent,
    DropAttribute,
    Finding,
    RemoveWhiteout,
    SetAside,
    SetAttribute,
    Step,
)
from snapshotter.fsck_overlay.layers import WORK, Layers, Place
from snapshotter.overlay.attributes import by_name, copy_attributes

_LOST_AND_FOUND = Place(WORK, b"lost+found")


def can_mend(layers: Layers, finding: Finding, locked: Collection[int]) -> bool:
    """`locked`: layers that a mounted overlay uses."""
    if finding.kind.consent is Consent.NONE or not finding.steps:
        return False
    numbers = {step.place.layer for step in finding.steps}
    return all(layers[number].is_writable and number not in locked for number in numbers)


def mend(layers: Layers, findings: Sequence[Finding]) -> None:
    """Takes all steps; what was done is on disk at the end, however it ends. Raises OSError."""
    try:
        for finding in findings:
            for step in finding.steps:
                _take(layers, step)
    finally:
        layers.forget()
        for number in {step.place.layer for finding in findings for step in finding.steps}:
            linux.syncfs(layers[number].fd)


def _take(layers: Layers, step: Step) -> None:
    match step:
        case DropAttribute(place, name):
            path, whole = _attribute(layers, place, name)
            os.removexattr(path, whole, follow_symlinks=not place.path)
        case SetAttribute(place, name, value):
            path, whole = _attribute(layers, place, name)
            os.setxattr(path, whole, value, follow_symlinks=not place.path)
        case RemoveWhiteout(place):
            with _times_kept(layers.directory(place.parent())) as fd:
                os.unlink(place.name, dir_fd=fd)
        case AddWhiteout(place, parents):
            _make_parents(layers, place, parents)
            with _times_kept(layers.directory(place.parent())) as fd, suppress(FileExistsError):
                os.mknod(place.name, stat.S_IFCHR, 0, dir_fd=fd)
        case SetAside(place, why):
            _set_aside(layers, place, why)


def _attribute(layers: Layers, place: Place, name: str) -> tuple[bytes, str]:
    """A path for the xattr calls, and the whole name."""
    layer = layers[place.layer]
    path = by_name(layers.directory(place.parent()), place.name) if place.path else b"/proc/self/fd/%d" % layer.fd
    return path, layer.names.prefix + name


@contextmanager
def _times_kept(fd: int) -> Iterator[int]:
    """What was not renamed or removed through the overlay does not show there."""
    status = os.fstat(fd)
    yield fd
    os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))


def _make_parents(layers: Layers, place: Place, shown: Sequence[Place]) -> None:
    """The directories above `place`, as a copy-up makes them: each like what shows at its place."""
    names = place.path.split(b"/")[:-1]
    at = Place(place.layer, b"")
    for name, source in zip(names, shown, strict=False):
        parent, at = at, at.child(name)
        if source.layer == place.layer:
            continue
        source_fd = layers.directory(source)
        status = os.fstat(source_fd)
        with suppress(FileExistsError), _times_kept(layers.directory(parent)) as fd:
            os.mkdir(name, 0o700, dir_fd=fd)
        fd = layers.directory(at)
        os.fchown(fd, status.st_uid, status.st_gid)
        copy_attributes(source_fd, fd, layers[source.layer].names)
        os.fchmod(fd, stat.S_IMODE(status.st_mode))
        os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))


def _set_aside(layers: Layers, place: Place, why: str) -> None:
    """As lost+found/N, with a note in lost+found/N.note."""
    work_fd = layers[WORK].fd
    with suppress(FileExistsError):
        os.mkdir(_LOST_AND_FOUND.path, 0o700, dir_fd=work_fd)
    target_fd = layers.directory(_LOST_AND_FOUND)
    number = 1 + max((int(name) for name in os.listdir(target_fd) if name.isdecimal()), default=0)
    note_fd = os.open(f"{number}.note", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=target_fd)
    with open(note_fd, "w") as note:
        note.write(f"{layers.show(place)}: {why}\n")
    with _times_kept(layers.directory(place.parent())) as fd:
        os.rename(place.name, str(number), src_dir_fd=fd, dst_dir_fd=target_fd)
