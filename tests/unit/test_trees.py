"""Walking, measuring, syncing and removing trees that are deep, hostile, or change meanwhile."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapshotter import clone, layer, linux
from snapshotter.durable import Stopped, remove_tree
from snapshotter.errors import FailedPrecondition
from snapshotter.layer import Found
from snapshotter.model import Usage
from snapshotter.overlay.attributes import TRUSTED
from snapshotter.overlay.features import NO_FEATURES, Feature
from snapshotter.usage import UsageCache, scan
from snapshotter.walker import walk

pytestmark = pytest.mark.root

MS_SHARED = 1 << 20  # <sys/mount.h>
DEPTH = 600
"""Levels of the deep tree; its path has over 4,096 bytes, and a process would need a descriptor for each."""


def never() -> bool:
    return False


def make_deep(top: Path) -> None:
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for level in range(DEPTH):
        name = f"{level:08}"
        os.mkdir(name, dir_fd=fd)
        inner = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
        os.close(fd)
        fd = inner
    os.close(fd)


def names_below(top: Path) -> list[bytes]:
    fd = os.open(top, os.O_RDONLY)
    try:
        return [entry.name for entry in walk(fd)]
    finally:
        os.close(fd)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_walk_reaches_everything_in_a_tree_deeper_than_a_path(base: Path) -> None:
    make_deep(base / "deep")
    before = open_descriptors()
    names = names_below(base / "deep")
    assert len(names) == 2 * DEPTH
    assert open_descriptors() == before
    remove_tree(base, "deep", never)
    assert not (base / "deep").exists()
    assert not list(base.iterdir())
    assert open_descriptors() == before


def test_walk_holds_few_descriptors(base: Path) -> None:
    make_deep(base / "deep")
    fd = os.open(base / "deep", os.O_RDONLY)
    before = open_descriptors()
    most = max(open_descriptors() for _ in walk(fd))
    os.close(fd)
    remove_tree(base, "deep", never)
    assert most - before < 100


def test_walk_follows_no_symlink_and_reports_strange_names(base: Path) -> None:
    outside = base / "outside"
    outside.mkdir()
    (outside / "secret").touch()
    tree = base / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(outside)
    (tree / "new\nline").touch()
    os.mknod(os.fsencode(tree) + b"/\xff\xfe", 0o600)
    os.mkfifo(tree / "fifo")
    assert set(names_below(tree)) == {b"link", b"new\nline", b"\xff\xfe", b"fifo"}


def test_walk_passes_over_what_vanishes(base: Path) -> None:
    tree = base / "tree"
    for number in range(50):
        (tree / f"d{number}").mkdir(parents=True)
        (tree / f"d{number}" / "f").touch()
    fd = os.open(tree, os.O_RDONLY)
    seen = 0
    for entry in walk(fd):
        seen += 1
        if seen == 1:
            for number in range(50):
                if f"d{number}".encode() != entry.name:
                    remove_tree(tree, f"d{number}", never)
    os.close(fd)
    assert seen == 2


def test_walk_never_leaves_a_tree_whose_directory_is_moved_under_it(base: Path) -> None:
    """A walk that climbs with ".." would go on wherever the directory was moved to."""
    make_deep(base / "deep")
    (base / "elsewhere").mkdir()
    (base / "elsewhere" / "secret").touch()
    victim = base / "deep" / Path(*[f"{level:08}" for level in range(100)])
    fd = os.open(base / "deep", os.O_RDONLY)
    names = []
    with pytest.raises(OSError, match="moved"):
        for entry in walk(fd):
            names.append(entry.name)
            if entry.name == f"{DEPTH - 1:08}".encode():
                victim.rename(base / "elsewhere" / "victim")
    os.close(fd)
    assert b"secret" not in names
    for name in ("deep", "elsewhere"):
        remove_tree(base, name, never)


def test_remove_tree_clears_immutable_and_append_only_flags(base: Path) -> None:
    tree = base / "tree"
    (tree / "d").mkdir(parents=True)
    (tree / "d" / "f").touch()
    (tree / "g").touch()
    for path, flag in ((tree / "d" / "f", 0x10), (tree / "g", 0x20), (tree / "d", 0x10), (tree, 0x20)):
        fd = os.open(path, os.O_RDONLY)
        fcntl.ioctl(fd, linux.FS_IOC_SETFLAGS, struct.pack("l", flag))
        os.close(fd)
    with pytest.raises(PermissionError):
        (tree / "g").unlink()
    remove_tree(base, "tree", never)
    assert not tree.exists()


def test_remove_tree_stops_and_goes_on(base: Path) -> None:
    tree = base / "tree"
    tree.mkdir()
    for number in range(100):
        (tree / str(number)).touch()
    answers = iter([False] * 10)
    with pytest.raises(Stopped):
        remove_tree(base, "tree", lambda: next(answers, True))
    assert 0 < len(list(tree.iterdir())) < 100
    remove_tree(base, "tree", never)
    remove_tree(base, "tree", never)  # gone already: no error
    assert not tree.exists()


def test_remove_tree_follows_no_symlink(base: Path) -> None:
    (base / "outside").mkdir()
    (base / "outside" / "precious").touch()
    (base / "tree").mkdir()
    (base / "tree" / "link").symlink_to(base / "outside")
    (base / "direct").symlink_to(base / "outside")
    remove_tree(base, "tree", never)
    remove_tree(base, "direct", never)
    assert (base / "outside" / "precious").exists()


@pytest.fixture
def mounted_in(base: Path) -> Iterator[Path]:
    """A tree in which somebody's directory and file are mounted although they mounted them elsewhere: on a bind of
    the tree, of which the kernel makes a peer where mounts are shared, as systemd has them."""
    linux.mount("tmpfs", str(base), "tmpfs", 0, None)
    linux.mount("", str(base), None, MS_SHARED, None)
    for made in ("tree/d/home", "bind", "home/precious"):
        (base / made).mkdir(parents=True)
    (base / "home/file").write_text("content")
    (base / "tree/d/first").touch()
    linux.mount(str(base / "tree"), str(base / "bind"), None, linux.MS_BIND, None)
    linux.mount(str(base / "home"), str(base / "bind/d/home"), None, linux.MS_BIND, None)
    assert (base / "tree/d/home/precious").exists(), "or this proves nothing"
    yield base / "tree"
    linux.umount2(str(base), linux.MNT_DETACH)  # and all that is on it


def test_nothing_is_deleted_that_is_mounted_in_the_tree(mounted_in: Path) -> None:
    base = mounted_in.parent
    with pytest.raises(OSError, match="mounted"):
        remove_tree(base, "tree", never)
    assert sorted(path.name for path in (base / "home").iterdir()) == ["file", "precious"]
    linux.umount2(str(base / "bind/d/home"))
    remove_tree(base, "tree", never)
    assert not (base / "tree").exists()
    assert sorted(path.name for path in (base / "home").iterdir()) == ["file", "precious"]


def test_walk_enters_no_mount(mounted_in: Path) -> None:
    assert sorted(names_below(mounted_in)) == [b"d", b"first", b"home"]


def test_usage_counts_allocated_bytes_and_each_inode_once(base: Path) -> None:
    tree = base / "tree"
    (tree / "d").mkdir(parents=True)
    (tree / "data").write_bytes(b"x" * 10_000)
    os.link(tree / "data", tree / "d" / "again")
    os.truncate(os.open(tree / "sparse", os.O_CREAT | os.O_WRONLY), 1 << 40)
    (tree / "link").symlink_to("data")
    listed = subprocess.run(["du", "--block-size=1", "-s", tree], capture_output=True, text=True, check=True)
    assert scan([tree], never) == Usage(int(listed.stdout.split()[0]), 5)
    assert scan([tree, base / "missing"], never) == scan([tree], never)


def test_layer_reports_usage_and_what_reading_it_takes(base: Path) -> None:
    tree = base / "tree"
    (tree / "d").mkdir(parents=True)
    (tree / "f").write_bytes(b"x" * 5000)
    os.mknod(tree / "whiteout", 0o20600, 0)
    os.mkfifo(tree / "fifo")
    (tree / "link").symlink_to("/nowhere")
    mtimes_ns = {path.stat().st_ino: path.stat().st_mtime_ns for path in (tree, tree / "d")}
    assert layer.finish(tree, TRUSTED) == Found(scan([tree], never), NO_FEATURES, False, 5000, 5000, mtimes_ns, False)
    os.setxattr(tree / "d", "trusted.overlay.redirect", b"/old")
    assert layer.finish(tree, TRUSTED).needs == Feature.REDIRECT_DIR
    os.setxattr(tree / "f", "trusted.overlay.metacopy", b"")
    assert layer.finish(tree, TRUSTED).needs == Feature.REDIRECT_DIR | Feature.METACOPY


def open_deepest(top: Path) -> int:
    fd = os.open(top, os.O_RDONLY)
    for level in range(DEPTH):
        inner = os.open(f"{level:08}", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    return fd


def test_a_copy_keeps_hard_links_and_holds_few_descriptors_however_deep(base: Path) -> None:
    make_deep(base / "deep")
    bottom = open_deepest(base / "deep")
    os.close(os.open("one", os.O_WRONLY | os.O_CREAT, dir_fd=bottom))
    os.link("one", "two", src_dir_fd=bottom, dst_dir_fd=bottom)
    os.close(bottom)
    before = open_descriptors()
    clone.copy_tree(base / "deep", base / "copy", TRUSTED, True)
    assert open_descriptors() == before
    assert sorted(names_below(base / "copy")) == sorted(names_below(base / "deep"))
    bottom = open_deepest(base / "copy")
    one, two = (os.stat(name, dir_fd=bottom) for name in ("one", "two"))
    os.close(bottom)
    assert one.st_ino == two.st_ino
    assert one.st_nlink == 2
    for name in ("deep", "copy"):
        remove_tree(base, name, never)


def test_a_metacopy_file_that_is_copied_up_during_the_copy_stays_one(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel copies the data up and takes the attribute away between two of our steps: holes must not become
    the file's content."""
    (base / "tree").mkdir()
    source = base / "tree" / "f"
    source.touch()
    os.truncate(source, 8000)
    os.setxattr(source, TRUSTED.metacopy, b"")
    copy_file = clone._copy_file

    def interrupted(*arguments: Any, **options: Any) -> None:
        os.removexattr(source, TRUSTED.metacopy)
        source.write_bytes(b"x" * 8000)
        copy_file(*arguments, **options)

    monkeypatch.setattr(clone, "_copy_file", interrupted)
    clone.copy_tree(base / "tree", base / "copy", TRUSTED, True)
    assert os.listxattr(base / "copy" / "f") == [TRUSTED.metacopy]
    assert (base / "copy" / "f").stat().st_size == 8000


def test_a_copy_that_finds_no_space_leaves_nothing_open(base: Path) -> None:
    """The process that made it goes on to serve others."""
    (base / "tree/d").mkdir(parents=True)
    (base / "full").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=2", "tmpfs", base / "full"], check=True)
    try:
        before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match="No space left"):
            clone.copy_tree(base / "tree", base / "full/copy", TRUSTED, True)
        assert os.listdir("/proc/self/fd") == before
    finally:
        subprocess.run(["umount", base / "full"], check=True)


def test_an_attribute_that_no_kernel_writes_is_refused(base: Path) -> None:
    tree = base / "tree"
    (tree / "d").mkdir(parents=True)
    (tree / "d" / "f").touch()
    os.setxattr(tree / "d" / "f", "trusted.overlay.overlay.future", b"a nested overlay's: data")
    os.setxattr(tree / "d" / "f", "user.overlay.origin", b"anybody's: data")
    assert not layer.finish(tree, TRUSTED).has_dead_attributes
    os.setxattr(tree / "d" / "f", "trusted.overlay.future", b"")
    with pytest.raises(FailedPrecondition, match=r'"d/f".* "trusted\.overlay\.future"'):
        layer.finish(tree, TRUSTED)


def test_layer_syncs_every_file_and_directory(base: Path) -> None:
    """Watches the system calls: a layer is only durable if each of its inodes was synced."""
    tree = base / "tree"
    (tree / "d" / "e").mkdir(parents=True)
    for number in range(300):
        (tree / "d" / f"f{number}").write_text("content")
    program = (
        "import sys; from pathlib import Path; from snapshotter import layer; "
        "from snapshotter.overlay.attributes import TRUSTED; layer.finish(Path(sys.argv[1]), TRUSTED)"
    )
    trace = base / "trace"
    subprocess.run(
        ["strace", "-f", "-qq", "-y", "-e", "trace=fsync,fdatasync", "-o", trace, sys.executable, "-c", program, tree],
        check=True,
    )
    synced = {line.split("<")[1].split(">")[0] for line in trace.read_text().splitlines() if "fsync(" in line}
    assert synced == {str(tree), *map(str, tree.rglob("*"))}


def test_usage_cache_shares_a_scan_and_forgets() -> None:
    cache = UsageCache()
    calls = []

    def scan_now() -> Usage:
        calls.append(1)
        return Usage(len(calls), 1)

    assert cache.get(1, scan_now) == cache.get(1, scan_now) == Usage(1, 1)  # type: ignore[arg-type]
    cache.forget(1)  # type: ignore[arg-type]
    assert cache.get(1, scan_now) == Usage(2, 1)  # type: ignore[arg-type]


def test_parts_of_a_tree_together_are_the_tree(base: Path) -> None:
    tree = base / "tree"
    for number in range(40):
        (tree / f"d{number % 7}").mkdir(parents=True, exist_ok=True)
        (tree / f"d{number % 7}" / f"f{number}").write_bytes(b"x" * number * 500)
    os.link(tree / "d0" / "f0", tree / "d1" / "linked")
    os.setxattr(tree / "d3", "trusted.overlay.redirect", b"/old")
    os.setxattr(tree / "d4" / "f4", "trusted.overlay.origin", b"")
    whole = layer.finish(tree, TRUSTED)
    for count in (1, 2, 3, 5):
        assert layer.merged([layer.finish(tree, TRUSTED, True, number, count) for number in range(count)]) == whole
    assert whole.needs == Feature.REDIRECT_DIR
    assert whole.has_dead_attributes
