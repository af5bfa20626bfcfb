"""Hard links of an image are one file, whatever is done to one name of it.

With index=on the kernel copies a hard-linked file up once, and names that nobody used find it through the index
alone, which is gone after Commit. So for each thing that can be done to one name:
- the merged view shows what the same act shows in a plain directory, link counts included;
- it shows the same after everything was unmounted and mounted again;
- a child of the committed snapshot, and one of a layer on top of that, show it too, times and capabilities included.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rig.host import Host
from tests.rig.seen import Seen, seen, without_times

pytestmark = pytest.mark.root

MTIME_NS = 1_600_000_000_123_456_789
# <linux/capability.h>, struct vfs_cap_data: revision 2, effective; cap_net_raw
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


def fill(tree: Path) -> None:
    """Three names in three directories for each kind of inode that can have several."""
    for name in ("a", "b", "c"):
        (tree / name).mkdir()
    (tree / "a/file").write_text("old")
    (tree / "a/big").write_bytes(bytes(range(256)) * 1000)
    (tree / "a/suid").write_text("#!")
    (tree / "a/capable").write_text("binary")
    (tree / "a/symlink").symlink_to("/target")
    os.mkfifo(tree / "a/fifo", 0o640)
    (tree / "a/alone").write_text("one name")
    for path in tree.glob("a/*"):
        os.chown(path, 10, 20, follow_symlinks=False)
    (tree / "a/suid").chmod(0o6755)
    os.chmod(tree / "a/fifo", 0o4640)
    for name in ("capable", "fifo"):
        os.setxattr(tree / "a" / name, "security.capability", CAPABILITY)
    os.setxattr(tree / "a/file", "user.note", b"kept")
    for name in ("file", "big", "suid", "capable", "symlink", "fifo"):
        for directory in ("b", "c"):
            os.link(tree / "a" / name, tree / directory / name, follow_symlinks=False)
    for path in sorted(tree.rglob("*"), reverse=True):
        os.utime(path, ns=(MTIME_NS, MTIME_NS), follow_symlinks=False)


def write(top: Path) -> None:
    (top / "a/file").write_text("new and longer")


def write_through_the_last_name(top: Path) -> None:
    (top / "c/file").write_text("new")


def append(top: Path) -> None:
    with (top / "b/big").open("ab") as stream:
        stream.write(b"more")


def truncate(top: Path) -> None:
    os.truncate(top / "a/big", 100)


def chmod(top: Path) -> None:
    (top / "b/file").chmod(0o600)


def chown_files(top: Path) -> None:
    for name in ("file", "big", "suid", "capable"):
        os.chown(top / "a" / name, 1000, 1000)


def chown_others(top: Path) -> None:
    for name in ("symlink", "fifo"):
        os.chown(top / "a" / name, 1000, 1000, follow_symlinks=False)


def set_times_of_special_ones(top: Path) -> None:
    """Copies up and takes neither mode nor capability away: nor must the completion of the other names."""
    for name in ("suid", "capable"):
        os.utime(top / "a" / name, ns=(1, 2))


def set_xattr(top: Path) -> None:
    os.setxattr(top / "c/file", "user.note", b"changed")


def rename(top: Path) -> None:
    (top / "a/file").rename(top / "b/renamed")


def rename_and_write(top: Path) -> None:
    (top / "a/file").rename(top / "b/renamed")
    (top / "b/renamed").write_text("written after")


def write_and_rename(top: Path) -> None:
    (top / "a/file").write_text("written before")
    (top / "a/file").rename(top / "b/renamed")


def rename_directory(top: Path) -> None:
    (top / "a").rename(top / "z")
    (top / "z/file").write_text("below another directory")


def unlink(top: Path) -> None:
    for name in ("file", "suid", "symlink", "fifo"):
        (top / "a" / name).unlink()


def write_and_unlink(top: Path) -> None:
    """The content is then in the index alone."""
    (top / "a/file").write_text("new")
    (top / "a/file").unlink()


def write_and_unlink_all_but_one(top: Path) -> None:
    write_and_unlink(top)
    (top / "b/file").unlink()


def write_and_unlink_all(top: Path) -> None:
    write_and_unlink_all_but_one(top)
    (top / "c/file").unlink()


def link_another(top: Path) -> None:
    os.link(top / "a/file", top / "c/fourth")
    os.link(top / "a/alone", top / "c/second")


def link_another_and_unlink(top: Path) -> None:
    """As many names as before, but not the same."""
    os.link(top / "a/file", top / "c/fourth")
    (top / "b/file").unlink()


def link_and_write(top: Path) -> None:
    os.link(top / "a/file", top / "c/fourth")
    (top / "c/fourth").write_text("through the new name")


def replace_one(top: Path) -> None:
    """As editors and package managers do: breaks the link."""
    (top / "a/temporary").write_text("another file")
    (top / "a/temporary").rename(top / "a/file")


def replace_one_and_write_another(top: Path) -> None:
    replace_one(top)
    (top / "b/file").write_text("still linked with c")


def rename_over_another_name(top: Path) -> None:
    """Of one inode: rename(2) does nothing."""
    (top / "a/file").write_text("new")
    os.rename(top / "a/file", top / "b/file")


def remove_a_directory(top: Path) -> None:
    (top / "b/file").write_text("new")
    for path in (top / "a").iterdir():
        path.unlink()
    (top / "a").rmdir()


def hide_a_directory(top: Path) -> None:
    """A new directory of the same name is opaque: the names below it do not count."""
    remove_a_directory(top)
    (top / "a").mkdir()
    (top / "a/file").write_text("no link of it")


def many(top: Path) -> None:
    write(top)
    append(top)
    chown_files(top)
    chown_others(top)
    (top / "c/fifo").unlink()


ACTS = [
    write, write_through_the_last_name, append, truncate, chmod, chown_files, chown_others,
    set_times_of_special_ones, set_xattr, rename, rename_and_write, write_and_rename, rename_directory, unlink,
    write_and_unlink, write_and_unlink_all_but_one, write_and_unlink_all, link_another, link_another_and_unlink,
    link_and_write, replace_one, replace_one_and_write_another, rename_over_another_name, remove_a_directory,
    hide_a_directory, many,
]  # fmt: skip

Act = Callable[[Path], None]


def act_again(top: Path) -> None:
    """On what the first act left of the second name of each."""
    for name, change in {"file": "second change", "big": "", "suid": "#?"}.items():
        path = top / "c" / name
        if change and path.exists():
            path.write_text(change)
        elif path.exists():
            path.chmod(0o611)


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_hard_links_stay_one_file(host: Host, act: Act) -> None:
    plain = host.base / "plain"
    plain.mkdir()
    fill(plain)
    host.unpack("image", fill=fill)
    host.unpack("image, second layer", "image", fill=lambda tree: (tree / "other").write_text("x"))
    (plain / "other").write_text("x")

    act(plain)
    with host.running("first", "image, second layer") as merged:
        act(merged)
        shown = seen(merged)
    assert without_times(shown) == without_times(seen(plain))
    host.unmount("first")
    with host.again("first") as merged:
        assert seen(merged) == shown
    host.client.commit("one up", "first")
    with host.viewed("one up") as merged:
        assert seen(merged) == shown

    act_again(plain)
    with host.running("second", "one up") as merged:
        assert below_top(merged) == below_top_of(shown)
        act_again(merged)
        shown = seen(merged)
    assert without_times(shown) == without_times(seen(plain))
    host.client.commit("two up", "second")
    with host.viewed("two up") as merged:
        assert seen(merged) == shown
    with host.running("third", "two up") as merged:
        assert below_top(merged) == below_top_of(shown)


def below_top(top: Path) -> dict[str, Seen]:
    return below_top_of(seen(top))


def below_top_of(tree: dict[str, Seen]) -> dict[str, Seen]:
    """The top directory of a new upper was made just now, and has that time."""
    return {path: entry for path, entry in tree.items() if path != "."}


def test_link_counts_are_right_before_the_trash_is_empty(base: Path) -> None:
    """The index holds a link of each of its files: it must be gone when Commit answers, not some time later."""
    with Host(base, environment={"DEDUP_FAILPOINTS": "delete.entry=stall:0.3"}) as host:
        host.unpack("image", fill=fill)
        host.commit_changes("changed", "image", fill=many)
        with host.viewed("changed") as merged:
            links = {"a/file": 3, "b/big": 3, "c/suid": 3, "a/symlink": 3, "a/fifo": 2}
            assert {path: os.lstat(merged / path).st_nlink for path in links} == links
