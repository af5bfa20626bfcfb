"""What the daemon says of space, against what a look at the disk finds.

Invariants, whatever the strategy: the store's total is what its trees and objects take; removing a snapshot
frees what was called exclusive, and with the last one every object goes; without sharing the store would take
what one takes that shares nothing.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.errors import Internal
from snapshotter.model import NO_EXTENT, Extent, Freed, Kind, SnapshotSpace, Space
from tests.rig.host import Host

pytestmark = pytest.mark.root

STRATEGIES = ("auto", "hardlink", "off")
KIB = 1 << 10
MTIME_NS = 1_500_000_000_123_456_789


@pytest.fixture(params=STRATEGIES)
def host(request: pytest.FixtureRequest, base: Path) -> Iterator[Host]:
    with Host(base, dedup={"strategy": request.param}) as host:
        yield host


def test_the_total_is_what_is_on_the_disk(host: Host) -> None:
    unpack_images(host)
    space = host.client.space(now=True)
    assert space.allocated == on_disk(host.root)
    assert space.objects == objects_on_disk(host.root)
    filesystem = os.statvfs(host.root)
    assert space.filesystem_inodes == filesystem.f_files
    assert space.filesystem_bytes == filesystem.f_blocks * filesystem.f_frsize
    assert 0 < space.filesystem_bytes_free < space.filesystem_bytes


def test_without_sharing_it_takes_what_a_store_takes_that_shares_nothing(base: Path, host: Host) -> None:
    unpack_images(host)
    shared = host.client.space(now=True)
    (base / "off").mkdir()
    with Host(base / "off", dedup={"strategy": "off"}) as off:
        unpack_images(off)
        alone = off.client.space(now=True)
    assert alone.allocated == alone.unshared == shared.unshared
    assert alone.objects == NO_EXTENT
    assert alone.apparent_bytes == shared.apparent_bytes
    assert {name: each.apparent_bytes for name, each in by_name(alone).items()} == {
        name: each.apparent_bytes for name, each in by_name(shared).items()
    }
    if host.client.info().dedup_strategy != "off":
        assert shared.allocated.size_bytes < alone.allocated.size_bytes


def test_what_is_exclusive_is_freed_and_nothing_else(host: Host) -> None:
    unpack_images(host)
    for name in ("on one", "two", "one"):
        before = on_disk(host.root)
        exclusive = by_name(host.client.space(now=True))[name].exclusive
        host.client.remove(name)
        host.client.collect()
        after = on_disk(host.root)
        assert Extent(before.size_bytes - after.size_bytes, before.inodes - after.inodes) == exclusive
    assert on_disk(host.root) == NO_EXTENT
    space = host.client.space(now=True)
    assert (space.allocated, space.snapshots) == (NO_EXTENT, ())


def test_what_a_snapshot_takes_is_shared_or_exclusive(host: Host) -> None:
    unpack_images(host)
    spaces = by_name(host.client.space(now=True))
    for each in spaces.values():
        assert each.allocated.size_bytes == each.shared.size_bytes + each.exclusive.size_bytes
        assert each.allocated.inodes == each.shared.inodes + each.exclusive.inodes
    for name in ("one", "two"):
        assert (spaces[name].shared == NO_EXTENT) == (spaces[name].strategy == "off")


def test_each_kind_and_strategy_is_named(host: Host) -> None:
    host.unpack("base", fill=lambda tree: write(tree / "f", 1, 8 * KIB))
    host.client.view("look", "base")
    with host.running("work", "base") as merged:
        write(merged / "g", 2, 8 * KIB)
        spaces = by_name(host.client.space(now=True))
    strategy = host.client.info().dedup_strategy
    assert strategy in ("stub", "hardlink", "off")
    assert {name: (each.kind, each.strategy) for name, each in spaces.items()} == {
        "base": (Kind.COMMITTED, strategy),
        "look": (Kind.VIEW, ""),
        "work": (Kind.ACTIVE, ""),
    }
    assert spaces["look"].allocated == NO_EXTENT
    assert spaces["work"].exclusive == spaces["work"].allocated
    assert spaces["work"].apparent_bytes >= 8 * KIB


def test_a_file_that_is_never_linked_is_counted(base: Path) -> None:
    with Host(base, dedup={"strategy": "hardlink", "never_link": ["etc/cron*"]}) as host:
        host.unpack("base", fill=lambda tree: write(tree / "etc" / "crontab", 1, 8 * KIB))
        host.unpack("other", fill=lambda tree: write(tree / "etc" / "shadow", 2, 8 * KIB))
        space = host.client.space(now=True)
    assert list(by_name(space)["base"].private.values()) == [1]
    assert by_name(space)["other"].private == {}
    assert space.private == by_name(space)["base"].private


def test_no_file_is_counted_twice_where_several_processes_share_files(host: Host) -> None:
    """Sharing changes the inodes of names that another process has not read yet."""
    for name in ("one", "two"):
        host.unpack(name, fill=fill_with_many)
    space = host.client.space(now=True)
    assert space.private == {}
    assert space.allocated == on_disk(host.root)


def test_the_first_answer_after_a_start_knows_all_snapshots(host: Host) -> None:
    unpack_images(host)
    host.restart(kill=True)
    space = host.client.space()
    assert {each.name for each in space.snapshots} == {"one", "two", "on one"}
    assert host.client.space().as_of_ns >= space.as_of_ns


def test_what_is_used_is_not_collected(host: Host) -> None:
    unpack_images(host)
    host.client.cleanup()
    before = on_disk(host.root)
    assert host.client.collect(dry_run=True) == Freed(NO_EXTENT, 0)
    assert host.client.collect() == Freed(NO_EXTENT, 0)
    assert on_disk(host.root) == before


def test_a_dry_run_says_what_would_be_freed(host: Host) -> None:
    unpack_images(host)
    host.client.cleanup()
    deleting(host, "delete.entry=error")
    for removed, name in enumerate(("on one", "two", "one"), start=1):
        host.client.remove(name)
        with pytest.raises(Internal, match="cannot be deleted"):
            host.client.cleanup()
        before = on_disk(host.root)
        used = taken(list((host.root / "snapshots").glob("*/refs/*")))
        assert host.client.collect(dry_run=True) == Freed(objects_on_disk(host.root) - used, removed)
        assert on_disk(host.root) == before
    deleting(host, "")
    host.client.collect()
    assert on_disk(host.root) == NO_EXTENT
    assert host.client.collect(dry_run=True) == Freed(NO_EXTENT, 0)


def deleting(host: Host, failpoints: str) -> None:
    """Restarts the daemon with these."""
    host.stop()
    host.daemon.environment["DEDUP_FAILPOINTS"] = failpoints
    host.start()


def unpack_images(host: Host) -> None:
    """Files are repeated in one image ("two"), in a child ("on one"), and in another image."""
    host.unpack("one", fill=fill_one)
    host.unpack("two", fill=fill_two)
    host.unpack("on one", "one", fill=lambda tree: write(tree / "again", 1, 300 * KIB))


def fill_one(tree: Path) -> None:
    write(tree / "usr" / "large", 1, 300 * KIB)
    write(tree / "usr" / "medium", 2, 21 * KIB)
    write(tree / "usr" / "twin", 3, 9 * KIB)
    os.link(tree / "usr" / "twin", tree / "usr" / "other twin")
    write(tree / "small", 4, 100)
    write(tree / "empty", 5, 0)
    (tree / "link").symlink_to("usr/large")


def fill_two(tree: Path) -> None:
    write(tree / "opt" / "large", 1, 300 * KIB)
    write(tree / "opt" / "medium but newer", 2, 21 * KIB, MTIME_NS + 1)
    write(tree / "opt" / "twin", 3, 9 * KIB)
    write(tree / "opt" / "own", 6, 50 * KIB)
    write(tree / "opt" / "own again", 6, 50 * KIB)
    write(tree / "small", 4, 100)


def fill_with_many(tree: Path) -> None:
    for number in range(400):
        write(tree / str(number % 40) / str(number), number, 5 * KIB)


def write(path: Path, seed: int, size_bytes: int, mtime_ns: int = MTIME_NS) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(random.Random(seed).randbytes(size_bytes))
    os.utime(path, ns=(mtime_ns, mtime_ns))


def by_name(space: Space) -> dict[str, SnapshotSpace]:
    return {each.name: each for each in space.snapshots}


def on_disk(root: Path) -> Extent:
    """Of all that snapshots have, and all objects, without the directories of the store itself."""
    return taken([*(root / "snapshots").rglob("*"), *objects(root)])


def objects_on_disk(root: Path) -> Extent:
    return taken(objects(root))


def objects(root: Path) -> list[Path]:
    return [path for path in (root / "objects").rglob("*") if path.is_file()]


def taken(paths: list[Path]) -> Extent:
    inodes = {(status.st_dev, status.st_ino): status for status in map(os.lstat, paths)}
    return Extent(sum(status.st_blocks * 512 for status in inodes.values()), len(inodes))
