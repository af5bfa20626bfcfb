"""A daemon, a client of it, and what clients do: mount the answers, unpack layers, run containers in between. Where the
daemon still runs at the end, fsck must find nothing.

In short:

    with Host(base) as host:
        host.unpack("base", fill=lambda tree: (tree / "f").write_text("x"))
        with host.running("key", "base") as merged:
            (merged / "f").write_text("y")
        host.client.commit("changed", "key")
        with host.viewed("changed") as merged:
            ...
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from snapshotter import linux
from snapshotter.cli.mounting import mount_all
from snapshotter.client import Client, Found
from snapshotter.fsck.findings import Finding
from snapshotter.model import Mount
from tests.rig.daemon import Daemon
from tests.rig.namespace import mounts_below
from tests.rig.roots import unmount_below

Fill = Callable[[Path], object]


def nothing(_tree: Path) -> None:
    """Changes nothing."""


class Host:
    """A context manager. What it mounts is below `base`."""

    def __init__(
        self,
        base: Path,
        *,
        root: Path | None = None,
        mode: str = "daemon",
        overlay: Mapping[str, str] | None = None,
        dedup: Mapping[str, object] | None = None,
        durability: str = "full",
        untrusted_attributes: str = "strip",
        calls: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`overlay`, `dedup`, `calls`: settings of the configuration's tables of these names."""
        self.base = base
        self.root = root or base / "root"
        self.daemon = Daemon(self.root, base / "s.sock", log=base / "daemon.log", environment=environment)
        self.configure(mode, overlay, dedup, durability, untrusted_attributes, calls)
        self._client: Client | None = None
        self.expected_errors: set[str] = set()
        """What fsck may find at the end: ids of damage that the test does."""
        self._numbers = itertools.count()

    def configure(
        self,
        mode: str = "daemon",
        overlay: Mapping[str, str] | None = None,
        dedup: Mapping[str, object] | None = None,
        durability: str = "full",
        untrusted_attributes: str = "strip",
        calls: Mapping[str, object] | None = None,
    ) -> None:
        """For the next start."""
        settings = {"durability": durability, "untrusted_attributes": untrusted_attributes}
        config = write_config(self.base / "config.toml", settings, overlay=overlay, dedup=dedup, calls=calls)
        self.daemon.arguments = ["--config", str(config), "--mount-mode", mode]

    def __enter__(self) -> Self:
        self.daemon.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        found = self.errors_found() if exc is None and self.daemon.process else []
        self._disconnect()
        self.daemon.__exit__(exc_type, exc, tb)
        assert [finding for finding in found if finding.id not in self.expected_errors] == []

    @property
    def client(self) -> Client:
        if self._client is None:
            self._client = Client(str(self.daemon.address))
        return self._client

    def restart(self, *, kill: bool = False) -> None:
        """Ends the daemon, by SIGKILL or SIGTERM, and starts it again."""
        self._disconnect()
        self.daemon.restart(kill=kill)

    def stop(self) -> None:
        self._disconnect()
        self.daemon.stop()

    def kill(self) -> None:
        self._disconnect()
        self.daemon.kill()

    def start(self) -> None:
        self.daemon.start()

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def errors_found(self) -> list[Finding]:
        """By a check of the running daemon."""
        found = [event.finding for event in self.client.check() if isinstance(event, Found)]
        return [finding for finding in found if finding.is_error]

    # -- what clients do

    @contextmanager
    def mounted(self, mounts: Sequence[Mount]) -> Iterator[Path]:
        """An answer of Prepare, View or Mounts, mounted as containerd would."""
        target = self.base / f"m{next(self._numbers)}"
        target.mkdir()
        mount_all(mounts, str(target))
        try:
            yield target
        finally:
            linux.umount2(str(target), linux.MNT_DETACH)
            target.rmdir()

    @contextmanager
    def running(self, key: str, parent: str = "") -> Iterator[Path]:
        """A new active snapshot, mounted."""
        with self.mounted(self.client.prepare(key, parent)) as merged:
            yield merged

    @contextmanager
    def again(self, key: str) -> Iterator[Path]:
        """An existing snapshot, mounted."""
        with self.mounted(self.client.mounts(key)) as merged:
            yield merged

    @contextmanager
    def viewed(self, parent: str) -> Iterator[Path]:
        """A view of a committed snapshot, mounted, and removed at the end."""
        key = f"view {next(self._numbers)} of {parent}"
        with self.mounted(self.client.view(key, parent)) as merged:
            yield merged
        self.client.remove(key)

    def unpack(self, name: str, parent: str = "", *, fill: Fill) -> None:
        """A layer of an image, as containerd unpacks it: written straight into the upper directory."""
        key = f"extract-{next(self._numbers)} {name}"
        fill(upper_of(self.client.prepare(key, parent)))
        self.client.commit(name, key)

    def commit_changes(self, name: str, parent: str = "", *, fill: Fill) -> None:
        """A layer that a container made."""
        key = f"changing {next(self._numbers)}"
        with self.running(key, parent) as merged:
            fill(merged)
        self.client.commit(name, key)

    def layers(self, name: str) -> list[Path]:
        """The trees that a committed snapshot is made of, its own first, as an extraction on top of it sees them."""
        key = f"extract-{next(self._numbers)} looking"
        (mount,) = self.client.prepare(key, name)
        self.client.remove(key)
        return lowers_of(mount)

    def materialized(self, key: str) -> Path:
        """Where the daemon has mounted a snapshot."""
        (mount,) = self.client.mounts(key)
        return Path(mount.source)

    def upper(self, key: str) -> Path:
        """The directory that an active snapshot's changes are in."""
        return self.root / "snapshots" / self.materialized(key).name / "fs"

    def upper_of_unmounted(self, key: str) -> Path:
        """As `upper`, and leaves the snapshot without a mount."""
        upper = self.upper(key)
        self.unmount(key)
        return upper

    def unmount(self, key: str) -> None:
        """Takes away what the daemon mounted, as an administrator might, or a reboot."""
        linux.umount2(str(self.materialized(key)))

    def reboot(self, *, kill: bool = False) -> None:
        """Restarts the daemon on a root of which nothing is mounted."""
        self._disconnect()
        if kill:
            self.daemon.kill()
        else:
            self.daemon.stop()
        unmount_below(self.root)
        self.daemon.start()

    def mounts(self) -> list[str]:
        """The names below mounts/ at which something is mounted, one for each mount."""
        return sorted(Path(target).name for target in mounts_below(self.root / "mounts"))


def write_config(path: Path, settings: Mapping[str, object] = {}, **tables: Mapping[str, object] | None) -> Path:
    """A configuration file with these settings and tables. Values are strings, integers or lists of them, which TOML
    writes as JSON does."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    for name, settings in tables.items():
        if settings:
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items())]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def upper_of(mounts: Sequence[Mount]) -> Path:
    """Where containerd writes a layer to that it unpacks."""
    (mount,) = mounts
    if mount.type == "bind":
        return Path(mount.source)
    return Path(next(value for name, _, value in map(_partition, mount.options) if name == "upperdir"))


def lowers_of(mount: Mount) -> list[Path]:
    value = next(value for name, _, value in map(_partition, mount.options) if name == "lowerdir")
    return [Path(lower) for lower in value.split(":")]


def _partition(option: str) -> tuple[str, str, str]:
    return option.partition("=")
