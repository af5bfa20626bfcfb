"""Copy-up as the kernel does it with metacopy and redirect_dir: as little as possible, and read right ever after.

- A change of metadata copies no data; a directory that spans layers is renamed at once.
- A layer with metacopy files and redirects reads right in every chain above it.
- Such a layer cannot be read without a mount: its tree shows zeros and empty directories (docs/).
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from snapshotter.model import Mount
from tests.rig.host import Host
from tests.rig.seen import Seen, seen

pytestmark = pytest.mark.root

BIG = bytes(range(256)) * 4096


def image(tree: Path) -> None:
    (tree / "d/inner").mkdir(parents=True)
    for number in range(10):
        (tree / f"d/file{number}").write_bytes(BIG)
    (tree / "d/inner/deep").write_bytes(BIG)
    (tree / "plain").write_text("plain")


def second(tree: Path) -> None:
    (tree / "d").mkdir()
    (tree / "d/file0").write_bytes(BIG[::-1])
    (tree / "d/above").write_text("above")


def two_layers(host: Host) -> str:
    host.unpack("image", fill=image)
    host.unpack("second", "image", fill=second)
    return "second"


def allocated_bytes(tree: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in tree.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.chmod(0o600),
        lambda path: os.chown(path, 1000, 1000),
        lambda path: os.utime(path, ns=(1, 2)),
        lambda path: os.setxattr(path, "user.note", b"x"),
        lambda path: path.rename(path.with_name(f"renamed {path.name}")),
        lambda path: os.link(path, path.with_name(f"linked {path.name}")),
    ],
    ids=["chmod", "chown", "utime", "setxattr", "rename", "link"],
)
def test_a_change_of_metadata_copies_no_data(host: Host, change: Callable[[Path], object]) -> None:
    with host.running("key", two_layers(host)) as merged:
        for number in range(10):
            change(merged / f"d/file{number}") if number else change(merged / "d/inner/deep")
        assert allocated_bytes(host.upper("key")) < len(BIG) // 2
        shown = seen(merged)
        assert sum(entry.content == BIG for entry in shown.values()) >= 10
    host.client.commit("layer", "key")
    assert host.client.usage("layer").size_bytes < len(BIG)
    check_everywhere(host, "layer", shown)


def test_data_is_copied_when_it_is_written(host: Host) -> None:
    """Also into a file whose metadata was copied in a layer below."""
    host.commit_changes("chmodded", two_layers(host), fill=lambda merged: (merged / "d/file1").chmod(0o600))
    with host.running("key", "chmodded") as merged:
        for name in ("d/file1", "d/file2"):
            with (merged / name).open("r+b") as stream:
                stream.write(b"changed")
        assert (merged / "d/file1").read_bytes() == (merged / "d/file2").read_bytes() == b"changed" + BIG[7:]
        assert stat.S_IMODE((merged / "d/file1").stat().st_mode) == 0o600
        shown = seen(merged)
    host.client.commit("layer", "key")
    check_everywhere(host, "layer", shown)


def test_directories_are_renamed_across_layers(host: Host) -> None:
    """rename(2) answers EXDEV without redirect_dir. Into the root, deeper, again in a higher layer, and back."""
    name = two_layers(host)
    renames = [("d", "moved"), ("moved/inner", "inner"), ("inner", "moved/back"), ("moved", "d")]
    for number, (old, new) in enumerate(renames):
        with host.running(f"key {number}", name) as merged:
            (merged / old).rename(merged / new)
            (merged / new / f"new {number}").write_text("x")
            shown = seen(merged)
        name = f"layer {number}"
        host.client.commit(name, f"key {number}")
        with host.viewed(name) as merged:
            assert seen(merged) == shown
    with host.viewed(name) as merged:
        assert (merged / "d/back/deep").read_bytes() == BIG
        assert (merged / "d/file0").read_bytes() == BIG[::-1]
        assert sorted(os.listdir(merged)) == ["d", "plain"]
    check_everywhere(host, name, shown)


def test_layers_with_metacopy_and_redirects_read_right_in_every_chain(host: Host) -> None:
    """Renamed and changed and changed again, two and more layers up, with layers of other kinds between."""

    def first(merged: Path) -> None:
        (merged / "d").rename(merged / "moved")
        (merged / "moved/file1").chmod(0o600)
        (merged / "moved/file2").rename(merged / "file2")
        (merged / "file2").chmod(0o611)

    def again(merged: Path) -> None:
        (merged / "moved/file1").chmod(0o640)
        (merged / "moved/inner").rename(merged / "inner")
        (merged / "file2").rename(merged / "inner/file2")
        os.chown(merged / "inner/file2", 5, 6)
        (merged / "moved").rename(merged / "z")

    name = two_layers(host)
    host.commit_changes("first", name, fill=first)
    host.unpack("between", "first", fill=lambda tree: (tree / "unpacked").write_text("x"))
    host.commit_changes("again", "between", fill=again)
    with host.viewed("again") as merged:
        shown = seen(merged)
        assert (merged / "z/file1").read_bytes() == (merged / "inner/file2").read_bytes() == BIG
        assert stat.S_IMODE((merged / "z/file1").stat().st_mode) == 0o640
        assert stat.S_IMODE((merged / "inner/file2").stat().st_mode) == 0o611
        assert (merged / "inner/deep").read_bytes() == BIG
        assert (merged / "z/file0").read_bytes() == BIG[::-1]
        assert not {"d", "moved", "file2"} & set(os.listdir(merged))
    check_everywhere(host, "again", shown)


def check_everywhere(host: Host, name: str, shown: dict[str, Seen]) -> None:
    """Views, actives, a layer on top, and all of it again for a daemon in client mode."""

    def check_as(mode: str) -> None:
        with host.viewed(name) as merged:
            assert seen(merged) == shown
        with host.running(f"child in {mode} mode", name) as merged:
            assert below_top(seen(merged)) == below_top(shown)
            (merged / f"more in {mode} mode").write_text("x")
        host.client.commit(f"on top in {mode} mode", f"child in {mode} mode")
        with host.viewed(f"on top in {mode} mode") as merged:
            above = below_top(seen(merged))
            del above[f"more in {mode} mode"]
            assert above == below_top(shown)

    check_as("daemon")
    host.stop()
    host.configure("client")
    host.start()
    check_as("client")


def below_top(tree: dict[str, Seen]) -> dict[str, Seen]:
    """The top directory of a new upper was made just now, and has that time."""
    return {path: entry for path, entry in tree.items() if path != "."}


def test_the_classic_walk_through(host: Host) -> None:
    """What merged, upper and lower show after each step. The lower is changed on a copy: layers must not change."""
    host.unpack("image", fill=lambda tree: [(tree / name).write_text(f"old {name}") for name in "abcde"])
    with host.running("key", "image") as merged:
        lower, upper = host.layers("image")[0], host.upper("key")

        (merged / "a").unlink()
        assert not (merged / "a").exists()
        assert is_whiteout(upper / "a")
        assert (lower / "a").read_text() == "old a"

        (merged / "a").write_text("new a")
        assert (upper / "a").read_text() == (merged / "a").read_text() == "new a"
        assert (lower / "a").read_text() == "old a"

        (merged / "b").write_text("changed b")
        assert (upper / "b").read_text() == "changed b"
        assert (lower / "b").read_text() == "old b"

        (merged / "c").unlink()
        (merged / "c").mkdir()
        (merged / "c/inside").write_text("x")
        assert (upper / "c/inside").read_text() == "x"
        assert (lower / "c").read_text() == "old c"

        assert sorted(os.listdir(merged)) == ["a", "b", "c", "d", "e"]
        assert sorted(os.listdir(upper)) == ["a", "b", "c"]
        assert sorted(os.listdir(lower)) == ["a", "b", "c", "d", "e"]
        shown = seen(merged)
    host.client.commit("layer", "key")
    with host.viewed("layer") as merged:
        assert seen(merged) == shown


def test_a_lower_that_changes_shows_below_what_is_not_copied_up(host: Host) -> None:
    """Which is why layers never change. On a private copy of a root, in a private overlay."""
    base = host.base
    host.unpack("image", fill=lambda tree: [(tree / name).write_text(f"old {name}") for name in "ab"])
    shutil.copytree(host.layers("image")[0], base / "lower")
    host.stop()
    for name in ("upper", "work"):
        (base / name).mkdir()
    overlay = mount_arguments(base)
    with host.mounted(overlay) as merged:
        (merged / "a").write_text("copied up a")
    (base / "lower/a").write_text("changed below a")
    (base / "lower/b").write_text("changed below b")
    with host.mounted(overlay) as merged:
        assert (merged / "a").read_text() == "copied up a"
        assert (merged / "b").read_text() == "changed below b"
    assert sorted(os.listdir(base / "upper")) == ["a"]
    host.start()
    with host.viewed("image") as merged:
        assert (merged / "b").read_text() == "old b", "the layer itself did not change"


def mount_arguments(base: Path) -> tuple[Mount, ...]:
    options = (f"workdir={base}/work", f"upperdir={base}/upper", f"lowerdir={base}/lower")
    return (Mount("overlay", "overlay", options),)


def is_whiteout(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def test_a_layers_tree_read_without_a_mount_shows_zeros(host: Host) -> None:
    def change(merged: Path) -> None:
        (merged / "d/file1").chmod(0o600)
        (merged / "d").rename(merged / "moved")

    host.commit_changes("layer", two_layers(host), fill=change)
    tree = host.layers("layer")[0]
    assert (tree / "moved/file1").read_bytes() == bytes(len(BIG))
    assert sorted(os.listdir(tree / "moved")) == ["file1"]
    with host.viewed("layer") as merged:
        assert (merged / "moved/file1").read_bytes() == BIG
        assert len(os.listdir(merged / "moved")) == 12
