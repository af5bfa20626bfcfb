"""What Prepare, View and Mounts answer, and what the daemon has mounted for it.

- One mount for each materialized snapshot, never two; what was unmounted is mounted again when it is asked for.
- A start keeps what snapshots own and drops the rest; a removed snapshot's mount goes, whoever uses it.
- Chains as long as the kernel allows.
- A snapshot stays what it was prepared as, whatever mode the daemon runs in later.
"""

from __future__ import annotations

import math
import os
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapshotter import linux, mountinfo
from snapshotter.errors import FailedPrecondition, NotFound, Unavailable
from snapshotter.meta.schema import Chain
from snapshotter.model import MAX_CHAIN, Kind, Mount, SnapshotId
from snapshotter.mounts import Target
from snapshotter.mounts.mounter import Mounter
from snapshotter.overlay.switches import Switches
from snapshotter.root import claim
from tests.rig.host import Host, lowers_of
from tests.rig.seen import identities, seen

pytestmark = pytest.mark.root


def two_layers(host: Host) -> None:
    host.unpack("base", fill=lambda tree: (tree / "file").write_text("base"))
    host.unpack("top", "base", fill=lambda tree: (tree / "other").write_text("top"))


def bind_of(mounts: tuple[Mount, ...]) -> tuple[Path, tuple[str, ...]]:
    (mount,) = mounts
    assert mount.type == "bind"
    return Path(mount.source), mount.options


# -- one mount each


def test_actives_and_views_are_binds_of_one_mount_each(host: Host) -> None:
    two_layers(host)
    active, options = bind_of(host.client.prepare("active", "top"))
    assert options == ("rbind", "rw")
    view, options = bind_of(host.client.view("view", "top"))
    assert options == ("rbind", "ro")
    for key, source in (("active", active), ("view", view)):
        for _ in range(3):
            assert bind_of(host.client.mounts(key))[0] == source
        assert source.parent == host.root / "mounts"
    assert host.mounts() == sorted([active.name, view.name])
    in_force = mountinfo.options_at(active)
    assert [in_force[name] for name in ("index", "metacopy", "redirect_dir")] == ["on"] * 3


def test_an_active_without_a_parent_stands_on_the_empty_directory(host: Host) -> None:
    source, _ = bind_of(host.client.prepare("active"))
    assert mountinfo.options_at(source)["lowerdir"] == str(host.root / "empty")
    empty = (host.root / "empty").stat().st_ino
    with host.again("active") as merged:
        assert stat.S_IMODE(merged.stat().st_mode) == 0o755
        (merged / "file").write_text("x")
    host.reboot()
    assert (host.root / "empty").stat().st_ino == empty, (
        "an upper with an index mounts only on the lower it was made on"
    )
    with host.again("active") as merged:
        assert (merged / "file").read_text() == "x"
    host.client.commit("layer", "active")
    with host.viewed("layer") as merged:
        assert (merged / "file").read_text() == "x"


@pytest.mark.parametrize("layers", [1, 2, 5, 60])
def test_views_show_their_layers_and_cannot_be_written(host: Host, layers: int) -> None:
    parent = ""
    for number in range(layers):
        parent, below = f"layer {number}", parent
        host.unpack(parent, below, fill=lambda tree: (tree / f"file{number}").write_text("x"))  # noqa: B023
    _, options = bind_of(host.client.view("view", parent))
    assert options == ("rbind", "ro")
    with host.again("view") as merged:
        assert sorted(os.listdir(merged)) == sorted(f"file{number}" for number in range(layers))
        with pytest.raises(OSError, match="Read-only"):
            (merged / "file0").write_text("y")
    assert len(host.mounts()) == (layers > 1)


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("key", ["default/7/extract-812-x8Yz sha256:aa", "extract-1 sha256:bb"])
def test_extraction_snapshots_are_plain_overlays(host: Host, key: str, layers: int) -> None:
    parent = ""
    for number in range(layers):
        parent, below = f"layer {number}", parent
        host.unpack(parent, below, fill=lambda tree: (tree / f"file{number}").write_text("x"))  # noqa: B023
    (mount,) = host.client.prepare(key, parent)
    assert mount.type == ("overlay" if layers else "bind")
    assert host.mounts() == []
    if layers:
        names = [option.partition("=")[0] for option in mount.options]
        assert {"upperdir", "workdir", "lowerdir"} <= set(names)
        assert not {"metacopy", "redirect_dir"} & set(names), "BuildKit adds redirect_dir=off"
        assert len(lowers_of(mount)) == layers
    with host.mounted((mount,)) as merged:
        assert len(os.listdir(merged)) == layers
        (merged / "new").write_text("x")
    host.client.commit("unpacked", key)
    with host.viewed("unpacked") as merged:
        assert len(os.listdir(merged)) == layers + 1


@pytest.mark.parametrize("key", ["default/extract-7/key", "not-extract-7", "default/7/Extract-7 x"])
def test_a_key_that_only_resembles_an_extraction_is_materialized(host: Host, key: str) -> None:
    label = {"containerd.io/snapshot/extract": "extract-1", "containerd.io/snapshot.ref": "sha256:aa"}
    source, _ = bind_of(host.client.prepare(key, labels=label))
    assert host.mounts() == [source.name]


# -- unmounted, and mounted again


def test_mounts_after_an_unmount_mounts_once_however_many_ask(base: Path) -> None:
    """All of them while the first one is about to mount. A second overlay on a view would be no error to the kernel."""
    with Host(base, environment={"DEDUP_FAILPOINTS": "mount.before-mount=stall:0.3"}) as host:
        two_layers(host)
        host.client.prepare("active", "top")
        host.client.view("view", "top")
        for key in ("active", "view"):
            host.unmount(key)
            with ThreadPoolExecutor(8) as pool:
                answers = [future.result(30) for future in [pool.submit(host.client.mounts, key) for _ in range(8)]]
            assert len(set(answers)) == 1
            assert len(host.mounts()) == 2
            with host.again(key) as merged:
                assert (merged / "other").read_text() == "top"


@pytest.mark.parametrize("kill", [False, True], ids=["stop", "kill"])
def test_a_reboot_is_made_good_by_mounts(host: Host, kill: bool) -> None:
    two_layers(host)
    with host.running("active", "top") as merged:
        (merged / "file").write_text("changed")
        (merged / "other").chmod(0o600)
        shown = seen(merged)
    host.client.view("view", "top")
    host.reboot(kill=kill)
    assert host.mounts() == []
    with host.again("active") as merged:
        assert seen(merged) == shown
        (merged / "file").write_text("once more")
    with host.again("view") as merged:
        assert (merged / "file").read_text() == "base"
    assert len(host.mounts()) == 2


def test_a_mount_that_only_clients_still_have_is_put_back(host: Host) -> None:
    """With what they wrote, and writable, however they have it. What is mounted over it meanwhile is not taken for
    it."""
    two_layers(host)
    with host.running("active", "top") as merged:
        (merged / "file").write_text("changed")
        linux.mount("", str(merged), None, linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY, None)
        host.unmount("active")
        with host.again("active") as again:
            assert (again / "file").stat() == (merged / "file").stat()
            (again / "file").write_text("once more")
            assert (merged / "file").read_text() == "once more"
        host.unmount("active")
        linux.mount("tmpfs", str(merged), "tmpfs", 0, None)
        try:
            with pytest.raises(Unavailable):
                host.client.mounts("active")
        finally:
            linux.umount2(str(merged))


def test_an_unmounted_snapshot_can_be_committed_and_removed(host: Host) -> None:
    two_layers(host)
    for name in ("one", "two"):
        with host.running(name, "top") as merged:
            (merged / "file").write_text(name)
        host.unmount(name)
    host.client.commit("layer", "one")
    host.client.remove("two")
    assert os.listdir(host.root / "mounts") == []
    with host.viewed("layer") as merged:
        assert (merged / "file").read_text() == "one"


def test_the_bare_mountpoint_takes_no_stray_write(host: Host) -> None:
    two_layers(host)
    host.client.prepare("active", "top")
    bare = host.materialized("active")
    host.unmount("active")
    with pytest.raises(PermissionError):
        (bare / "stray").write_text("x")
    with pytest.raises(PermissionError):
        bare.rmdir()
    host.client.remove("active")
    assert not bare.exists()


# -- what a start finds


@pytest.mark.parametrize("kill", [False, True], ids=["stop", "kill"])
def test_a_restart_keeps_the_mounts_of_snapshots(host: Host, kill: bool) -> None:
    two_layers(host)
    with host.running("active", "top") as merged, (merged / "file").open("a") as stream:
        host.client.view("view", "top")
        before, ids = identities(merged), host.mounts()
        host.restart(kill=kill)
        assert host.mounts() == ids
        assert identities(merged) == before
        assert identities(host.materialized("active")) == before
        assert host.mounts() == ids
        stream.write("written across the restart")
        stream.flush()
        assert (merged / "file").read_text().endswith("restart")


def test_a_start_drops_mounts_that_no_snapshot_owns(host: Host) -> None:
    two_layers(host)
    host.client.prepare("active", "top")
    host.client.prepare("soon a layer", "top")
    layer = host.materialized("soon a layer")
    host.client.commit("layer", "soon a layer")
    host.stop()
    for place in (host.root / "mounts/999", layer):
        place.mkdir()
        linux.mount("tmpfs", str(place), "tmpfs", 0, None)
        linux.mount("tmpfs", str(place), "tmpfs", 0, None)
    (host.root / "mounts/998").mkdir()
    held = os.open(host.root / "mounts/999", os.O_RDONLY)
    try:
        host.start()
    finally:
        os.close(held)
    assert [host.materialized("active").name] == host.mounts() == os.listdir(host.root / "mounts")


def test_a_removed_snapshots_mount_goes_while_it_is_used(host: Host) -> None:
    two_layers(host)
    with host.running("active", "top") as merged, (merged / "file").open() as stream:
        source = host.materialized("active")
        host.client.remove("active")
        assert host.mounts() == []
        assert not source.exists()
        host.client.cleanup()
        assert stream.read() == "base"
        assert (merged / "other").read_text() == "top"
    host.client.cleanup()
    assert os.listdir(host.root / "trash") == []
    with pytest.raises(NotFound):
        host.client.mounts("active")


# -- held in another mount namespace


@contextmanager
def bound_elsewhere(base: Path, source: Path) -> Iterator[int]:
    """A process in a mount namespace of its own, which has bound the mount where only it sees it."""
    place = base / "elsewhere"
    place.mkdir()
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private",
         "sh", "-c", f"mount --bind {source} {place}; echo ready; exec cat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        process.stdin.close()


def test_a_holder_in_another_mount_namespace_is_named(host: Host) -> None:
    two_layers(host)
    host.client.prepare("active", "top")
    source = host.materialized("active")
    with bound_elsewhere(host.base, source) as pid:
        host.unmount("active")
        for _ in range(2):
            with pytest.raises(Unavailable, match=rf'"active".*pid {pid}\b'):
                host.client.mounts("active")
            assert host.mounts() == []
        with pytest.raises(Unavailable, match=rf"pid {pid}\b"):
            host.client.commit("layer", "active")
        host.restart()
        with pytest.raises(Unavailable):
            host.client.mounts("active")
    with host.again("active") as merged:
        (merged / "file").write_text("x")
    assert mountinfo.options_at(source)["index"] == "on"


def test_a_snapshot_held_in_another_mount_namespace_can_be_removed(host: Host) -> None:
    two_layers(host)
    host.client.prepare("active", "top")
    with bound_elsewhere(host.base, host.materialized("active")):
        host.client.remove("active")
        assert host.mounts() == []
    host.client.cleanup()
    assert len(os.listdir(host.root / "snapshots")) == 2


# -- long chains


def stack(host: Host, layers: int) -> str:
    """Every layer hides the file of the one before."""
    for number in range(layers):

        def fill(tree: Path, number: int = number) -> None:
            (tree / "file").write_text(str(number))
            (tree / f"f{number}").touch()

        host.unpack(f"layer {number}", f"layer {number - 1}" if number else "", fill=fill)
    return f"layer {layers - 1}"


def test_chains_as_long_as_the_kernel_allows(host: Host) -> None:
    stack(host, MAX_CHAIN - 1)
    for layers in (300, MAX_CHAIN - 1):
        name = f"layer {layers - 1}"
        with host.running(f"on {layers}", name) as merged:
            assert (merged / "file").read_text() == str(layers - 1)
            assert len(os.listdir(merged)) == layers + 1
            (merged / "file").write_text("written")
            (merged / "f0").unlink()
            (merged / "f1").chmod(0o600)
        host.unmount(f"on {layers}")
        with host.again(f"on {layers}") as merged:
            assert len(os.listdir(merged)) == layers
            assert (merged / "file").read_text() == "written"
        with host.viewed(name) as merged:
            assert len(os.listdir(merged)) == layers + 1
    host.client.commit("the last", f"on {MAX_CHAIN - 1}")
    with host.viewed("the last") as merged:
        assert len(os.listdir(merged)) == MAX_CHAIN - 1
        assert (merged / "file").read_text() == "written"
    with pytest.raises(FailedPrecondition, match=str(MAX_CHAIN)):
        host.client.prepare("one too many", "the last")
    assert len(host.mounts()) == 1


@pytest.mark.parametrize(
    ("name", "layer_by_layer", "says"),
    [("root", False, r"4095 bytes of mount\(2\).*lowerdir\+"), ("r" * 240, True, "too long for the mount API")],
)
def test_a_chain_that_the_daemon_cannot_mount_is_refused(
    base: Path, name: str, layer_by_layer: bool, says: str
) -> None:
    """Never sent: mount(2) would cut the options, and mount without the upper."""
    root, lock = claim(base / name)
    mounter = Mounter(root, "daemon", Switches(frozenset({"index"})), layer_by_layer)
    try:
        layers = Chain(tuple(SnapshotId(number) for number in range(1, 200)))
        target = mounter.plan(Target(SnapshotId(200), "k", Kind.ACTIVE, layers))
        with pytest.raises(FailedPrecondition, match=says):
            mounter.provide(target)
        assert not list(root.mounts.iterdir())
    finally:
        mounter.close(math.inf)
        lock.release()


def test_a_client_can_mount_128_layers(base: Path) -> None:
    with Host(base, mode="client") as host:
        name = stack(host, 128)
        (mount,) = host.client.prepare("active", name)
        assert mount.type == "overlay"
        with host.mounted((mount,)) as merged:
            assert len(os.listdir(merged)) == 129
            (merged / "file").write_text("written")
        host.client.commit("top", "active")
        with host.viewed("top") as merged:
            assert (merged / "file").read_text() == "written"


def test_a_chain_that_no_client_can_mount_is_refused(base: Path) -> None:
    """Clients shorten the lower directories; the other two stay as long as the root's path makes them."""
    with Host(base, root=base.joinpath(*["r" * 240] * 4), mode="client") as host:
        name = stack(host, 320)
        with pytest.raises(FailedPrecondition, match=r"320 layers.*4 KiB"):
            host.client.prepare("active", name)
        with pytest.raises(NotFound):
            host.client.stat("active")


# -- client mode, and changing it


def test_a_snapshot_stays_what_it_was_prepared_as(host: Host) -> None:
    two_layers(host)

    def write(key: str) -> None:
        with host.again(key) as merged:
            with (merged / "file").open("a") as stream:
                stream.write("+")
            (merged / "other").chmod(0o600)

    host.client.prepare("daemon's", "top")
    write("daemon's")
    host.stop()
    host.configure("client")
    host.start()
    assert host.client.info().mount_mode == "client"
    write("daemon's")
    host.client.prepare("client's", "top")
    assert host.client.mounts("client's")[0].type == "overlay"
    write("client's")
    host.reboot()
    for key in ("daemon's", "client's"):
        write(key)
    assert len(host.mounts()) == 1
    host.stop()
    host.configure("daemon")
    host.start()
    for key in ("daemon's", "client's"):
        write(key)
    assert host.client.mounts("client's")[0].type == "overlay"
    host.client.commit("made by the client", "client's")
    host.stop()
    host.configure("client")
    host.start()
    host.client.commit("made by the daemon", "daemon's")
    for name, length in (("made by the client", 3), ("made by the daemon", 4)):
        with host.running(f"on {name}", name) as merged:
            assert (merged / "file").read_text() == "base" + "+" * length
            assert (merged / "other").read_text() == "top"
        with host.viewed(name) as merged:
            assert (merged / "file").read_text() == "base" + "+" * length
    assert host.mounts() == []


@pytest.mark.parametrize("still", ["mounted", "written", "unmounted"])
def test_commits_in_client_mode(base: Path, still: str) -> None:
    """A client that still has the overlay mounted goes on in a tree of its own; the layer is a copy."""
    with Host(base, mode="client") as host:
        two_layers(host)
        with host.running("active", "top") as merged:
            (merged / "file").write_text("changed")
            (merged / "other").unlink()
        with host.again("active") as merged, (merged / "file").open("a") as stream:
            if still == "unmounted":
                linux.umount2(str(merged), linux.MNT_DETACH)
                stream.close()
                linux.mount("tmpfs", str(merged), "tmpfs", 0, None)
            host.client.commit("layer", "active")
            if still == "written":
                stream.write(" later")
                stream.flush()
                (merged / "later").touch()
            with host.viewed("layer") as view:
                assert os.listdir(view) == ["file"]
                assert (view / "file").read_text() == "changed"
        host.client.cleanup()
        assert os.listdir(host.root / "busy") == os.listdir(host.root / "trash") == []
        assert len(os.listdir(host.root / "snapshots")) == 3


def test_a_root_behind_a_symbolic_link_is_served_at_its_real_path(base: Path) -> None:
    (base / "real").mkdir()
    (base / "link").symlink_to("real")
    with Host(base, root=base / "link/root") as host:
        host.unpack("layer", fill=lambda tree: (tree / "file").write_text("x"))
        with host.running("key", "layer") as merged:
            assert (merged / "file").read_text() == "x"
        assert host.materialized("key").is_relative_to(base / "real")
        host.restart()
        with host.again("key") as merged:
            assert (merged / "file").read_text() == "x"
