"""Many clients at once on few keys, while the daemon is killed again and again: what was committed reads as written.

Each committed layer was written through the mount of its active snapshot, over a hard link, a rename and a chmod,
by one thread that had the key for itself; the others prepare, mount, commit, remove and clean up the same names
meanwhile. At the end every layer is read through a view of its chain: its own files as written, and those of its
parents. And when all is removed, no mount and no directory is left.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from snapshotter.client import Client
from snapshotter.errors import SnapshotterError, Unavailable
from snapshotter.model import Kind
from tests.rig.host import Host
from tests.rig.namespace import mounts_below

pytestmark = pytest.mark.root

THREADS, KEYS = 6, 8
KILL_EVERY_S = (0.3, 1.5)
Content = dict[str, bytes]


@pytest.mark.parametrize("seconds", [10, pytest.param(60, marks=pytest.mark.nightly)])
def test_what_was_committed_reads_as_written(host: Host, seconds: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    stress = Stress(host, seed)
    stress.run(seconds)
    assert stress.failures == []
    with Client(str(host.daemon.address)) as client:
        assert stress.committed, "the stress committed nothing"
        check_layers(client, stress)
        remove_everything(client)
    for name in ("snapshots", "mounts", "busy", "trash", "spool"):
        assert not list((host.root / name).iterdir()), name
    assert mounts_below(host.root) == []


class Stress:
    """What the threads share."""

    def __init__(self, host: Host, seed: int) -> None:
        self._host = host
        self._seed = seed
        self._lock = threading.Lock()
        self._writing: set[str] = set()
        self._deadline_s = 0.0
        self.failures: list[str] = []
        self.committed: dict[str, tuple[str, Content]] = {}
        """Each committed name: its parent, and what its layer must show."""
        self.uncertain: dict[str, tuple[str, Content]] = {}
        """The same for those whose commit was not answered: they are there, or not."""
        self.base: Content = {}

    def run(self, seconds: float) -> None:
        with Client(str(self._host.daemon.address)) as client:
            self._make_base(client)
        self._deadline_s = time.monotonic() + seconds
        threads = [threading.Thread(target=self._work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        choose = random.Random(self._seed)
        try:
            while time.monotonic() < self._deadline_s:
                time.sleep(choose.uniform(*KILL_EVERY_S))
                self._host.daemon.restart(kill=choose.random() < 0.8)
        finally:
            self._deadline_s = 0
            for thread in threads:
                thread.join()

    def _make_base(self, client: Client) -> None:
        """Two names of one file, a directory, and a file for its attributes."""
        (mount,) = client.prepare("base", "")
        top = Path(mount.source)
        (top / "first").write_bytes(b"base")
        os.link(top / "first", top / "second")
        (top / "directory").mkdir()
        (top / "directory" / "inside").write_bytes(b"inside")
        (top / "large").write_bytes(b"x" * 100_000)
        self.base = read(top)
        client.commit("layer-base", "base")
        self.committed["layer-base"] = ("", self.base)

    def _work(self, number: int) -> None:
        choose = random.Random(self._seed + number + 1)
        count = 0
        while time.monotonic() < self._deadline_s:
            count += 1
            try:
                with Client(str(self._host.daemon.address)) as client:
                    while time.monotonic() < self._deadline_s:
                        count += 1
                        self._step(client, choose, f"{number}-{count}")
            except Unavailable:
                time.sleep(0.02)  # killed: it comes again
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                return

    def _step(self, client: Client, choose: random.Random, token: str) -> None:
        key = f"key-{choose.randrange(KEYS)}"
        act = choose.choice(["write", "write", "write", "mounts", "view", "remove", "cleanup", "list"])
        try:
            if act == "write":
                self._write_and_commit(client, choose, key, token)
            elif act == "mounts":
                client.mounts(key)
            elif act == "view":
                client.view(f"view-{key}", self._some_layer(choose))
            elif act == "remove":
                client.remove(choose.choice([f"view-{key}", f"spare-{key}"]))
            elif act == "cleanup":
                client.cleanup()
            else:
                list(client.list())
        except Unavailable:
            raise
        except SnapshotterError as error:
            # Not found, already there, has children, was removed meanwhile: the keys are everybody's.
            if error.grpc_code in ("INTERNAL", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"):
                self.failures.append(f"{act} {key}: {error.grpc_code}: {error}")

    def _some_layer(self, choose: random.Random) -> str:
        with self._lock:
            return choose.choice(sorted(self.committed))

    def _write_and_commit(self, client: Client, choose: random.Random, key: str, token: str) -> None:
        """Several keep one key; the writer has it for itself, the others only disturb."""
        with self._alone(key) as alone:
            if not alone:
                client.prepare(f"spare-{key}", self._some_layer(choose))
                return
            with suppress_unless_unavailable():
                client.remove(key)  # what an earlier kill left
            parent = self._some_layer(choose)
            (mount,) = client.prepare(key, parent)
            name = f"layer-{token}"
            expected = self._write(Path(mount.source), parent, token)
            with self._lock:
                self.uncertain[name] = (parent, expected)
            if choose.random() < 0.3:
                with (Path(mount.source) / "first").open("ab"):
                    client.commit(name, key)
            else:
                client.commit(name, key)
            with self._lock:
                self.committed[name] = self.uncertain.pop(name)

    @contextmanager
    def _alone(self, key: str) -> Iterator[bool]:
        with self._lock:
            alone = key not in self._writing
            self._writing.add(key)
        try:
            yield alone
        finally:
            if alone:
                with self._lock:
                    self._writing.remove(key)

    def _write(self, top: Path, parent: str, token: str) -> Content:
        expected = dict(self.committed[parent][1])
        assert read(top) == expected, f"a child of {parent}"
        data = token.encode()
        (top / "first").write_bytes(data)
        expected["first"] = expected["second"] = data
        (directory,) = (path for path in top.iterdir() if path.is_dir())
        directory.rename(top / f"d-{token}")
        del expected[f"{directory.name}/inside"]
        expected[f"d-{token}/inside"] = b"inside"
        (top / "large").chmod(0o600)
        (top / f"own-{token}").write_bytes(data)
        expected[f"own-{token}"] = data
        return expected


@contextmanager
def suppress_unless_unavailable() -> Iterator[None]:
    try:
        yield
    except Unavailable:
        raise
    except SnapshotterError:
        pass


def read(top: Path) -> Content:
    return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}


def check_layers(client: Client, stress: Stress) -> None:
    found = {info.name: info for info in client.list() if info.kind is Kind.COMMITTED}
    assert stress.committed.keys() <= found.keys() <= stress.committed.keys() | stress.uncertain.keys()
    for name, info in found.items():
        parent, expected = stress.committed.get(name) or stress.uncertain[name]
        assert info.parent == parent
        (mount,) = client.prepare("check", name)
        try:
            assert read(Path(mount.source)) == expected, name
        finally:
            client.remove("check")


def remove_everything(client: Client) -> None:
    """Leaves first."""
    for info in list(client.list()):
        if info.kind is not Kind.COMMITTED:
            client.remove(info.name)
    while infos := list(client.list()):
        for info in infos:
            with suppress(SnapshotterError):
                client.remove(info.name)
    client.cleanup()
