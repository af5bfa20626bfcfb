"""What `snapctl df` and `snapctl gc` say to a person."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from snapshotter.cli.tables import Column
from snapshotter.cli.text import counted, escape, human_age, human_size, local_time
from snapshotter.model import Extent, Freed, SnapshotSpace, Space

COLUMNS = (
    Column("NAME", flexible=True),
    Column("KIND"),
    Column("STRATEGY"),
    Column("APPARENT", right=True),
    Column("ALLOCATED", right=True),
    Column("SHARED", right=True),
    Column("EXCLUSIVE", right=True),
    Column("INODES", right=True),
    Column("EXCL.INODES", right=True),
)
WHY_COLUMNS = (Column("WHY PRIVATE"), Column("FILES", right=True))
WHY_COLUMNS_BY_NAME = (Column("NAME", flexible=True), *WHY_COLUMNS)


def by_exclusive(snapshots: Iterable[SnapshotSpace]) -> list[SnapshotSpace]:
    """Those first whose removal frees most."""
    return sorted(snapshots, key=lambda s: (-s.exclusive.size_bytes, -s.exclusive.inodes, s.name))


def store_fields(space: Space, now_ns: int) -> Iterator[tuple[str, str]]:
    yield "apparent", human_size(space.apparent_bytes)
    yield "allocated", _extent(space.allocated)
    yield "without sharing", _extent(space.unshared)
    yield "saved", _saved(space.allocated, space.unshared)
    yield "objects", _extent(space.objects)
    yield "filesystem", _used(space.filesystem_bytes, space.filesystem_bytes_free, human_size)
    yield "its inodes", _used(space.filesystem_inodes, space.filesystem_inodes_free, str)
    age, took_s = human_age(now_ns - space.as_of_ns), space.took_ns / 1e9
    yield "as of", f"{local_time(space.as_of_ns)} ({age} ago), took {took_s:.1f} s"


def row(space: SnapshotSpace) -> list[str]:
    """Cells for COLUMNS."""
    return [
        escape(space.name),
        space.kind.name.lower(),
        escape(space.strategy) or "-",
        human_size(space.apparent_bytes),
        human_size(space.allocated.size_bytes),
        human_size(space.shared.size_bytes),
        human_size(space.exclusive.size_bytes),
        str(space.allocated.inodes),
        str(space.exclusive.inodes),
    ]


def why_rows(private: Mapping[str, int]) -> list[list[str]]:
    """Cells for WHY_COLUMNS, the most frequent reason first."""
    return [[escape(why), str(files)] for why, files in sorted(private.items(), key=lambda item: (-item[1], item[0]))]


def freed(freed: Freed, dry_run: bool) -> str:
    objects = freed.objects
    trees = f", and {counted(freed.trees, 'removed tree')}" if freed.trees else ""
    return (
        f"{'would free' if dry_run else 'freed'} {counted(objects.inodes, 'object')}, {_extent(objects, ', ')}{trees}"
    )


def _extent(extent: Extent, between: str = " in ") -> str:
    return f"{human_size(extent.size_bytes)}{between}{counted(extent.inodes, 'inode')}"


def _saved(allocated: Extent, unshared: Extent) -> str:
    """Stubs save bytes and cost inodes; hard links save both."""
    saved_bytes = unshared.size_bytes - allocated.size_bytes
    saved_inodes = unshared.inodes - allocated.inodes
    text = human_size(saved_bytes) + _percent(saved_bytes, unshared.size_bytes)
    if saved_inodes < 0:
        return f"{text}, for {counted(-saved_inodes, 'inode')} more"
    return f"{text} and {counted(saved_inodes, 'inode')}" if saved_inodes else text


def _used(total: int, free: int, shown: Callable[[int], str]) -> str:
    if not total:  # btrfs has no fixed number of inodes
        return "no limit"
    return f"{shown(total - free)} of {shown(total)} used{_percent(total - free, total)}, {shown(free)} free"


def _percent(part: int, whole: int) -> str:
    return f" ({round(100 * part / whole)}%)" if whole else ""
