"""Every distinct file is stored once, and nobody can tell.

- What is one object, and what is not, under each strategy; raw: by the inodes below the root.
- What a container does to a file that is shared, reaches nobody else.
- What cannot be shared stays private, and the commit succeeds.
- An object goes with the last layer that uses it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3

from snapshotter import linux
from snapshotter.cli.mounting import mount_all
from snapshotter.errors import FailedPrecondition
from tests.rig.filesystem import filesystem
from tests.rig.host import Fill, Host, lowers_of, nothing, upper_of
from tests.rig.namespace import RigError
from tests.rig.random_tree import ACL, CAPABILITY, data
from tests.rig.seen import Seen, seen, xattrs_of

pytestmark = pytest.mark.root

TIME_NS = 1_500_000_000_123_456_789
CONTENT, OTHER = data(1, 10_000), data(2, 10_000)
BLOCK = 4096
EXT4_MOST_LINKS = 65_000
NEEDED_BY_STUBS = ("data_only", "metacopy", "redirect_dir")
METACOPY, REDIRECT = "trusted.overlay.metacopy", "trusted.overlay.redirect"
DIGEST = "trusted.dedup.blake3"
"""On an object: the whole hash."""


@contextmanager
def sharing(base: Path, strategy: str, **settings: object) -> Iterator[Host]:
    with Host(base, dedup={"strategy": strategy, **settings}) as host:
        yield host


@pytest.fixture(params=["stub", "hardlink"])
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def host(base: Path, strategy: str) -> Iterator[Host]:
    with sharing(base, strategy) as running:
        yield running


@pytest.fixture
def stubs(base: Path) -> Iterator[Host]:
    with sharing(base, "stub") as running:
        yield running


@pytest.fixture
def links(base: Path) -> Iterator[Host]:
    with sharing(base, "hardlink") as running:
        yield running


# -- how it looks below the root


def write(path: Path, content: bytes = CONTENT, *, mode: int = 0o644, time_ns: int = TIME_NS) -> None:
    """The same file wherever it is written, and the directories that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    os.utime(path, ns=(time_ns, time_ns))


def files(*paths: str, content: bytes = CONTENT) -> Fill:
    """A layer of equal files."""

    def fill(tree: Path) -> None:
        for path in paths:
            write(tree / path, content)

    return fill


def tree_of(host: Host, layer: str) -> Path:
    return host.layers(layer)[0]


def is_stub(path: Path) -> bool:
    return {METACOPY, REDIRECT} <= xattrs_of(path).keys()


def object_of(host: Host, path: Path) -> Path | None:
    """Of a file in a layer's tree."""
    if is_stub(path):
        return host.root / "objects" / os.fsdecode(xattrs_of(path)[REDIRECT]).lstrip("/")
    return next((found for found in objects(host) if found.samefile(path)), None)


def objects(host: Host) -> list[Path]:
    return sorted((host.root / "objects").glob("*/*"))


def references(tree: Path) -> int:
    """How many objects the layer uses."""
    refs = tree.parent / "refs"
    return len(list(refs.iterdir())) if refs.exists() else 0


def is_shared(host: Host, layer: str, path: str = "file") -> bool:
    return object_of(host, tree_of(host, layer) / path) is not None


def inode(path: Path) -> int:
    return path.lstat().st_ino


def contents(host: Host, layer: str) -> dict[str, bytes]:
    with host.viewed(layer) as merged:
        return {path: entry.content for path, entry in seen(merged).items() if stat.S_ISREG(entry.mode)}


def without_links(tree: Mapping[str, Seen]) -> dict[str, Seen]:
    """An object's links count, and an overlay's hidden ones."""
    return {path: replace(entry, links=0) for path, entry in tree.items()}


# -- what is one object


def test_a_file_twice_in_a_layer(host: Host, strategy: str) -> None:
    host.unpack("image", fill=files("a", "b"))
    tree = tree_of(host, "image")
    assert inode(tree / "a") != inode(tree / "b"), "no image linked them"
    if strategy == "stub":
        assert object_of(host, tree / "a") == object_of(host, tree / "b") == objects(host)[0]
        assert (tree / "a").lstat().st_nlink == 1
        assert (tree / "a").lstat().st_blocks == 0
    assert len(objects(host)) == references(tree) == (1 if strategy == "stub" else 2)
    with host.running("key", "image") as merged:
        assert (merged / "a").stat().st_ino != (merged / "b").stat().st_ino
        (merged / "a").write_bytes(OTHER)
        assert (merged / "b").read_bytes() == CONTENT


def test_a_file_in_a_layer_and_in_its_parent(host: Host, strategy: str) -> None:
    host.unpack("image", fill=files("a"))
    host.unpack("child", "image", fill=files("b"))
    host.commit_changes("grandchild", "child", fill=files("c"))
    trees = [tree_of(host, name) for name in ("image", "child", "grandchild")]
    assert len({inode(tree / name) for tree, name in zip(trees, "abc", strict=True)}) == 3
    assert len(objects(host)) == (1 if strategy == "stub" else 3)
    with host.running("key", "grandchild") as merged:
        (merged / "b").write_bytes(OTHER)
        assert [(merged / name).read_bytes() for name in "abc"] == [CONTENT, OTHER, CONTENT]


def test_a_file_that_a_layer_writes_over_an_equal_one_of_its_parent(host: Host) -> None:
    host.unpack("image", fill=files("a"))
    host.unpack("child", "image", fill=files("a"))
    assert inode(tree_of(host, "image") / "a") != inode(tree_of(host, "child") / "a")
    assert contents(host, "child") == {"a": CONTENT}


def test_a_file_in_two_images(host: Host, strategy: str) -> None:
    host.unpack("image", fill=files("a"))
    host.unpack("other", fill=files("b"))
    one, other = tree_of(host, "image") / "a", tree_of(host, "other") / "b"
    assert object_of(host, one) == object_of(host, other) == objects(host)[0]
    assert len(objects(host)) == 1
    assert (inode(one) == inode(other)) == (strategy == "hardlink")


def test_as_many_instances_as_one_chain_needs(links: Host) -> None:
    links.unpack("image", fill=files("a", "b", "c"))
    links.unpack("other", fill=files("a"))
    links.unpack("other child", "other", fill=files("b", "c"))
    inodes = [{inode(tree / name) for tree in links.layers(top) for name in "abc" if (tree / name).exists()}
              for top in ("image", "other child")]  # fmt: skip
    assert inodes[0] == inodes[1]
    assert len(objects(links)) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.chmod(0o600),
        lambda path: os.chown(path, 1000, 0),
        lambda path: os.chown(path, 0, 1000),
        lambda path: os.utime(path, ns=(TIME_NS, TIME_NS + 1)),
        lambda path: os.setxattr(path, "user.note", b"x"),
        lambda path: os.setxattr(path, "security.capability", CAPABILITY),
        lambda path: os.setxattr(path, "system.posix_acl_access", ACL),
    ],
    ids=["mode", "uid", "gid", "mtime", "xattr", "capability", "acl"],
)
def test_equal_content_with_other_metadata(host: Host, strategy: str, change: Callable[[Path], None]) -> None:
    def fill(tree: Path) -> None:
        write(tree / "plain")
        write(tree / "other")
        change(tree / "other")
        os.utime(tree / "other", ns=(TIME_NS, (tree / "other").stat().st_mtime_ns))
        shown.update(seen(tree))

    shown: dict[str, Seen] = {}
    host.unpack("image", fill=fill)
    assert len(objects(host)) == (1 if strategy == "stub" else 2)
    with host.viewed("image") as merged:
        found = without_links(seen(merged))
    assert {name: found[name] for name in ("plain", "other")} == {
        name: replace(shown[name], links=0) for name in ("plain", "other")
    }


def test_atime_is_no_reason_against_sharing(links: Host) -> None:
    def read_long_ago(tree: Path) -> None:
        write(tree / "b")
        os.utime(tree / "b", ns=(1, TIME_NS))

    links.unpack("image", fill=files("a"))
    links.unpack("other", fill=read_long_ago)
    assert len(objects(links)) == 1


def test_a_layer_that_gets_its_parent_at_commit(host: Host, strategy: str) -> None:
    """Unpacked beside its parent, not on it."""
    host.unpack("image", fill=files("a"))
    files("b")(upper_of(host.client.prepare("extract-1 child")))
    host.client.commit("child", "extract-1 child", parent="image")
    below, above = tree_of(host, "image") / "a", tree_of(host, "child") / "b"
    assert inode(below) != inode(above)
    assert len(objects(host)) == (1 if strategy == "stub" else 2)
    with host.running("key", "child") as merged:
        (merged / "a").write_bytes(OTHER)
        assert (merged / "b").read_bytes() == CONTENT


def test_a_container_on_layers_of_all_strategies(base: Path) -> None:
    """Each unpacked under another; all are one chain, and each is shared with the same layer of another chain."""
    with sharing(base, "stub") as host:
        for number, strategy in enumerate(("stub", "hardlink", "off", "hardlink", "stub")):
            host.configure(dedup={"strategy": strategy})
            host.restart()
            for chain in "ab":
                parent = f"{chain}{number - 1}" if number else ""
                host.unpack(f"{chain}{number}", parent, fill=files(f"file{number}", f"second{number}"))
        expected = {f"{name}{number}": CONTENT for number in range(5) for name in ("file", "second")}
        for chain in "ab":
            assert contents(host, f"{chain}4") == expected
            with host.running(f"key {chain}", f"{chain}4") as merged:
                (merged / "file1").write_bytes(OTHER)
                found = {path.name: path.read_bytes() for path in merged.iterdir()}
                assert found == {**expected, "file1": OTHER}
        assert contents(host, "a4") == expected


def test_off_shares_nothing(base: Path) -> None:
    with sharing(base, "off") as host:
        host.unpack("image", fill=files("a", "b"))
        host.commit_changes("child", "image", fill=files("c"))
        assert objects(host) == []
        assert (tree_of(host, "child") / "c").lstat().st_nlink == 1


@pytest.mark.parametrize(
    ("mode", "off", "is_link"),
    [("daemon", "", False), ("client", "", True), *(("daemon", name, True) for name in NEEDED_BY_STUBS)],
)
def test_auto(base: Path, mode: str, off: str, is_link: bool) -> None:
    """Stubs where the daemon mounts and the kernel has what they need, links elsewhere."""
    with Host(base, mode=mode, overlay={off: "off"} if off else {}) as host:
        host.unpack("image", fill=files("file"))
        file = tree_of(host, "image") / "file"
        assert is_stub(file) != is_link
        assert object_of(host, file) is not None


@pytest.mark.parametrize("name", NEEDED_BY_STUBS)
def test_a_store_with_stubs_is_refused_without_what_they_need(stubs: Host, name: str) -> None:
    stubs.unpack("image", fill=files("file"))
    stubs.stop()
    stubs.configure(overlay={name: "off"})
    with pytest.raises(RigError, match="exited with 5"):
        stubs.start()
    stubs.daemon.process = None
    assert name in stubs.daemon.log_text().splitlines()[-1]
    stubs.configure()
    stubs.start()
    assert contents(stubs, "image") == {"file": CONTENT}


def test_a_chain_of_stubs_reads_right_in_client_mode(base: Path) -> None:
    with sharing(base, "stub") as host:
        host.unpack("image", fill=files("a", "d/b"))
        host.commit_changes("child", "image", fill=lambda merged: (merged / "a").chmod(0o600))
        before = {name: everything(host, name) for name in ("image", "child")}
        host.configure("client")
        host.restart()
        assert {name: everything(host, name) for name in ("image", "child")} == before
        (mount,) = host.client.prepare("key", "child")
        assert any(f"::{host.root}/objects" in option for option in mount.options)
        with host.again("key") as merged:
            assert (merged / "a").read_bytes() == (merged / "d/b").read_bytes() == CONTENT
            files("d/b", "c", content=OTHER)(merged)
        host.client.commit("grandchild", "key")
        assert contents(host, "grandchild") == {"a": CONTENT, "d/b": OTHER, "c": OTHER}
        host.unpack("great-grandchild", "grandchild", fill=files("e"))
        assert is_shared(host, "great-grandchild", "e")
        assert not is_stub(tree_of(host, "great-grandchild") / "e")
        assert contents(host, "great-grandchild") == {"a": CONTENT, "d/b": OTHER, "c": OTHER, "e": CONTENT}


def everything(host: Host, layer: str) -> dict[str, Seen]:
    with host.viewed(layer) as merged:
        return without_links(seen(merged))


def test_an_extraction_on_top_of_stubs_gets_plain_lowers(stubs: Host) -> None:
    """What unpacks adds options of its own."""
    stubs.unpack("image", fill=files("a"))
    (mount,) = stubs.client.prepare("extract-1 child", "image")
    assert not any("objects" in option for option in mount.options)
    assert len(lowers_of(mount)) == 1


def test_a_view_that_is_named_like_an_extraction_reads_right(stubs: Host) -> None:
    stubs.unpack("image", fill=files("a"))
    stubs.unpack("child", "image", fill=files("b"))
    with stubs.mounted(stubs.client.view("extract-1 child", "child")) as merged:
        assert (merged / "a").read_bytes() == (merged / "b").read_bytes() == CONTENT


@pytest.mark.parametrize("is_unpacked", [True, False])
def test_ten_commits_race_for_one_new_object(host: Host, strategy: str, is_unpacked: bool) -> None:
    keys = [f"extract-1 {number}" if is_unpacked else f"key {number}" for number in range(10)]
    for key in keys:
        mounts = host.client.prepare(key)
        if is_unpacked:
            files("file")(upper_of(mounts))
        else:
            with host.mounted(mounts) as merged:
                files("file")(merged)
    with ThreadPoolExecutor(len(keys)) as pool:
        list(pool.map(lambda key: host.client.commit(f"layer of {key}", key), keys))
    assert len(objects(host)) == 1
    trees = [tree_of(host, f"layer of {key}") for key in keys]
    assert {object_of(host, tree / "file") for tree in trees} == set(objects(host))
    expected_links = 1 + len(keys) * (1 if strategy == "stub" else 2)
    assert objects(host)[0].stat().st_nlink == expected_links
    for key in keys:
        assert contents(host, f"layer of {key}") == {"file": CONTENT}


# -- what is none


def test_files_of_less_than_a_block_are_no_stubs(stubs: Host) -> None:
    def fill(tree: Path) -> None:
        for size in (1, BLOCK - 1, BLOCK, BLOCK + 1):
            write(tree / str(size), data(1, size))

    stubs.unpack("image", fill=fill)
    tree = tree_of(stubs, "image")
    assert {path.name for path in tree.iterdir() if is_stub(path)} == {str(BLOCK), str(BLOCK + 1)}
    assert contents(stubs, "image") == {str(size): data(1, size) for size in (1, BLOCK - 1, BLOCK, BLOCK + 1)}


def test_the_least_size_of_a_stub_can_be_set(base: Path) -> None:
    def hundred(tree: Path) -> None:
        for size in (99, 100):
            write(tree / str(size), data(1, size))

    with sharing(base, "stub", stub_min_bytes=100) as host:
        host.unpack("image", fill=hundred)
        assert {path.name for path in tree_of(host, "image").iterdir() if is_stub(path)} == {"100"}


def test_small_files_are_linked(links: Host) -> None:
    for name in ("image", "other"):
        links.unpack(name, fill=files("file", content=b"x"))
    assert inode(tree_of(links, "image") / "file") == inode(tree_of(links, "other") / "file")


def test_empty_files_are_never_shared(base: Path, strategy: str) -> None:
    with sharing(base, strategy, stub_min_bytes=1) as host:
        for name in ("image", "other"):
            host.unpack(name, fill=files("a", "b", content=b""))
        host.commit_changes("child", "image", fill=files("c", content=b""))
        assert objects(host) == []
        assert (tree_of(host, "image") / "a").lstat().st_nlink == 1
        with host.running("key", "child") as merged:
            (merged / "a").write_bytes(b"x")
            assert [(merged / name).read_bytes() for name in "abc"] == [b"x", b"", b""]


CRON = ("etc/crontab", "etc/cron.d/job", "etc/cron.daily/deep/job", "var/spool/cron/crontabs/root")
NOT_CRON = ("etc/other", "opt/etc/crontab", "var/spool/cronjobs", "cron", "var/spool/cron.d/x")


def test_paths_that_are_never_linked(links: Host) -> None:
    """cron refuses a file with several links."""
    for name in ("image", "other"):
        links.unpack(name, fill=files(*CRON, *NOT_CRON))
    tree, other = tree_of(links, "image"), tree_of(links, "other")
    assert {path for path in (*CRON, *NOT_CRON) if (tree / path).lstat().st_nlink == 1} == set(CRON)
    assert all(inode(tree / path) in {inode(other / other_path) for other_path in NOT_CRON} for path in NOT_CRON)
    with links.viewed("image") as merged:
        assert (merged / CRON[0]).stat().st_nlink == 1


def test_paths_that_are_never_linked_can_be_set(base: Path) -> None:
    with sharing(base, "hardlink", never_link=["opt/*.conf"]) as host:
        host.unpack("image", fill=files("opt/a.conf", "opt/b", "opt/d/c.conf", "etc/crontab"))
        tree = tree_of(host, "image")
        private = {path for path in tree.rglob("*") if path.is_file() and path.lstat().st_nlink == 1}
        assert private == {tree / "opt/a.conf"}


def test_a_second_name_of_a_file_that_is_never_linked(links: Host) -> None:
    """The image linked them itself."""

    def fill(tree: Path) -> None:
        files("etc/crontab")(tree)
        os.link(tree / "etc/crontab", tree / "name")

    for name in ("image", "other"):
        links.unpack(name, fill=fill)
    assert (tree_of(links, "image") / "name").lstat().st_nlink == 2


def test_hard_links_of_the_image_stay(host: Host, strategy: str) -> None:
    def fill(tree: Path) -> None:
        files("d/first", "unrelated")(tree)
        (tree / "e").mkdir()
        for name in ("second", "e/third"):
            os.link(tree / "d/first", tree / name)

    for name in ("image", "other"):
        host.unpack(name, fill=fill)
    assert len(objects(host)) == (1 if strategy == "stub" else 2)
    names = ("d/first", "second", "e/third")
    for layer in ("image", "other"):
        assert is_shared(host, layer, "second")
        with host.viewed(layer) as merged:
            assert len({inode(merged / name) for name in names}) == 1
            assert inode(merged / "unrelated") != inode(merged / "second")
            if strategy == "stub":
                assert (merged / "second").stat().st_nlink == 3
    with host.running("key", "image") as merged:
        (merged / "second").write_bytes(OTHER)
        assert [(merged / name).read_bytes() for name in (*names, "unrelated")] == [OTHER] * 3 + [CONTENT]
    host.client.commit("child", "key")
    assert contents(host, "child") == {**dict.fromkeys(names, OTHER), "unrelated": CONTENT}
    assert contents(host, "other") == dict.fromkeys((*names, "unrelated"), CONTENT)


def test_a_file_whose_mode_alone_a_container_changed(host: Host) -> None:
    """Such a file has no data of its own: there is nothing to share but zeros."""
    host.unpack("image", fill=files("file", "other"))
    before = objects(host)
    host.commit_changes("child", "image", fill=lambda merged: (merged / "file").chmod(0o600))
    file = tree_of(host, "child") / "file"
    assert METACOPY in xattrs_of(file)
    assert REDIRECT not in xattrs_of(file)
    assert file.lstat().st_nlink == 1
    assert objects(host) == before
    host.commit_changes("grandchild", "child", fill=lambda merged: os.chown(merged / "file", 7, 7))
    host.unpack("unpacked", "grandchild", fill=files("new"))
    for name in ("child", "grandchild", "unpacked"):
        with host.viewed(name) as merged:
            assert (merged / "file").read_bytes() == CONTENT
            assert stat.S_IMODE((merged / "file").stat().st_mode) == 0o600
    with host.running("key", "unpacked") as merged:
        with (merged / "file").open("ab") as stream:
            stream.write(b"more")
        assert (merged / "file").read_bytes() == CONTENT + b"more"
    assert contents(host, "unpacked")["file"] == CONTENT


@pytest.mark.parametrize("how", ["renamed", "linked", "in a renamed directory"])
def test_a_file_that_a_container_moved(host: Host, how: str) -> None:
    """overlay leaves a redirect to the old path; two of them in a row must lead to the content."""

    def move(merged: Path) -> None:
        if how == "renamed":
            (merged / "d/file").rename(merged / "moved")
        elif how == "linked":
            os.link(merged / "d/file", merged / "moved")
        else:
            (merged / "d").rename(merged / "e")

    host.unpack("image", fill=files("d/file"))
    host.commit_changes("child", "image", fill=move)
    shown = contents(host, "child")
    assert set(shown.values()) == {CONTENT}
    path = sorted(shown)[-1]
    host.commit_changes("grandchild", "child", fill=lambda merged: (merged / path).rename(merged / "again"))
    assert contents(host, "grandchild")["again"] == CONTENT
    with host.running("key", "grandchild") as merged:
        os.truncate(merged / "again", 100)
        assert (merged / "again").read_bytes() == CONTENT[:100]


@pytest.mark.parametrize("flag", [0x10, 0x20], ids=["immutable", "append-only"])
def test_a_file_that_cannot_be_linked_stays_private(host: Host, flag: int) -> None:
    def fill(tree: Path) -> None:
        files("a/file", "b/file")(tree)
        set_flags(tree / "a/file", flag)

    host.unpack("another", fill=files("file"))
    host.unpack("image", fill=fill)
    assert not is_shared(host, "image", "a/file")
    assert is_shared(host, "image", "b/file")
    assert contents(host, "image") == {"a/file": CONTENT, "b/file": CONTENT}
    host.client.remove("image")
    host.client.remove("another")
    host.client.cleanup()
    assert objects(host) == []


def set_flags(path: Path, flags: int) -> None:
    """chattr(1)"""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, linux.FS_IOC_SETFLAGS, struct.pack("l", flags))
    finally:
        os.close(fd)


def test_a_file_in_an_immutable_directory(host: Host) -> None:
    """Its name cannot be given to another inode."""

    def fill(tree: Path) -> None:
        files("d/file", "other")(tree)
        set_flags(tree / "d", 0x10)

    for name in ("image", "other"):
        host.unpack(name, fill=fill)
    for name in ("image", "other"):
        assert contents(host, name) == {"d/file": CONTENT, "other": CONTENT}
        assert not is_stub(tree_of(host, name) / "d/file")
        assert is_shared(host, name, "other")
    for name in ("image", "other"):
        host.client.remove(name)
    host.client.cleanup()
    assert objects(host) == []


def test_a_file_that_somebody_has_open_for_writing_stays_private(host: Host) -> None:
    upper = upper_of(host.client.prepare("extract-1 image"))
    files("file", "other")(upper)
    with (upper / "file").open("r+b", buffering=0) as stream:
        host.client.commit("image", "extract-1 image")
        assert not is_shared(host, "image")
        stream.write(b"written too late")
    host.unpack("second", fill=files("file"))
    assert contents(host, "second") == {"file": CONTENT}
    assert contents(host, "image")["other"] == CONTENT


def test_an_upper_that_somebody_has_mounted(host: Host, base: Path) -> None:
    """They go on writing into it."""
    host.unpack("another", fill=files("file"))
    mounts = host.client.prepare("extract-1 image", "another")
    files("file", "new", content=OTHER)(upper_of(mounts))
    merged = base / "merged"
    merged.mkdir()
    mount_all(mounts, str(merged))
    try:
        host.client.commit("image", "extract-1 image")
        host.unpack("second", fill=files("file", "new", content=OTHER))
        for name in ("file", "new"):
            (merged / name).write_bytes(b"x")
        for layer in ("image", "second"):
            assert contents(host, layer) == {"file": OTHER, "new": OTHER}
    finally:
        linux.umount2(str(merged))


def test_an_open_writer_at_a_commit_writes_into_no_object(host: Host) -> None:
    host.unpack("image", fill=files("file"))
    with host.running("key", "image") as merged:
        files("new", content=OTHER)(merged)
        with (merged / "new").open("r+b", buffering=0) as stream:
            host.client.commit("child", "key")
            host.unpack("another", fill=files("new", content=OTHER))
            stream.write(b"written too late")
    assert contents(host, "child") == {"file": CONTENT, "new": OTHER}
    assert contents(host, "another") == {"new": OTHER}


# -- nothing visible changes


def rich(tree: Path) -> None:
    """Every kind of inode, every kind of attribute."""
    files("plain", "d/twin", "d/inner/third")(tree)
    write(tree / "suid", mode=0o6755)
    write(tree / "none", mode=0)
    write(tree / "small", b"x")
    write(tree / "empty", b"")
    write(tree / "not-utf8-\udcff\udcfe")
    write(tree / "capable", mode=0o755)
    os.setxattr(tree / "capable", "security.capability", CAPABILITY)
    write(tree / "acl")
    os.setxattr(tree / "acl", "system.posix_acl_access", ACL)
    write(tree / "noted")
    os.setxattr(tree / "noted", "user.note", b"n" * 500)
    os.setxattr(tree / "noted", "trusted.note", b"\0")
    write(tree / "owned")
    os.chown(tree / "owned", 3_000_000_000, 2_999_999_999)
    write(tree / "first")
    os.link(tree / "first", tree / "d/second")
    (tree / "symlink").symlink_to("plain")
    os.mkfifo(tree / "fifo")
    os.mknod(tree / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    (tree / "d/sticky").mkdir(mode=0o1777)
    for number, path in enumerate(sorted([tree, *tree.rglob("*")], reverse=True)):
        os.utime(path, ns=(TIME_NS, TIME_NS + number % 3), follow_symlinks=False)


def change_some(merged: Path) -> None:
    (merged / "plain").chmod(0o600)
    (merged / "d/second").write_bytes(OTHER)
    (merged / "noted").rename(merged / "d/noted")
    (merged / "d/inner").rename(merged / "inner")
    files("new", "d/newer")(merged)
    (merged / "empty").unlink()
    for number, path in enumerate(sorted([merged, *merged.rglob("*")], reverse=True)):
        os.utime(path, ns=(TIME_NS, TIME_NS + number % 3), follow_symlinks=False)


def test_a_tree_reads_the_same_with_and_without(base: Path) -> None:
    shown = []
    for strategy in ("off", "stub", "hardlink"):
        (base / strategy).mkdir()
        with sharing(base / strategy, strategy) as host:
            host.unpack("before", fill=rich)
            host.unpack("image", fill=rich)
            with host.running("key", "image") as merged:
                change_some(merged)
                active = seen(merged)
            host.client.commit("child", "key")
            child = everything(host, "child")
            assert child == without_links(active)
            shown.append((everything(host, "image"), child))
    assert shown[0] == shown[1] == shown[2]


def test_times_of_directories_stay(host: Host) -> None:
    def fill(tree: Path) -> None:
        files("d/inner/a", "d/b", "c")(tree)
        for number, path in enumerate((tree / "d/inner", tree / "d", tree)):
            os.utime(path, ns=(TIME_NS + number, TIME_NS + number))

    for name in ("image", "other"):
        host.unpack(name, fill=fill)
    with host.viewed("other") as merged:
        times = [(merged / path).stat().st_mtime_ns for path in ("d/inner", "d", ".")]
    assert times == [TIME_NS, TIME_NS + 1, TIME_NS + 2]
    assert is_shared(host, "other", "d/inner/a")


def test_sparse_files_stay_sparse_and_right(host: Host) -> None:
    size = 64 << 20

    def fill(tree: Path) -> None:
        with (tree / "file").open("wb") as stream:
            stream.seek(size // 2)
            stream.write(CONTENT)
            stream.truncate(size)
        os.utime(tree / "file", ns=(TIME_NS, TIME_NS))

    for name in ("image", "other"):
        host.unpack(name, fill=fill)
    assert len(objects(host)) == 1
    assert objects(host)[0].stat().st_blocks * 512 < 1 << 20
    with host.viewed("other") as merged, (merged / "file").open("rb") as stream:
        status = os.fstat(stream.fileno())
        assert status.st_size == size
        assert len(CONTENT) <= status.st_blocks * 512 < 1 << 20
        for at in (0, size // 2 - BLOCK, size - BLOCK):
            stream.seek(at)
            expected = bytes(BLOCK) + CONTENT[:BLOCK] if at == size // 2 - BLOCK else bytes(BLOCK)
            assert stream.read(len(expected)) == expected


def test_big_files_that_differ_in_their_last_byte(host: Host) -> None:
    """Big ones are hashed in another way."""
    size = 33 << 20

    def fill(tree: Path) -> None:
        for name, last in {"a": b"x", "b": b"x", "c": b"y"}.items():
            with (tree / name).open("wb") as stream:
                stream.write(CONTENT)
                stream.seek(size)
                stream.write(last)
            os.utime(tree / name, ns=(TIME_NS, TIME_NS))

    host.unpack("image", fill=fill)
    host.unpack("other", fill=fill)
    digests = {name: blake3(CONTENT.ljust(size, b"\0") + last).digest() for name, last in (("a", b"x"), ("c", b"y"))}
    for layer in ("image", "other"):
        with host.viewed(layer) as merged:
            for name, digest in {**digests, "b": digests["a"]}.items():
                assert blake3((merged / name).read_bytes()).digest() == digest
    one, twin, different = (object_of(host, tree_of(host, "other") / name) for name in "abc")
    assert different not in (one, twin)
    assert None not in (one, twin, different)


def test_a_stub_takes_no_block_of_its_own(stubs: Host) -> None:
    """Its attributes fit into an inode of 256 bytes, which ext4 makes."""
    stubs.unpack("image", fill=files(*(f"file{number}" for number in range(20))))
    assert {path.lstat().st_blocks for path in tree_of(stubs, "image").iterdir()} == {0}
    assert all(len(xattrs_of(path)[REDIRECT]) <= 24 for path in tree_of(stubs, "image").iterdir())


# -- what a container does to a shared file


def append(path: Path) -> bytes:
    with path.open("ab") as stream:
        stream.write(b"more")
    return CONTENT + b"more"


def overwrite(path: Path) -> bytes:
    with path.open("r+b") as stream:
        stream.write(b"start")
    return b"start" + CONTENT[5:]


def open_truncating(path: Path) -> bytes:
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    return b""


def shrink(path: Path) -> bytes:
    os.truncate(path, 5000)
    return CONTENT[:5000]


def grow(path: Path) -> bytes:
    os.truncate(path, 20_000)
    return CONTENT.ljust(20_000, b"\0")


def write_mapped(path: Path) -> bytes:
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as memory:
        memory[:5] = b"start"
    return b"start" + CONTENT[5:]


def chmod(path: Path) -> bytes:
    path.chmod(0o600)
    return CONTENT


def chmod_and_append(path: Path) -> bytes:
    path.chmod(0o600)
    return append(path)


def set_capability(path: Path) -> bytes:
    os.setxattr(path, "security.capability", CAPABILITY)
    return CONTENT


def rename_over_itself(path: Path) -> bytes:
    path.with_name("new").write_bytes(OTHER)
    path.with_name("new").rename(path)
    return OTHER


def link_and_write(path: Path) -> bytes:
    os.link(path, path.with_name("another name"))
    path.with_name("another name").write_bytes(OTHER)
    return OTHER


def punch_a_hole(path: Path) -> bytes:
    subprocess.run(["fallocate", "--punch-hole", "--offset=0", f"--length={BLOCK}", path], check=True)
    return bytes(BLOCK) + CONTENT[BLOCK:]


EDITS = [
    append, overwrite, open_truncating, shrink, grow, write_mapped, chmod, chmod_and_append, set_capability,
    rename_over_itself, link_and_write, punch_a_hole,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_what_a_container_does_to_a_shared_file_reaches_nobody_else(host: Host, edit: Callable[[Path], bytes]) -> None:
    for name in ("image", "other"):
        host.unpack(name, fill=files("file", "twin"))
    stored = {path: (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns) for path in objects(host)}
    with (
        host.viewed("other") as view,
        host.running("neighbour", "image") as neighbour,
        host.running("stranger", "other") as stranger,
        host.running("key", "image") as merged,
    ):
        before = {top: without_links(seen(top)) for top in (view, neighbour, stranger)}
        expected = edit(merged / "file")
        assert (merged / "file").read_bytes() == expected
        assert (merged / "twin").read_bytes() == CONTENT
        assert {top: without_links(seen(top)) for top in before} == before
        shown = without_links(seen(merged))
    host.client.commit("child", "key")
    assert everything(host, "child") == shown
    assert contents(host, "child")["file"] == expected
    for path, was in stored.items():
        assert (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns) == was
    host.unmount("stranger")
    with host.again("stranger") as stranger:
        assert (stranger / "file").read_bytes() == CONTENT


# -- what is in the way


def a_file(path: Path) -> None:
    write(path, OTHER)


def a_directory(path: Path) -> None:
    path.mkdir(parents=True)


def an_opaque_directory(path: Path) -> None:
    a_directory(path)
    os.setxattr(path, "trusted.overlay.opaque", b"y")


def a_symlink(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("/etc/passwd")


def a_whiteout(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    os.mknod(path, stat.S_IFCHR, 0)


def a_fifo(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize(
    "put", [a_file, a_directory, an_opaque_directory, a_symlink, a_whiteout, a_fifo], ids=lambda put: put.__name__
)
@pytest.mark.parametrize("is_shard", [False, True], ids=["object", "shard"])
def test_an_image_cannot_put_anything_in_an_objects_place(
    stubs: Host, put: Callable[[Path], None], is_shard: bool
) -> None:
    """overlay looks for what a redirect names in the layers below first, and in the object store last."""

    def bring(tree: Path) -> None:
        put(tree / place)
        files("same")(tree)

    stubs.unpack("known", fill=files("file"))
    (known,) = objects(stubs)
    place = known.parent.name if is_shard else str(known.relative_to(stubs.root / "objects"))
    stubs.unpack("lowest", fill=files("file", content=OTHER))
    stubs.unpack("image", "lowest", fill=bring)
    stubs.unpack("child", "image", fill=files("d/file"))
    stubs.commit_changes("made by a container", "image", fill=files("d/file"))
    stubs.unpack("later", "child", fill=files("late"))
    for name, path in {"image": "same", "child": "d/file", "made by a container": "d/file", "later": "late"}.items():
        with stubs.viewed(name) as merged:
            assert (merged / path).read_bytes() == CONTENT
    with stubs.running("key", "later") as merged:
        (merged / "d/file").chmod(0o600)
        (merged / "d").rename(merged / "e")
        assert (merged / "e/file").read_bytes() == (merged / "late").read_bytes() == CONTENT


def test_a_layer_that_gets_its_parent_at_commit_may_find_something_in_its_objects_place(stubs: Host) -> None:
    stubs.unpack("known", fill=files("file"))
    (known,) = objects(stubs)
    stubs.unpack("lowest", fill=files("file", content=OTHER))
    stubs.unpack("image", "lowest", fill=lambda tree: a_directory(tree / known.parent.name))
    files("d/file")(upper_of(stubs.client.prepare("extract-1 child")))
    stubs.client.commit("child", "extract-1 child", parent="image")
    assert contents(stubs, "child") == {"file": OTHER, "d/file": CONTENT}


@pytest.mark.parametrize("claimed", [b"x" * 32, blake3(CONTENT).digest()], ids=["wrong", "right"])
def test_an_attribute_of_a_container_that_is_named_as_ours(stubs: Host, claimed: bytes) -> None:
    """Like any other it is data, and shows in no other layer."""

    def claim(tree: Path) -> None:
        write(tree / "file")
        os.setxattr(tree / "file", DIGEST, claimed)

    stubs.commit_changes("claiming", fill=claim)
    stubs.unpack("other", fill=files("file"))
    stubs.unpack("different", fill=files("file", content=OTHER))
    for name, content in {"claiming": CONTENT, "other": CONTENT, "different": OTHER}.items():
        with stubs.viewed(name) as merged:
            assert (merged / "file").read_bytes() == content
            assert xattrs_of(merged / "file") == ({DIGEST: claimed} if name == "claiming" else {})


def test_two_contents_whose_names_begin_alike(stubs: Host) -> None:
    """An object's name is part of its hash: another content under the same name gets another instance."""
    stubs.unpack("image", fill=files("file"))
    (taken,) = objects(stubs)
    os.setxattr(taken, DIGEST, b"of another content".ljust(32))
    stubs.expected_errors.add("object-mark")
    stubs.unpack("other", fill=files("file"))
    assert len(objects(stubs)) == 2
    assert object_of(stubs, tree_of(stubs, "other") / "file") != taken
    assert contents(stubs, "other") == {"file": CONTENT}


# -- when objects go


def test_an_object_goes_with_the_last_layer_that_uses_it(host: Host, strategy: str) -> None:
    for name in ("image", "other"):
        host.unpack(name, fill=files("file"))
    host.unpack("child", "other", fill=files("another", content=OTHER))
    assert len(objects(host)) == 2
    host.client.remove("image")
    host.client.cleanup()
    assert len(objects(host)) == 2
    assert contents(host, "child") == {"file": CONTENT, "another": OTHER}
    host.client.remove("child")
    host.client.cleanup()
    (left,) = objects(host)
    assert left == object_of(host, tree_of(host, "other") / "file")
    assert left.stat().st_nlink == (2 if strategy == "stub" else 3)
    host.client.remove("other")
    host.client.cleanup()
    assert objects(host) == []


def test_an_object_stays_while_a_container_runs_on_it(host: Host) -> None:
    """Its layer cannot go; a layer that is gone does not take it along."""
    host.unpack("image", fill=files("file"))
    host.unpack("other", fill=files("file"))
    with host.running("key", "image") as merged, (merged / "file").open("rb") as stream:
        host.client.remove("other")
        host.client.cleanup()
        assert stream.read() == CONTENT
        with pytest.raises(FailedPrecondition):
            host.client.remove("image")
    assert contents(host, "image") == {"file": CONTENT}


def test_an_object_can_come_again(host: Host) -> None:
    for _ in range(3):
        host.unpack("image", fill=files("file"))
        assert contents(host, "image") == {"file": CONTENT}
        assert len(objects(host)) == 1
        host.client.remove("image")
        host.client.cleanup()
        assert objects(host) == []


def test_removed_and_committed_at_once(host: Host) -> None:
    """Layers that come find objects that go."""

    def build(worker: int) -> None:
        for number in range(15):
            name = f"layer {worker} {number}"
            host.unpack(name, fill=files("file", "second"))
            assert contents(host, name) == {"file": CONTENT, "second": CONTENT}
            host.client.remove(name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(build, range(4)))
    host.client.cleanup()
    assert objects(host) == []


def test_more_layers_than_an_inode_takes_links(base: Path, strategy: str) -> None:
    """Then there is another instance. The limit is found, not known: every filesystem has another."""
    with (
        filesystem("ext4", base, 512 << 20) as disk,
        Host(base, root=disk / "root", dedup={"strategy": strategy}) as host,
    ):
        host.unpack("image", fill=files("file"))
        (first,) = objects(host)
        others = disk / "others"
        others.mkdir()
        exhaust_links(first, others)
        host.expected_errors.add("link-count")
        for number in range(3):
            host.unpack(f"layer {number}", fill=files("file"))
            assert contents(host, f"layer {number}") == {"file": CONTENT}
        assert first.stat().st_nlink <= EXT4_MOST_LINKS
        assert len(objects(host)) == 2
        second = next(path for path in objects(host) if path != first)
        assert object_of(host, tree_of(host, "layer 2") / "file") == second
        # One link is free: enough for one half of what strategy hardlink needs, and not for the other.
        (others / "0").unlink()
        host.unpack("one more", fill=files("file"))
        assert contents(host, "one more") == {"file": CONTENT}
        assert references(tree_of(host, "one more")) == 1


def exhaust_links(path: Path, directory: Path) -> None:
    """Until the filesystem refuses another."""
    with contextlib.suppress(OSError):
        for number in range(EXT4_MOST_LINKS):
            os.link(path, directory / str(number))
    with pytest.raises(OSError, match=os.strerror(errno.EMLINK)):
        os.link(path, directory / "one too many")


def test_a_commit_without_files_makes_no_objects(host: Host) -> None:
    host.unpack("image", fill=nothing)
    host.commit_changes("child", "image", fill=lambda merged: (merged / "d").mkdir())
    assert objects(host) == []


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_where_an_inode_cannot_be_shared_its_extents_are(base: Path, kind: str) -> None:
    content = os.urandom(8 << 20)

    def fill(tree: Path) -> None:
        for name in ("a", "b"):
            (tree / name).write_bytes(content)
            os.utime(tree / name, ns=(TIME_NS, TIME_NS))

    with (
        filesystem(kind, base, 1 << 30) as disk,
        Host(base, root=disk / "root", dedup={"strategy": "hardlink"}) as host,
    ):
        host.unpack("image", fill=fill)
        first, second = (host.layers("image")[0] / name for name in ("a", "b"))
        assert not first.samefile(second)
        assert first.read_bytes() == second.read_bytes() == content
        for path in (first, second):
            found = subprocess.run(["filefrag", "-v", path], check=True, capture_output=True, text=True).stdout
            extents = [line for line in found.splitlines() if line.lstrip()[:1].isdigit()]
            assert extents
            assert all("shared" in line for line in extents), found
