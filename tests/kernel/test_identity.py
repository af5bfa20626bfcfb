"""st_dev and st_ino of a file in an active snapshot never change, whatever happens to the file and to the mount.

Programs tell files apart by them (tar, rsync, find, the inode cache of an NFS client). One superblock serves every
user of a snapshot, and the index and the origin attribute keep the number of a file that is copied up.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rig.host import Host
from tests.rig.seen import identities

pytestmark = pytest.mark.root

Identities = dict[str, tuple[int, int]]


def lower(tree: Path) -> None:
    (tree / "d/inner").mkdir(parents=True)
    (tree / "empty").mkdir()
    for name in ("d/file", "d/inner/deep", "chmodded", "chowned", "written", "truncated", "attributed", "untouched"):
        (tree / name).write_bytes(name.encode() * 1000)
    (tree / "symlink").symlink_to("untouched")
    os.mkfifo(tree / "fifo")
    os.link(tree / "untouched", tree / "d/linked")
    os.link(tree / "written", tree / "d/other name")


def upper(tree: Path) -> None:
    (tree / "d").mkdir()
    (tree / "d/above").write_text("in both layers there is a d")
    (tree / "single").write_text("x")


def image(host: Host) -> str:
    host.unpack("lower", fill=lower)
    host.unpack("image", "lower", fill=upper)
    return "image"


def touch_everything(merged: Path) -> None:
    """Copies up by each way there is; creates and deletes nothing."""
    (merged / "chmodded").chmod(0o600)
    (merged / "d/inner").chmod(0o700)
    os.chown(merged / "chowned", 1, 2)
    os.chown(merged / "symlink", 1, 2, follow_symlinks=False)
    os.chown(merged / "fifo", 1, 2)
    with (merged / "written").open("r+b") as stream:
        stream.write(b"x")
    os.truncate(merged / "truncated", 5)
    os.setxattr(merged / "attributed", "user.note", b"x")
    os.utime(merged / "d/file", ns=(1, 2))
    merged.chmod(0o700)


RENAMES = {"d": "renamed", "d/inner": "renamed/again", "empty": "d"}


def rename_directories(merged: Path) -> None:
    (merged / "d").rename(merged / "renamed")
    (merged / "renamed/inner").rename(merged / "renamed/again")
    (merged / "empty").rename(merged / "d")


def renamed(before: Identities) -> Identities:
    """The same inodes under the names that `rename_directories` gives."""
    found = {}
    for path, identity in before.items():
        for old in sorted(RENAMES, key=len, reverse=True):
            if path == old or path.startswith(f"{old}/"):
                path = RENAMES[old] + path.removeprefix(old)
                break
        found[path] = identity
    return found


def test_identity_in_an_active_snapshot(host: Host) -> None:
    with host.running("key", image(host)) as merged, host.again("key") as second:
        before = identities(merged)
        assert len(set(before.values())) == len(before) - 2, "two pairs of hard links, all else apart"
        assert identities(second) == before
        touch_everything(merged)
        assert identities(merged) == identities(second) == before
        rename_directories(merged)
        before = renamed(before)
        assert identities(merged) == identities(second) == before
        (merged / "renamed/file").write_text("after the rename of its directory")
        assert identities(merged) == identities(second) == identities(host.materialized("key")) == before


def test_identity_after_caches_are_dropped(host: Host) -> None:
    with host.running("key", image(host)) as merged:
        before = identities(merged)
        touch_everything(merged)
        rename_directories(merged)
        # <linux/Documentation/admin-guide/sysctl/vm.rst>: dentries and inodes
        Path("/proc/sys/vm/drop_caches").write_text("2")
        assert identities(merged) == renamed(before)


def unmount(host: Host) -> None:
    host.unmount("key")


def restart(host: Host) -> None:
    host.restart()


def kill(host: Host) -> None:
    host.restart(kill=True)


def reboot(host: Host) -> None:
    host.reboot()


def reboot_after_a_kill(host: Host) -> None:
    host.reboot(kill=True)


@pytest.mark.parametrize("parent", [True, False], ids=["", "parentless"])
@pytest.mark.parametrize("how", [unmount, restart, kill, reboot, reboot_after_a_kill], ids=lambda how: how.__name__)
def test_inode_numbers_outlive_mounts_and_daemons(host: Host, how: Callable[[Host], None], parent: bool) -> None:
    """st_dev too while the mount stays; a new mount may get a new number of its own, the same for all its users."""
    stays = how in (restart, kill)
    if parent:
        image(host)
    with host.running("key", "image" if parent else "") as merged:
        if not parent:
            lower(merged)
        before = identities(merged)
        touch_everything(merged)
        if stays:
            how(host)
            assert identities(merged) == before
    if not stays:
        how(host)
    with host.again("key") as merged, host.again("key") as second:
        after = identities(merged)
        assert identities(second) == after
        assert without_device(after) == without_device(before)
        rename_directories(merged)
        assert identities(second) == renamed(after)
    how(host)
    with host.again("key") as merged:
        assert without_device(identities(merged)) == without_device(renamed(before))


def test_identity_of_what_is_made_in_the_snapshot(host: Host) -> None:
    """Files without an origin below: their number is that of the upper inode, for good."""
    with host.running("key", image(host)) as merged:
        (merged / "new").mkdir()
        (merged / "new/file").write_text("x")
        (merged / "new/target").write_text("y")
        os.link(merged / "new/file", merged / "new/link")
        before = identities(merged)
        (merged / "new/file").write_text("longer than before")
        (merged / "new").rename(merged / "d/new")
        (merged / "d/new/file").rename(merged / "d/new/target")
    host.reboot()
    with host.again("key") as merged:
        after = identities(merged)
        assert after["d/new/target"][1] == after["d/new/link"][1] == before["new/file"][1]
        assert after["d/new"][1] == before["new"][1]


def test_a_view_numbers_its_files_as_its_other_mounts_do(host: Host) -> None:
    host.commit_changes("changed", image(host), fill=touch_everything)
    host.client.view("key", "changed")
    with host.again("key") as merged, host.again("key") as second:
        before = identities(merged)
        assert identities(second) == before
        host.restart(kill=True)
        assert identities(merged) == before
    host.unmount("key")
    with host.again("key") as merged:
        assert without_device(identities(merged)) == without_device(before)


def without_device(found: Identities) -> dict[str, int]:
    return {path: inode for path, (_, inode) in found.items()}
