"""Holds a store, after a power cut or a kill, against the journal of what was done to it.

    for line in check(host, load, load.journal.at(cut)): ...

Each line is one finding; none means that all is well. `check` leaves nothing but committed snapshots and those active
ones and views that it found.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

from snapshotter.errors import NotFound, SnapshotterError
from snapshotter.model import Info, Kind
from tests.rig.chains import alias_findings, stored
from tests.rig.host import Host
from tests.rig.journal import Expected
from tests.rig.load import LABEL, Layer, Load, Reading, reading
from tests.rig.namespace import mounts_below
from tests.rig.seen import Seen, xattrs_of

_METACOPY, _REDIRECT = "trusted.overlay.metacopy", "trusted.overlay.redirect"
_OBJECT = re.compile(rb"/([0-9a-f]{2})/([0-9a-f]{18}(?:\.[0-9a-f]+)?)")
"""What a stub's redirect looks like; those of renamed files name paths of the image."""
_BLOCK_BYTES = 512


def check(host: Host, load: Load, expected: Expected, was_power_cut: bool) -> list[str]:
    """The daemon has just been started, on what was left."""
    infos, lines = existing(host, expected)
    host.client.cleanup()
    for info in infos.values():
        if info.kind is not Kind.COMMITTED:
            lines += _usable(host, info, was_power_cut)
        elif info.name in load.layers:
            lines += _content(host, info, load.layers[info.name])
    try:
        lines += alias_findings(host.client, host.root, {name: layer.links for name, layer in load.layers.items()})
        host.client.collect()
        lines += [*_leftovers(host.root, infos), *_references(host), *_space(host)]
    except (SnapshotterError, OSError) as error:
        lines.append(f"the store cannot be checked: {error}")
    return lines


def remove_all(host: Host) -> list[str]:
    """And what is then left of it."""
    infos = {info.name: info for info in host.client.list()}
    while infos:
        parents = {info.parent for info in infos.values()}
        for name in infos.keys() - parents:
            host.client.remove(name)
            del infos[name]
    host.client.cleanup()
    places = ("snapshots", "mounts", "objects/??", "trash", "busy", "spool")
    return [f"left when all is removed: {path}" for place in places for path in host.root.glob(f"{place}/*")]


# -- which snapshots there are


def existing(host: Host, expected: Expected) -> tuple[dict[str, Info], list[str]]:
    """All there is, once every commit that was interrupted has been finished; and what is wrong with that."""
    lines = []
    for name in sorted(expected.may):
        try:
            host.client.usage(name)
        except NotFound:
            continue
        except SnapshotterError as error:
            lines.append(f"{name} cannot be finished: {error}")
    infos = {info.name: info for info in host.client.list()}
    return infos, [*lines, *_differences(infos, expected)]


def _differences(infos: Mapping[str, Info], expected: Expected) -> Iterator[str]:
    for name in sorted(expected.must - infos.keys()):
        yield f"{name} is lost"
    for name in sorted(infos.keys() - expected.must - expected.may):
        yield f"{name} is there and was never made, or was removed"
    for key, name in expected.one_of:
        if (key in infos) is (name in infos):
            yield f"{key} and {name}, which it became, are both {'there' if key in infos else 'lost'}"
    for name, info in infos.items():
        label = info.labels.get(LABEL, "")
        if label not in expected.labels.get(name, {""}):
            yield f"{name} is labelled {label!r}, not {sorted(expected.labels.get(name, {''}))}"


# -- what is in them


def _content(host: Host, info: Info, layer: Layer) -> list[str]:
    name = info.name
    if info.parent != layer.parent:
        return [f"the parent of {name} is {info.parent!r}, not {layer.parent!r}"]
    try:
        with host.viewed(name) as merged:
            found = reading(merged)
    except (SnapshotterError, OSError, AssertionError) as error:
        return [f"{name} cannot be read: {error!r}"]
    return [f"{name}: {line}" for line in differences(layer.reads, found)]


def differences(expected: Reading, found: Reading) -> list[str]:
    """One line for each path and field."""
    lines = []
    for path in sorted(expected.keys() | found.keys()):
        one, other = expected.get(path), found.get(path)
        if one is None or other is None:
            lines.append(f"{path!r} is {'missing' if other is None else 'too much'}")
        elif one != other:
            changed = (field.name for field in fields(Seen) if getattr(one, field.name) != getattr(other, field.name))
            lines += [f"{name} of {path!r} is {getattr(other, name)!r}, not {getattr(one, name)!r}" for name in changed]
    return lines


def _usable(host: Host, info: Info, was_power_cut: bool) -> list[str]:
    """Of an active snapshot nothing is promised but that it goes on; that of an unpacking is not for reading. What
    overlayfs had not synced of its files, a power cut may leave unreadable (ESTALE, of an index entry)."""
    try:
        if info.name.startswith("extract-"):
            host.client.mounts(info.name)
            return []
        with host.again(info.name) as merged:
            if not was_power_cut or info.kind is Kind.VIEW:
                reading(merged)
            if info.kind is Kind.ACTIVE:
                (merged / "probe").write_bytes(b"written")
                (merged / "probe").unlink()
    except (SnapshotterError, OSError, AssertionError) as error:
        return [f"{info.name} ({info.kind.name.lower()}) cannot be used: {error!r}"]
    return []


# -- what is in the root


def _leftovers(root: Path, infos: Mapping[str, Info]) -> Iterator[str]:
    """What the metadata does not know."""
    with_directory = sum(info.kind is not Kind.VIEW or not info.parent for info in infos.values())
    directories = list((root / "snapshots").iterdir())
    if len(directories) != with_directory:
        yield f"there are {len(directories)} directories of {with_directory} snapshots"
    names = Counter(entry.name for directory in directories for entry in directory.iterdir())
    actives = sum(info.kind is Kind.ACTIVE for info in infos.values())
    if names["work"] > actives:
        yield f"there are {names['work']} work directories of {actives} active snapshots"
    for name in names.keys() - {"fs", "work", "refs"}:
        yield f"there are {names[name]} directories {name}"
    for name in ("trash", "spool", "busy"):
        yield from (f"left: {path}" for path in (root / name).iterdir())
    mounted = mounts_below(root)
    mountpoints = [str(path) for path in (root / "mounts").iterdir()]
    if Counter(mounted) != Counter(mountpoints):
        yield f"mounted are {sorted(mounted)}, and there are {sorted(mountpoints)}"
    if len(mounted) > len(infos) - sum(info.kind is Kind.COMMITTED for info in infos.values()):
        yield f"there are {len(mounted)} mounts"


def _references(host: Host) -> Iterator[str]:
    """Each ref is an object, each stub has its ref, and each link of an object is accounted for."""
    objects = {path: path.lstat() for path in (host.root / "objects").glob("*/*")}
    links = {status.st_ino: status.st_nlink - 1 for status in objects.values()}
    for tree in stored(host.client, host.root).names:
        refs = {path.name: path.lstat().st_ino for path in tree.parent.glob("refs/*")}
        for name, inode in refs.items():
            target = objects.get(host.root / "objects" / name[:2] / name[2:])
            if target is None or target.st_ino != inode:
                yield f"{tree.parent}/refs/{name} refers to no object"
            links[inode] = links.get(inode, 0) - 1
        for path in tree.rglob("*"):
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                continue
            if status.st_ino in links:
                links[status.st_ino] -= 1
            xattrs = xattrs_of(path)
            found = _OBJECT.fullmatch(xattrs.get(_REDIRECT, b""))
            if _METACOPY in xattrs and found and os.fsdecode(found[1] + found[2]) not in refs:
                yield f"the stub {path} has no ref"
    for path, status in objects.items():
        if links[status.st_ino]:
            yield f"{path} has {links[status.st_ino]} links too many"


def _space(host: Host) -> Iterator[str]:
    """What the daemon counts is what there is."""
    objects = [path.lstat().st_blocks * _BLOCK_BYTES for path in (host.root / "objects").glob("*/*")]
    found = host.client.space(now=True).objects
    if (found.inodes, found.size_bytes) != (len(objects), sum(objects)):
        yield f"counted are {found}, and there are {len(objects)} objects of {sum(objects)} bytes"
    if (unused := host.client.collect(dry_run=True).objects).inodes:
        yield f"collected before, and still unused: {unused}"
