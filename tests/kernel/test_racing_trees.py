"""Trees that change under a walk: what is meant for a file or a directory must never be done to something else.

Proves: whatever races with it, a walk, a copy or a deletion opens nothing but directories and regular files below the
tree's top; and a tree that is deep enough fills no memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from snapshotter import clone, layer, linux
from snapshotter.content import share as share_module
from snapshotter.content.share import STUB, Layout, Rules, share
from snapshotter.durable import FULL, remove_tree
from snapshotter.errors import FailedPrecondition
from snapshotter.overlay.attributes import TRUSTED
from snapshotter.root import SHARDS_OF_OBJECTS
from snapshotter.usage import scan
from snapshotter.walker import Entry
from tests.rig.watch import watched

pytestmark = pytest.mark.root

IMAGE = TRUSTED.of_an_image(is_stripped=True)
ROUNDS = 10


def never() -> bool:
    return False


def exchange(one: Path, other: Path) -> None:
    linux.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), linux.RENAME_EXCHANGE)


def test_a_fifo_in_the_place_of_a_file_is_not_opened_by_a_copy(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As little as a device would be, of which opening can be all it takes."""
    tree, aside = base / "tree", base / "aside"
    tree.mkdir()
    (tree / "f").write_text("content")
    os.mkfifo(aside)
    copy_file = clone._copy_file

    def interrupted(*arguments: Any, **options: Any) -> None:
        exchange(tree / "f", aside)
        copy_file(*arguments, **options)

    monkeypatch.setattr(clone, "_copy_file", interrupted)
    with watched(aside) as events:
        clone.copy_tree(tree, base / "copy", TRUSTED, True)
        assert events() == ["aside moved itself"]
    assert (base / "copy/f").is_fifo()


def test_a_fifo_in_the_place_of_a_file_is_not_opened_to_be_synced(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, aside = base / "tree", base / "aside"
    tree.mkdir()
    (tree / "f").write_text("content")
    os.mkfifo(aside)
    open_entry = layer.open_entry

    def interrupted(entry: Entry) -> int:
        exchange(tree / "f", aside)
        return open_entry(entry)

    monkeypatch.setattr(layer, "open_entry", interrupted)
    with watched(aside) as events:
        layer.finish(tree, IMAGE)
        assert events() == ["aside moved itself"]


def test_an_entry_that_becomes_something_else_is_copied_as_that(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = base / "tree"
    (tree / "directory").mkdir(parents=True)
    (tree / "link").symlink_to("directory")
    (tree / "file").write_text("content")
    (base / "other").mkdir()
    (base / "other/directory").symlink_to("/etc")
    (base / "other/link").mkdir()
    (base / "other/file").symlink_to("/etc/passwd")
    stat_of, swapped = os.stat, set()

    def interrupted(name: Any, **options: Any) -> os.stat_result:
        status = stat_of(name, **options)
        if name in (b"directory", b"link", b"file") and name not in swapped:
            swapped.add(name)
            exchange(tree / os.fsdecode(name), base / "other" / os.fsdecode(name))
        return status

    monkeypatch.setattr(clone.os, "stat", interrupted)
    clone.copy_tree(tree, base / "copy", TRUSTED, True)
    assert (base / "copy/directory").readlink() == Path("/etc")
    assert (base / "copy/link").is_dir()
    assert (base / "copy/file").readlink() == Path("/etc/passwd")
    assert not (base / "copy/link").is_symlink()


def test_an_attribute_that_goes_during_a_copy_fails_it_not(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes metacopy away when it copies data up."""
    (base / "tree").mkdir()
    (base / "tree/f").write_text("content")
    os.setxattr(base / "tree/f", "user.gone", b"")
    getxattr = os.getxattr

    def interrupted(*arguments: Any, **options: Any) -> bytes:
        os.removexattr(base / "tree/f", "user.gone")
        return getxattr(*arguments, **options)

    monkeypatch.setattr(os, "getxattr", interrupted)
    clone.copy_tree(base / "tree", base / "copy", TRUSTED, True)
    assert os.listxattr(base / "copy/f") == []


@contextmanager
def exchanging(*pairs: tuple[Path, Path]) -> Iterator[None]:
    """Somebody exchanges them as fast as they can, until the block ends."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            for one, other in pairs:
                try:
                    exchange(one, other)
                except FileNotFoundError:
                    continue

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def populate(tree: Path) -> list[tuple[Path, Path]]:
    """Directories and files with what they are exchanged for: symlinks to what is not the tree's."""
    outside = tree.parent / "outside"
    pairs = []
    for number in range(8):
        directory, file = tree / f"d{number}", tree / f"d{number}/a/b/file"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"content" * 1000)
        os.link(file, directory / "linked")
        for name, at in {f"swap{number}": outside, f"d{number}/swap": outside / "a"}.items():
            (tree / name).symlink_to(at)
        pairs += [(directory, tree / f"swap{number}"), (directory / "a", directory / "swap")]
    return pairs


def finish(tree: Path) -> None:
    layer.finish(tree, IMAGE)


def strip(tree: Path) -> None:
    layer.strip(tree, TRUSTED, True)


def copy(tree: Path) -> None:
    clone.copy_tree(tree, tree.parent / "copy", TRUSTED, True)


def measure(tree: Path) -> None:
    scan([tree], never)


def delete(tree: Path) -> None:
    remove_tree(tree.parent, tree.name, never)


def shared(tree: Path) -> None:
    place = tree.parent
    objects = place.parent / "objects"
    for shard in SHARDS_OF_OBJECTS:
        (objects / shard).mkdir(parents=True, exist_ok=True)
    for name in ("refs", "stages"):
        (place / name).mkdir()
    layout = Layout(tree, place / "refs", place / "stages", objects, (), False, in_order=True)
    share(layout, Rules(STUB, 4096, (), False, FULL, "run"), 0, 1)


@pytest.mark.parametrize("act", [finish, strip, copy, measure, delete, shared], ids=lambda act: act.__name__)
def test_nothing_outside_is_touched_by_a_walk_that_races_with_symlinks(base: Path, act: Callable[[Path], None]) -> None:
    outside = base / "outside"
    (outside / "a/b").mkdir(parents=True)
    for path in (outside / "a/b/file", outside / "linked", outside / "a/file"):
        path.write_bytes(b"content" * 1000)
        os.setxattr(path, "trusted.overlay.origin", b"not to be stripped")
    inside = [outside, *outside.rglob("*")]
    with watched(*inside) as events:
        for number in range(ROUNDS):
            place = base / f"round{number}"
            tree = place / "tree"
            tree.mkdir(parents=True)
            (place / "outside").symlink_to(outside)
            with exchanging(*populate(tree)), suppress(OSError):  # it may fail, and be tried again
                act(tree)
        assert events() == []
    for number in range(ROUNDS):
        remove_tree(base, f"round{number}", never)


def test_a_directory_of_a_hard_link_that_becomes_a_symlink_is_left_alone(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened again by its path."""
    outside, tree = base / "outside", base / "round/tree"
    (outside / "a/b").mkdir(parents=True)
    (outside / "a/b/file").write_bytes(b"content" * 1000)
    tree.mkdir(parents=True)
    (base / "round/outside").symlink_to(outside)
    pairs = populate(tree)
    share_linked = share_module._Sharer._share_linked

    def interrupted(*arguments: Any) -> None:
        for _, (one, other) in zip(range(2), pairs[1::2], strict=False):
            exchange(one, other)
        share_linked(*arguments)

    monkeypatch.setattr(share_module._Sharer, "_share_linked", interrupted)
    with watched(outside, outside / "a", outside / "a/b", outside / "a/b/file") as events:
        shared(tree)
        assert events() == []


def test_what_is_mounted_in_a_tree_is_no_part_of_a_layer(base: Path) -> None:
    """It would hide from the look what is below it."""
    for kind in ("directory", "file"):
        tree, other = base / f"tree-{kind}", base / f"other-{kind}"
        tree.mkdir()
        for path in (tree / "d", other):
            path.mkdir() if kind == "directory" else path.touch()
        linux.mount(str(other), str(tree / "d"), None, linux.MS_BIND, None)
        with pytest.raises(FailedPrecondition, match='mounted at "d"'):
            layer.finish(tree, IMAGE)
        linux.umount2(str(tree / "d"))
        layer.finish(tree, IMAGE)


def test_a_deep_tree_of_long_names_fills_no_memory(base: Path) -> None:
    """A path of each directory on the way would take half of its depth squared."""
    depth, name = 1500, "n" * 250
    (base / "deep").mkdir()
    fd = os.open(base / "deep", os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        inner = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(os.open("end", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)
    program = (
        "import resource, sys; from pathlib import Path; from snapshotter import clone, layer; "
        "from snapshotter.overlay.attributes import TRUSTED; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; tree = Path(sys.argv[1]); "
        "print(layer.finish(tree, TRUSTED).usage.inodes); clone.copy_tree(tree, tree.parent / 'copy', TRUSTED, False); "
        "print(layer.finish(tree.parent / 'copy', TRUSTED).usage.inodes); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    ran = subprocess.run([sys.executable, "-c", program, base / "deep"], capture_output=True, text=True, check=True)
    inodes, copied, kib = map(int, ran.stdout.split())
    assert inodes == copied == depth + 2
    assert kib < 40_000
