"""Which overlay features there are, which are on, and what a store may be opened without.

- `overlay.*` turns each off or on; what cannot be is refused at the start, in one line, with the kernel's reason.
- A store is only opened by a daemon that has what its layers need to be read right; where just the
  active snapshots need more, views work.
- An upper is mounted with the features that it was made with, never with more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapshotter import linux, mountinfo
from snapshotter.errors import FailedPrecondition
from snapshotter.meta import schema
from snapshotter.meta.store import Store
from snapshotter.model import Kind
from snapshotter.overlay.probe import SWITCHES, Probe
from snapshotter.overlay.switches import ABILITIES, choose
from tests.rig.host import Host
from tests.rig.namespace import CHECKOUT, RigError

pytestmark = pytest.mark.root

BIG = b"x" * 100_000


def image(tree: Path) -> None:
    (tree / "d").mkdir()
    (tree / "file").write_bytes(BIG)
    (tree / "d/one").write_text("old")
    os.link(tree / "d/one", tree / "two")


def refusal(host: Host) -> str:
    """The one line with which the daemon does not start."""
    before = len(host.daemon.log_text())
    with pytest.raises(RigError, match="exited with 5"):
        host.start()
    host.daemon.process = None
    (line,) = [
        line for line in host.daemon.log_text()[before:].splitlines() if line.startswith("containerd-dedup-grpc: ")
    ]
    return line


@contextmanager
def stopped(base: Path, **overlay: str) -> Iterator[Host]:
    """A host whose daemon did not start yet."""
    host = Host(base, overlay=overlay)
    try:
        yield host
    finally:
        host.stop()


# -- what is probed


def test_the_probe_agrees_with_this_kernel(host: Host) -> None:
    """Each feature against another source than a mount option: what the kernel says of itself, or the file system."""
    found = {feature.name: feature for feature in host.client.info().features}
    parameters = Path("/sys/module/overlay/parameters")
    for name in ("index", "metacopy", "redirect_dir", "nfs_export"):
        assert found[name].works == (parameters / name).exists()
    filesystem = mountinfo.filesystem_of(host.root)
    assert found["reflink"].works == (filesystem in ("xfs", "btrfs"))
    assert found["reflink"].works or found["reflink"].reason
    release = tuple(int(word) for word in os.uname().release.split(".")[:2])
    assert found["data_only"].works or release < (6, 5)
    assert found["lowerdir_plus"].works or release < (6, 7)
    assert found["idmapped"].works or release < (5, 19)
    assert all(bool(feature.reason) != feature.works for feature in found.values())
    assert {name for name, feature in found.items() if feature.on} - set(ABILITIES) == ON
    assert os.listdir(host.root / "spool") == [], "the probe leaves nothing"
    assert host.daemon.log_text().count("overlay.features") == 1


# -- what is configured

ON = {"index", "metacopy", "redirect_dir"}


@pytest.mark.parametrize(
    ("overlay", "on"),
    [
        ({}, ON),
        ({"index": "off"}, ON - {"index"}),
        ({"metacopy": "off"}, ON - {"metacopy"}),
        ({"redirect_dir": "off"}, {"index"}),
        ({"redirect_dir": "off", "metacopy": "off", "index": "off"}, set()),
        ({"index": "on", "metacopy": "on", "redirect_dir": "on"}, ON),
        ({"xino": "on"}, {*ON, "xino"}),
        ({"volatile": "on"}, {*ON, "volatile"}),
        ({"nfs_export": "on"}, {"index", "redirect_dir", "nfs_export"}),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_the_configuration_turns_features_on_and_off(base: Path, overlay: dict[str, str], on: set[str]) -> None:
    """As the mount has it that a container then gets; and layers are made and read under it."""
    with Host(base, overlay=overlay) as host:
        assert {feature.name for feature in host.client.info().features if feature.on} - set(ABILITIES) == on
        host.unpack("image", fill=image)
        with host.running("key", "image") as merged:
            in_force = mountinfo.options_at(host.materialized("key"))
            for name in ("index", "metacopy", "redirect_dir", "nfs_export"):
                assert (in_force.get(name) == "on") == (name in on), name
            assert ("volatile" in in_force or in_force.get("fsync") == "volatile") == ("volatile" in on)
            (merged / "file").chmod(0o600)
            (merged / "d/one").write_text("new")
            (merged / "d/one").unlink()
        host.client.commit("layer", "key")
        with host.viewed("layer") as merged:
            assert (merged / "file").read_bytes() == BIG
            assert (merged / "two").read_text() == ("new" if "index" in on else "old")
            assert os.listdir(merged / "d") == []


@pytest.mark.parametrize(
    "overlay",
    [
        {"metacopy": "on", "redirect_dir": "off"},
        {"nfs_export": "on", "metacopy": "on"},
        {"nfs_export": "on", "index": "off"},
    ],
    ids=lambda overlay: ",".join(f"{k}={v}" for k, v in overlay.items()),
)
def test_an_impossible_combination_is_refused_with_the_kernels_reason(base: Path, overlay: dict[str, str]) -> None:
    with stopped(base, **overlay) as host:
        line = refusal(host)
        for name, value in overlay.items():
            assert f"{name}={value}" in line
        assert "Invalid argument" in line
        assert "conflicting options" in line or "requires" in line or "NFS export" in line, line


def test_abilities_are_used_where_they_are_unless_turned_off(base: Path) -> None:
    with Host(base) as host:
        for feature in host.client.info().features:
            if feature.name in ABILITIES:
                assert feature.on == feature.works
    with Host(base, overlay=dict.fromkeys(ABILITIES, "off")) as host:
        assert {feature.name for feature in host.client.info().features if feature.on} == ON


def test_an_ability_that_is_insisted_on_and_missing_is_refused() -> None:
    settings = {**dict.fromkeys((*SWITCHES, *ABILITIES), "auto"), "reflink": "on"}
    missing: dict[str, str | None] = {**dict.fromkeys(settings), "reflink": "Operation not supported"}
    with pytest.raises(FailedPrecondition, match=r"overlay\.reflink.*Operation not supported"):
        choose(settings, Probe(missing), in_user_namespace=False)


def test_userxattr_is_refused_where_containerds_layers_would_be_misread(base: Path) -> None:
    with stopped(base, userxattr="on") as host:
        assert "trusted.overlay.opaque" in refusal(host)


def test_userxattr_is_what_a_user_namespace_gets(base: Path) -> None:
    """Without the trusted attributes, and so without what excludes userxattr."""
    program = (
        "import sys; from pathlib import Path; from snapshotter.features import settle; "
        "from snapshotter.config import *; "
        "print(*sorted(settle(Path(sys.argv[1]), MountConfig(), OverlayConfig())[1].on))"
    )
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", program, base],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": os.fspath(CHECKOUT)},
    )  # fmt: skip
    on = set(done.stdout.splitlines()[-1].split())
    assert "userxattr" in on
    assert not on & {"metacopy", "redirect_dir"}


# -- what the store needs


def with_layer(host: Host) -> None:
    """One that needs metacopy and redirect_dir."""
    host.unpack("image", fill=image)

    def change(merged: Path) -> None:
        (merged / "file").chmod(0o600)
        (merged / "d").rename(merged / "e")

    host.commit_changes("layer", "image", fill=change)


@pytest.mark.parametrize(
    ("off", "named"), [({"metacopy": "off"}, "metacopy"), ({"redirect_dir": "off"}, "redirect_dir, metacopy")]
)
@pytest.mark.parametrize("mode", ["daemon", "client"])
def test_a_store_is_refused_without_what_its_layers_need(
    host: Host, off: dict[str, str], named: str, mode: str
) -> None:
    with_layer(host)
    host.stop()
    host.configure(mode, off)
    line = refusal(host)
    for name in named.split(", "):
        assert name in line
    assert "metacopy" in named or "metacopy" not in line.replace("dedup", "")
    host.configure(mode)
    host.start()
    with host.viewed("layer") as merged:
        assert (merged / "file").read_bytes() == BIG


def test_a_store_whose_layers_need_nothing_opens_everywhere(host: Host) -> None:
    """Also one whose layers were made with everything on, as long as they use nothing of it."""
    host.configure(dedup={"strategy": "hardlink"})
    host.restart()
    host.unpack("image", fill=image)
    host.commit_changes("layer", "image", fill=lambda merged: (merged / "new").write_text("x"))
    host.stop()
    host.configure(overlay={"metacopy": "off", "redirect_dir": "off", "index": "off"})
    host.start()
    with host.running("key", "layer") as merged:
        (merged / "file").chmod(0o600)
        assert (merged / "file").read_bytes() == BIG
        assert (host.upper("key") / "file").stat().st_blocks > 0, "copied as a whole"
    host.client.commit("top", "key")
    with host.viewed("top") as merged:
        assert (merged / "file").read_bytes() == BIG


@pytest.mark.parametrize("lowers_only", [False, True], ids=["", "rebooted"])
def test_a_store_whose_actives_need_an_index_serves_views_without(host: Host, lowers_only: bool) -> None:
    host.unpack("image", fill=image)
    with host.running("active", "image") as merged:
        (merged / "d/one").write_text("new")
    host.client.view("old view", "image")
    host.stop()
    if lowers_only:
        linux.umount2(str(host.root / "mounts" / host.mounts()[0]))
    host.configure(overlay={"index": "off"})
    host.start()
    for refused in (
        lambda: host.client.mounts("active"),
        lambda: host.client.commit("layer", "active"),
        lambda: host.client.prepare("new", "image"),
        lambda: host.client.prepare("extract-1 new", "image"),
    ):
        with pytest.raises(FailedPrecondition, match=r"\bindex\b"):
            refused()
    with host.viewed("image") as merged, host.again("old view") as other:
        assert (merged / "two").read_text() == (other / "two").read_text() == "old"
    assert {info.name for info in host.client.list()} == {"image", "active", "old view"}
    assert host.client.stat("active").kind is Kind.ACTIVE
    assert host.client.usage("active").inodes > 0

    host.stop()
    host.configure()
    host.start()
    with host.again("active") as merged:
        assert (merged / "two").read_text() == "new", "nothing is lost"
    host.stop()
    host.configure(overlay={"index": "off"})
    host.start()
    host.client.remove("active")
    host.restart()
    with host.running("new", "image") as merged:
        (merged / "two").write_text("x")


def test_actives_that_need_metacopy_are_refused_without(host: Host) -> None:
    """Their upper may hold files without data. Others are served."""
    host.configure(dedup={"strategy": "hardlink"})
    host.restart()
    host.unpack("image", fill=image)
    with host.running("active", "image") as merged:
        (merged / "file").chmod(0o600)
    host.stop()
    host.configure(overlay={"metacopy": "off"})
    host.start()
    for refused in (lambda: host.client.mounts("active"), lambda: host.client.commit("layer", "active")):
        with pytest.raises(FailedPrecondition, match=r'"active".*\bmetacopy\b'):
            refused()
    with host.running("new", "image") as merged:
        (merged / "file").chmod(0o600)
    host.client.commit("layer", "new")
    host.restart()
    with host.viewed("layer") as merged:
        assert (merged / "file").read_bytes() == BIG


def test_an_upper_is_mounted_with_what_it_was_made_with(base: Path) -> None:
    """Made without, it would come to hold what nothing has recorded that it needs."""
    off = {"index": "off", "metacopy": "off", "redirect_dir": "off"}
    with Host(base, overlay=off) as host:
        host.unpack("image", fill=image)
        host.client.prepare("active", "image")
        host.stop()
        host.configure()
        host.reboot()
        with host.again("active") as merged:
            (merged / "file").chmod(0o600)
            (merged / "d/one").write_text("new")
            in_force = mountinfo.options_at(host.materialized("active"))
        assert not {"index", "metacopy", "redirect_dir"} & {name for name, value in in_force.items() if value == "on"}
        host.stop()
        host.configure(overlay=off)
        host.reboot()
        with host.again("active") as merged:
            assert (merged / "file").read_bytes() == BIG
            assert (merged / "two").read_text() == "old"
        host.client.commit("layer", "active")
        host.restart()
        with host.viewed("layer") as merged:
            assert (merged / "file").read_bytes() == BIG


@pytest.mark.parametrize("kind", [Kind.ACTIVE, Kind.COMMITTED], ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("bit", [1 << 15, 1 << 31], ids=["incompatible", "read-only compatible"])
def test_unknown_feature_bits_are_refused(host: Host, kind: Kind, bit: int) -> None:
    """Written by a newer version, which knows what they mean."""
    with_layer(host)
    host.client.prepare("active", "layer")
    host.stop()
    set_feature_bit(host.root, kind, bit)
    line = refusal(host)
    assert f"{bit:x}" in line or "newer" in line
    assert "newer dedup-snapshotter" in line


def set_feature_bit(root: Path, kind: Kind, bit: int) -> None:
    """In the record of one snapshot of that kind: features is the u32 after kind and flags (meta.schema)."""
    store = Store(root / "metadata")
    try:
        with store.read() as tx:
            raw_id, raw = next((key, bytes(value)) for key, value in tx.raw.cursor(db=tx.snapshots) if value[0] == kind)
        features = int.from_bytes(raw[2:6], "little") | bit
        changed = raw[:2] + features.to_bytes(4, "little") + raw[6:]
        store.write(lambda tx: tx.raw.put(raw_id, changed, db=tx.snapshots))
        assert schema.SCHEMA_VERSION == 2
    finally:
        store.close()
