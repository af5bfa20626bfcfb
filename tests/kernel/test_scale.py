"""A thousand active snapshots, all mounted: every call still answers right, a restart adopts every mount, and after
their removal no mount is left. What the calls cost is measured by bench/mounts.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapshotter.client import Client
from snapshotter.model import Kind
from tests.rig.host import Host

pytestmark = pytest.mark.root

COUNT = 1000
KEYS = [f"active-{number}" for number in range(COUNT)]


def test_a_thousand_mounted_snapshots(host: Host) -> None:
    daemon = host.daemon
    with Client(str(daemon.address)) as client, ThreadPoolExecutor(8) as pool:
        make_layers(client)
        sources = dict(zip(KEYS, pool.map(lambda key: prepare_and_write(client, key), KEYS), strict=True))
        before = mounts_below(daemon.root)
        assert sorted(before.values()) == sorted(sources.values())
        check_all(client, sources)
    daemon.restart()
    daemon.restart(kill=True)
    assert mounts_below(daemon.root) == before, "adopted: the same mounts, not new ones"
    with Client(str(daemon.address)) as client, ThreadPoolExecutor(8) as pool:
        check_all(client, sources)
        assert [client.mounts(key)[0].source for key in KEYS] == [str(sources[key]) for key in KEYS]
        assert mounts_below(daemon.root) == before
        # Half of them first: the right ones go.
        for half in (KEYS[::2], KEYS[1::2]):
            list(pool.map(client.remove, half))
            for key in half:
                del sources[key]
            check_all(client, sources)
            assert sorted(mounts_below(daemon.root).values()) == sorted(sources.values())
        client.cleanup()
    assert not layers_mounted_elsewhere(daemon.root)
    assert not list((daemon.root / "mounts").iterdir())
    assert len(list((daemon.root / "snapshots").iterdir())) == 3


def make_layers(client: Client) -> None:
    parent = ""
    for number in range(3):
        (mount,) = client.prepare("tmp", parent)
        Path(mount.source, f"layer{number}").write_text(f"layer {number}")
        parent = f"layer-{number}"
        client.commit(parent, "tmp")


def prepare_and_write(client: Client, key: str) -> Path:
    (mount,) = client.prepare(key, "layer-2", {"number": key})
    Path(mount.source, "own").write_text(key)
    return Path(mount.source)


def check_all(client: Client, sources: dict[str, Path]) -> None:
    """List, Stat and every mount, read and written through."""
    actives = {info.name: info for info in client.list() if info.kind is Kind.ACTIVE}
    assert actives.keys() == sources.keys()
    for key, source in sources.items():
        assert actives[key].parent == "layer-2"
        assert actives[key].labels == {"number": key}
        assert client.stat(key) == actives[key]
        assert (source / "own").read_text() == key
        assert (source / "layer0").read_text() == "layer 0"
        (source / "own").write_text(key)


def mounts_below(directory: Path) -> dict[int, Path]:
    return {number: path for number, path in _mounts() if path.is_relative_to(directory)}


def layers_mounted_elsewhere(directory: Path) -> list[str]:
    """Overlays of our layers that are mounted anywhere but below the root."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if str(directory) in line and not Path(line.split(" ")[4]).is_relative_to(directory)]


def _mounts() -> list[tuple[int, Path]]:
    """proc_pid_mountinfo(5): the id of each mount, which no later one has while it lives, and its place."""
    words = (line.split(" ") for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [(int(word[0]), Path(word[4])) for word in words]
