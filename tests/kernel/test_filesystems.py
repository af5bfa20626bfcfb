"""The daemon's root on XFS, btrfs and ext4, each in a loop-mounted image.

The ten operations work there, mounts and layers outlive the daemon; where the filesystem shares extents, copy-up
clones: a small write into a large file of a layer stays small, in the upper, in the layer that comes of it, and when
Commit has to copy; on ext4 it copies.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.client import Client
from snapshotter.errors import ResourceExhausted
from snapshotter.model import Kind
from tests.rig.daemon import Daemon
from tests.rig.filesystem import allocated_bytes, filesystem
from tests.rig.host import Host
from tests.rig.namespace import mounts_below
from tests.rig.roots import unmount_below

pytestmark = pytest.mark.root

MIB = 1 << 20
IMAGE_BYTES = 4 << 30  # sparse
BLOCK = 4096
PATTERN = b"layer..." * (MIB // 8)


@pytest.fixture(params=["xfs", "btrfs", "ext4"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def disk(kind: str, base: Path) -> Iterator[Path]:
    with filesystem(kind, base, IMAGE_BYTES) as mountpoint:
        yield mountpoint


@pytest.fixture
def daemon(base: Path, disk: Path) -> Iterator[Daemon]:
    with Daemon(disk / "root", base / "s.sock", log=base / "log") as running:
        yield running


def layer(client: Client, name: str, parent: str = "") -> Path:
    """Prepares what is to become the layer `name`; where to write it."""
    (mount,) = client.prepare(f"to {name}", parent)
    return Path(mount.source)


def commit(client: Client, name: str) -> None:
    client.commit(name, f"to {name}")


def test_the_operations_work_and_outlive_the_daemon(daemon: Daemon) -> None:
    with Client(str(daemon.address)) as client:
        top = layer(client, "lower")
        (top / "directory").mkdir()
        (top / "directory" / "file").write_bytes(b"lower")
        (top / "first").write_bytes(b"old")
        os.link(top / "first", top / "second")
        commit(client, "lower")
        top = layer(client, "upper", "lower")
        (top / "first").write_bytes(b"new")
        (top / "directory").rename(top / "renamed")
        (top / "renamed" / "file").chmod(0o600)
        commit(client, "upper")
        (view,) = client.view("looked", "upper")
        (active,) = client.prepare("active", "upper")
    daemon.restart(kill=True)
    unmount_below(daemon.root)
    daemon.restart()
    with Client(str(daemon.address)) as client:
        assert client.mounts("looked") == (view,)
        assert client.mounts("active") == (active,)
        for top in (Path(view.source), Path(active.source)):
            assert (top / "renamed" / "file").read_bytes() == b"lower"
            assert (top / "second").read_bytes() == b"new"
            assert not (top / "directory").exists()
        (Path(active.source) / "written").write_bytes(b"written")
        assert {info.name: info.kind for info in client.list()} == {
            "lower": Kind.COMMITTED, "upper": Kind.COMMITTED, "looked": Kind.VIEW, "active": Kind.ACTIVE,
        }  # fmt: skip
        for name in ("looked", "active", "upper", "lower"):
            client.remove(name)
        client.cleanup()
    assert not list((daemon.root / "snapshots").iterdir())
    assert not list((daemon.root / "mounts").iterdir())
    assert not list((daemon.root / "busy").iterdir())
    assert mounts_below(daemon.root) == []


@pytest.mark.parametrize("kind", ["xfs", "btrfs"], indirect=True)
def test_a_small_write_into_a_large_file_of_a_layer_stays_small(daemon: Daemon, disk: Path) -> None:
    with Client(str(daemon.address)) as client:
        large_layer(client, 1024)
        before = allocated_bytes(disk)
        top = layer(client, "upper", "large")
        write_block(top, 500 * MIB)
        assert allocated_bytes(disk) - before < MIB
        commit(client, "upper")
        assert allocated_bytes(disk) - before < MIB
        # Into a file that a layer shares with a layer.
        above = layer(client, "above", "upper")
        write_block(above, 700 * MIB)
        assert allocated_bytes(disk) - before < 2 * MIB
        check(above, {500 * MIB, 700 * MIB})
        # And when Commit copies, since somebody writes.
        with (above / "file").open("r+b"):
            commit(client, "above")
        assert allocated_bytes(disk) - before < 3 * MIB
        (view,) = client.view("looked", "above")
        check(Path(view.source), {500 * MIB, 700 * MIB})
    assert "commit.copied" in daemon.log_text()


@pytest.mark.parametrize("kind", ["ext4"], indirect=True)
def test_on_ext4_it_copies(daemon: Daemon, disk: Path) -> None:
    """The same measure sees a copy."""
    with Client(str(daemon.address)) as client:
        large_layer(client, 64)
        before = allocated_bytes(disk)
        write_block(layer(client, "upper", "large"), 32 * MIB)
        grown = allocated_bytes(disk) - before
    assert 64 * MIB <= grown < 66 * MIB


def large_layer(client: Client, size_mib: int) -> None:
    """One layer, "large", with one file of real data."""
    with (layer(client, "large") / "file").open("wb") as stream:
        for _ in range(size_mib):
            stream.write(PATTERN)
    commit(client, "large")


def write_block(top: Path, at: int) -> None:
    with (top / "file").open("r+b") as stream:
        stream.seek(at)
        stream.write(b"x" * BLOCK)


def check(top: Path, written: set[int]) -> None:
    """Around each write there is what was written, and beside it what the layer holds."""
    with (top / "file").open("rb") as stream:
        for at in written:
            stream.seek(at - BLOCK)
            assert stream.read(3 * BLOCK) == PATTERN[:BLOCK] + b"x" * BLOCK + PATTERN[:BLOCK]


def test_a_full_disk_does_not_keep_the_daemon_from_starting(base: Path) -> None:
    """Only the daemon can free space: it starts, serves what is there, and goes on once there is room."""
    with filesystem("ext4", base, 64 << 20) as mountpoint, Host(base, root=mountpoint / "root") as host:
        host.unpack("image", fill=lambda tree: (tree / "file").write_text("content"))
        with contextlib.suppress(OSError), (mountpoint / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(1 << 20)):
                pass
        with contextlib.suppress(OSError):
            for number in range(10_000):
                (mountpoint / f"d{number}").mkdir()
        host.restart(kill=True)
        assert {info.name for info in host.client.list()} == {"image"}
        with pytest.raises(ResourceExhausted):
            host.client.prepare("key", "image")
        (mountpoint / "filler").unlink()
        with host.running("key", "image") as merged:
            assert (merged / "file").read_text() == "content"
