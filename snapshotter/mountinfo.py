"""/proc/self/mountinfo (proc_pid_mountinfo(5)), as far as we ask it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MountPoint:
    path: str
    filesystem: str


def read() -> Iterator[MountPoint]:
    """The mounts of our namespace, in the order they were made."""
    for line in _lines("self"):
        before, _, after = line.partition(" - ")
        yield MountPoint(_unescape(before.split(" ")[4]), after.split(" ")[0])


def options_at(path: Path) -> dict[str, str]:
    """The options of the superblock mounted at `path`, as the kernel shows them: what really is in force.

    Where an option comes several times, as lowerdir+ does, the last one.
    """
    found: dict[str, str] = {}
    for line in _lines("self"):
        before, _, after = line.partition(" - ")
        if _unescape(before.split(" ")[4]) == str(path):
            options = after.split(" ")[2].split(",")
            found = {name: value for name, _, value in (option.partition("=") for option in options)}
    return found


def read_only_uppers() -> Iterator[tuple[str, str]]:
    """Of the overlays of our namespace whose superblock is read-only: where one is mounted, and its upperdir."""
    for line in _lines("self"):
        before, _, after = line.partition(" - ")
        filesystem, _, options = after.split(" ")[:3]
        if filesystem != "overlay" or not options.startswith("ro,"):
            continue
        for option in options.split(","):
            if option.startswith("upperdir="):
                yield _unescape(before.split(" ")[4]), option.removeprefix("upperdir=")


def places_of_upper(upper: Path) -> Iterator[str]:
    """Where in our namespace the whole of the overlay with that upperdir can be reached."""
    needle = f"upperdir={upper}"
    for line in _lines("self"):
        before, _, after = line.partition(" - ")
        filesystem, _, options = after.split(" ")[:3]
        if filesystem == "overlay" and needle in options.split(","):
            device, root, path = before.split(" ")[2:5]
            try:
                status = os.stat(_unescape(path))  # of what is mounted there last
            except OSError:
                continue  # what is mounted above it hides it
            if root == "/" and device == f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}":
                yield _unescape(path)


def processes_with_upper(upper: Path) -> list[int]:
    """Processes in whose mount namespace an overlay uses `upper`; one a namespace. Reads all of /proc: for
    an error message, not for every day."""
    needle = f"upperdir={upper},"
    seen: dict[str, int] = {}
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            namespace = os.readlink(f"/proc/{name}/ns/mnt")
            if namespace not in seen and any(needle in line for line in _lines(name)):
                seen[namespace] = int(name)
        except OSError:
            continue  # ended meanwhile
    return sorted(seen.values())


def lines_everywhere() -> Iterator[str]:
    """The lines of every mount namespace that a process is in. Reads all of /proc."""
    seen: set[str] = set()
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            namespace = os.readlink(f"/proc/{name}/ns/mnt")
            if namespace not in seen:
                seen.add(namespace)
                yield from _lines(name)
        except OSError:
            continue  # ended meanwhile


def namespace_reach() -> str:
    """How far our mounts reach: "host" (we are in the mount namespace of PID 1), "propagated" (in another one,
    from which mounts propagate there), "private"."""
    ours, theirs = _lines("self"), _lines("1")
    # A mount's id is its own in the whole system; /proc/1/ns may be closed even to root.
    if {line.split(" ")[0] for line in ours} & {line.split(" ")[0] for line in theirs}:
        return "host"
    sent = {group for line in ours for group in _peer_groups(line, ("shared",))}
    received = {group for line in theirs for group in _peer_groups(line, ("shared", "master"))}
    return "propagated" if sent & received else "private"


def _peer_groups(line: str, kinds: tuple[str, ...]) -> Iterator[str]:
    for field in line.partition(" - ")[0].split(" ")[6:]:
        kind, _, group = field.partition(":")
        if kind in kinds:
            yield group


def _lines(process: str) -> list[str]:
    return Path(f"/proc/{process}/mountinfo").read_text(errors="surrogateescape").splitlines()


def filesystem_of(path: Path) -> str:
    """The type of the filesystem that holds `path`, such as "ext4"."""
    real = path.resolve()
    found = ""
    longest = -1
    for mount in read():
        # The last of several mounts on one point is the visible one.
        if real.is_relative_to(mount.path) and len(mount.path) >= longest:
            found, longest = mount.filesystem, len(mount.path)
    return found


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
