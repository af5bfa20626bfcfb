"""A tree of everything that a walk can stumble over, through the whole life of a layer, on XFS, which allows most.

Proves: a layer of it reads as it was made, whether unpacked, made by a container or copied from one; it is measured and
removed, and nothing is left; nothing outside and no device, fifo or socket in it is opened meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter import linux
from tests.rig.filesystem import filesystem
from tests.rig.host import Host, upper_of
from tests.rig.watch import watched

pytestmark = pytest.mark.root

DATA = b"content" * 1500
DEPTH = 700
LARGEST = (1 << 63) - 1
STRANGE = (
    b"n" * 255, b"new\nline", b"\xff\xfe", b"\x1b[31mred", b"trailing ", b" ", b"...", b".wh..wh..opq", b".wh.file",
    b"refs", b"seal", b"plan", b"fs", b"work", b"1", b"00", b"swapping-1", b"Case", b"case", b"%s", b"-rf", b'a="b',
)  # fmt: skip
NOBODY = 2**32 - 1
CAP_NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")
ACL = b"\2\0\0\0" + b"".join(
    struct.pack("<HHI", tag, 6, who) for tag, who in ((1, NOBODY), (2, 77), (4, NOBODY), (16, NOBODY), (32, NOBODY))
)
Shown = dict[bytes, object]
SPECIAL = ("fifo", "socket", "watchdog", "disk")


def hostile(tree: Path, outside: Path, too_many: bool) -> None:
    top = os.fsencode(tree)
    for name in STRANGE:
        Path(os.fsdecode(os.path.join(top, name))).write_bytes(DATA + name)
    for number in range(3):
        (tree / f"exabytes{number}").touch()
        os.truncate(tree / f"exabytes{number}", LARGEST)
    with (tree / "hole").open("wb") as stream:
        stream.seek(1 << 40)
        stream.write(DATA)
    links = {
        "absolute": outside,
        "file": outside / "secret",
        "up": "../" * 50 + "etc",
        "refs": "../refs",
        "loop": "loop",
    }
    for name, target in links.items():
        (tree / f"link {name}").symlink_to(target)
    os.mkfifo(tree / "fifo")
    with socket.socket(socket.AF_UNIX) as unix:
        at = os.open(tree, os.O_PATH)
        unix.bind(f"/proc/self/fd/{at}/socket")
        os.close(at)
    os.mknod(tree / "watchdog", stat.S_IFCHR | 0o666, os.makedev(10, 130))
    os.mknod(tree / "disk", stat.S_IFBLK | 0o666, os.makedev(7, 200))
    marked = {"user.large": b"x" * 65_536, "security.capability": CAP_NET_RAW, "system.posix_acl_access": ACL}
    for name in ("setuid", "attributes", "many", "immutable", "append"):
        (tree / name).write_bytes(DATA)
        (tree / name).chmod(0o6755 if name == "setuid" else 0o640)
    for name, value in marked.items():
        os.setxattr(tree / "attributes", name, value)
    for number in range(300 if too_many else 200):  # 64 KiB of names are the most that the kernel lists
        os.setxattr(tree / "many", f"user.{number:0250}", b"x")
    deep(tree / "deep")
    for path in (tree, *tree.glob("*")):
        if path.name != "deep":
            os.utime(path, ns=(1, 10**18 + 1), follow_symlinks=False)
    for name, flag in {"immutable": linux.FS_IMMUTABLE_FL, "append": linux.FS_APPEND_FL}.items():
        set_flags(tree / name, flag)


def deep(top: Path) -> None:
    """Paths longer than PATH_MAX, and at their ends a file and a hard link."""
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for _ in range(DEPTH):
        os.mkdir("directory", dir_fd=fd)
        inner = os.open("directory", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    for name in ("end", "linked"):
        end = os.open(name, os.O_WRONLY | os.O_CREAT, dir_fd=fd)
        os.write(end, DATA + name.encode())
        os.close(end)
    os.link("linked", "again", src_dir_fd=fd, dst_dir_fd=fd)
    os.close(fd)


def set_flags(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, linux.FS_IOC_SETFLAGS, struct.pack("l", flags))
    finally:
        os.close(fd)


def shown(top: Path) -> Shown:
    """What find(1) shows, which walks as deep as it goes, and the content and attributes of what is not deep."""
    form = r"%P\0%y %m %U %G %l %T@ "
    directories = ["-type", "d", "-printf", form + r"\0", "-o", "-printf", form + r"%s\0"]
    ran = subprocess.run(["find", ".", *directories], cwd=top, capture_output=True, check=False)
    assert not ran.stderr, ran.stderr[-300:]
    found = ran.stdout.split(b"\0")
    seen: Shown = dict(zip(found[::2], found[1::2], strict=False))
    for path in sorted(top.glob("*")):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_size < 1 << 20:
            attributes = {} if path.name == "many" else {name: os.getxattr(path, name) for name in os.listxattr(path)}
            seen[os.fsencode(path.name) + b" content"] = path.read_bytes(), attributes
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            seen[os.fsencode(path.name) + b" device"] = status.st_rdev
    seen[b"hole data"] = data_of(top / "hole")
    seen[b"many data"] = os.getxattr(top / "many", f"user.{150:0250}")
    return seen


def data_of(path: Path) -> tuple[int, bytes]:
    with path.open("rb") as stream:
        at = os.lseek(stream.fileno(), 0, os.SEEK_DATA)
        stream.seek(1 << 40)
        return at, stream.read()


@pytest.fixture(params=["stub", "hardlink"])
def host(base: Path, request: pytest.FixtureRequest) -> Iterator[Host]:
    with (
        filesystem("xfs", base, 2 << 30) as disk,
        Host(base, root=disk / "root", dedup={"strategy": request.param}) as running,
    ):
        yield running


def unpacked(host: Host, name: str, outside: Path) -> Shown:
    top = upper_of(host.client.prepare("extract-1 key"))
    hostile(top, outside, too_many=True)
    expected = shown(top)
    with watched(*(top / path for path in SPECIAL)) as events:
        host.client.commit(name, "extract-1 key")
        assert not [event for event in events() if "opened" in event]
    return expected


def made_by_a_container(host: Host, name: str, outside: Path) -> Shown:
    with host.running(name + " key") as merged:
        hostile(merged, outside, too_many=True)
        expected = shown(merged)
    host.client.commit(name, name + " key")
    assert "commit.new_tree" not in host.daemon.log_text()
    return expected


def copied_since_it_is_mounted(host: Host, name: str, outside: Path) -> Shown:
    with host.running(name + " key") as merged:
        hostile(merged, outside, too_many=False)
        expected = shown(merged)
        host.client.commit(name, name + " key")
    assert "commit.new_tree" in host.daemon.log_text()
    return expected


def copied_since_it_is_written(host: Host, name: str, outside: Path) -> Shown:
    with host.running(name + " key") as merged:
        hostile(merged, outside, too_many=False)
        expected = shown(merged)
        with (merged / "1").open("ab"):
            host.client.commit(name, name + " key")
    assert "commit.copied" in host.daemon.log_text()
    return expected


COMMITS = {
    act.__name__: act for act in (unpacked, made_by_a_container, copied_since_it_is_mounted, copied_since_it_is_written)
}


def test_a_hostile_tree_lives_and_dies_as_any_other(host: Host) -> None:
    outside = host.root.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(DATA)
    with watched(outside, outside / "secret") as events:
        for name, commit in COMMITS.items():
            expected = commit(host, name, outside)
            with host.viewed(name) as merged:
                seen = shown(merged)
            differing = {key for key in expected.keys() | seen.keys() if expected.get(key) != seen.get(key)}
            assert not differing, (name, sorted(differing)[:10])
        host.restart(kill=True)
        host.client.space(now=True)
        for info in list(host.client.list()):
            assert host.client.usage(info.name).inodes > DEPTH
            host.client.remove(info.name)
        host.client.collect()
        assert events() == []
    for directory in ("snapshots", "trash", "busy"):
        assert not list((host.root / directory).iterdir()), directory
    assert not list((host.root / "objects").glob("*/*"))
    assert "Traceback" not in host.daemon.log_text()
