"""fsck.overlay never raises a false alarm: whatever the kernel leaves behind is clean.

Overlays are made by random operations, mounted with features by chance and with others in between, up to three layers
above one another, each of which was an upper once. And what is corrupted by chance is repaired for good: after -y a
second run finds nothing, and the overlay can be mounted and read.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from snapshotter import linux
from tests.rig import random_overlay
from tests.rig.filesystem import filesystem
from tests.rig.host import Host
from tests.rig.namespace import CHECKOUT
from tests.rig.random_overlay import Directories, fsck, make

pytestmark = pytest.mark.root

FEW, MANY = range(30), range(1000, 4000)
ONCE_WRONG = (277, 347, 683, 1072, 1519, 1605)
"""Seeds that gave false alarms: each mounts with and without the index or nfs_export in turn."""
STEPS = 40


@pytest.fixture
def ground(base: Path) -> Iterator[Path]:
    """A tmpfs: unmounting an overlay syncs the filesystem of its upper."""
    place = base / "t"
    place.mkdir()
    linux.mount("tmpfs", str(place), "tmpfs", 0, "mode=755,size=256m")
    yield place
    linux.umount2(str(place), linux.MNT_DETACH)


def assert_clean(place: Path, seeds: Sequence[int], lowest: Path | None = None) -> None:
    """`lowest`: a directory on another filesystem, for the lowest layer."""
    for seed in seeds:
        overlay, told = make(place / "one", seed, STEPS, place=lowest)
        found = overlay.found()
        assert found == [], f"seed {seed}:\n{told}"
        shutil.rmtree(place / "one")
        if lowest:
            shutil.rmtree(lowest / "lowest")


def test_what_the_kernel_made_is_clean(ground: Path) -> None:
    assert_clean(ground, (*FEW, *ONCE_WRONG))


def test_layers_on_two_filesystems_are_clean(ground: Path, base: Path) -> None:
    """xino matters there, and the handles of each have its UUID."""
    (base / "lowest").mkdir()
    assert_clean(ground, FEW[:20], base / "lowest")


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["tmpfs", "xfs", "btrfs", "ext4"])
def test_what_the_kernel_made_is_clean_on_every_filesystem(base: Path, ground: Path, kind: str) -> None:
    if kind == "tmpfs":
        assert_clean(ground, MANY)
    else:
        with filesystem(kind, base, 512 << 20) as place:
            assert_clean(place, MANY[:300])


def test_overlays_of_a_user_namespace_are_clean(ground: Path) -> None:
    """Made with userxattr, and checked there and from outside, where nobody says so."""
    for seed in FEW[:6]:
        place = ground / str(seed)
        place.mkdir()
        words = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-m", random_overlay.__name__]
        done = subprocess.run(
            [*words, str(place), str(seed), str(STEPS), "userxattr"],
            cwd=CHECKOUT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        top = max(path for path in place.iterdir() if path.name.isdecimal())
        lowers = [*(place / str(number) / "upper" for number in reversed(range(int(top.name)))), place / "lowest"]
        overlay = Directories(top, lowers)
        assert overlay.fsck("-n").stdout == overlay.fsck("-n", more=",userxattr").stdout == "clean\n"


def test_an_overlay_on_a_mounted_overlay_is_clean(ground: Path) -> None:
    inner, _ = make(ground / "inner", 1, STEPS)
    with inner.mount(index="on", redirect_dir="on", metacopy="on") as merged:
        for number, switches in enumerate(({}, {"redirect_dir": "on", "metacopy": "on"}, {"userxattr": None})):
            outer = Directories(ground / str(number), [merged])
            with outer.mount(**switches) as top:
                random_overlay.use(random.Random(number), top, 200)
            assert outer.found("userxattr" in switches) == []


def test_metacopy_files_with_data_only_layers_are_clean(ground: Path) -> None:
    overlay = Directories(ground)
    lower = overlay.lower()
    overlay.data = ground / "data"
    overlay.data.mkdir()
    (overlay.data / "object").write_bytes(b"content")
    for name in ("a", "b"):
        (lower / name).touch()
        os.truncate(lower / name, 7)
        os.setxattr(lower / name, "trusted.overlay.metacopy", b"")
        os.setxattr(lower / name, "trusted.overlay.redirect", b"/object")
    with overlay.mount(index="on", metacopy="on", redirect_dir="on") as merged:
        (merged / "a").chmod(0o600)
        (merged / "b").rename(merged / "c")
        assert (merged / "c").read_bytes() == b"content"
    assert overlay.fsck("-n").returncode == 0
    (overlay.data / "object").unlink()
    done = overlay.fsck("-n")
    assert (done.returncode, done.stdout.count("[metacopy-no-data]")) == (4, 4)


def test_snapshots_of_the_daemon_are_clean(base: Path) -> None:
    with Host(base) as host:
        host.unpack("one", fill=lambda tree: random_overlay.use(random.Random(1), tree, 200))
        host.commit_changes("two", "one", fill=lambda tree: random_overlay.use(random.Random(2), tree, 200))
        host.commit_changes("three", "two", fill=lambda tree: random_overlay.use(random.Random(3), tree, 200))
        lowers = host.layers("three")
        with host.running("active", "three") as merged:
            random_overlay.use(random.Random(4), merged, 200)
        upper = host.upper_of_unmounted("active")
        chain = ":".join(map(str, lowers))
        options = f"lowerdir={chain}::{host.root}/objects,upperdir={upper},workdir={upper.with_name('work')}"
        done = fsck("-n", "-o", options)
        assert (done.returncode, done.stdout) == (0, "clean\n"), done


def test_a_corruption_by_chance_is_repaired_for_good(ground: Path) -> None:
    repaired = 0
    for seed in FEW:
        overlay, _ = make(ground / "one", seed, STEPS)
        corrupt(random.Random(seed), [overlay.upper, overlay.work / "index", *overlay.lowers])
        done = overlay.fsck("-y")
        assert done.returncode in (0, 1, 4), done
        again = overlay.fsck("-y")
        assert again.returncode == (4 if done.returncode == 4 else 0), (seed, done, again)
        assert again.stdout.count("Repairing") == 0, (seed, again)
        if done.returncode == 1:
            repaired += 1
            with overlay.mount(index="on", metacopy="on", redirect_dir="on") as merged:
                for directory, _, names in os.walk(merged, onerror=_fail):
                    for name in names:
                        random_overlay.read(Path(directory, name))
        shutil.rmtree(ground / "one")
    assert repaired > len(FEW) // 4


def _fail(error: OSError) -> None:
    raise error


def corrupt(chance: random.Random, trees: list[Path]) -> None:
    """Takes attributes away, and brings others and whiteouts, at some places."""
    for tree in trees:
        for path in [tree, *sorted(tree.rglob("*"))] if tree.exists() else []:
            if chance.random() > 0.1:
                continue
            attributes = [
                name for name in os.listxattr(path, follow_symlinks=False) if name.startswith("trusted.overlay.")
            ]
            if attributes:
                name = chance.choice(attributes)
                os.removexattr(path, name, follow_symlinks=False)
            elif path.is_dir() and path != tree:
                if chance.random() < 0.5:
                    os.setxattr(path, "trusted.overlay.redirect", b"/" + chance.choice((b"a", b"b", b"c/d")))
                else:
                    os.mknod(path / "orphan", 0o020000, 0)
