"""The daemon, a private containerd that uses it, and ctr, together in one namespace of their own.

    <base>/                   made by the rig in a directory that can hold an overlay's upper, gone at the end
      containerd.toml         its configuration: we are [proxy_plugins.dedup]
      config.toml             the daemon's
      containerd.log  daemon.log
      content/                containerd's root
      state/                  containerd's state
      snapshots/              the daemon's root
      containerd.sock  dedup.sock

Containers run in cgroups below one named after <base>, so that their remains can be found and removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from snapshotter import linux
from tests.rig.daemon import Daemon, wait_until_serving
from tests.rig.host import write_config
from tests.rig.image import ARCHITECTURE
from tests.rig.namespace import CHECKOUT, Namespace, Process, RigError, mounts_below

SNAPSHOTTER = "dedup"
_STOP_S = 10
_CGROUPS = Path("/sys/fs/cgroup")

# CRI, NRI and the snapshotters that are not used only cost time at the start; opt would make a
# directory in /opt. Names that a version does not know are no error.
_DISABLED = (
    "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
    "io.containerd.podsandbox.controller.v1.podsandbox", "io.containerd.nri.v1.nri",
    "io.containerd.internal.v1.opt", "io.containerd.internal.v1.cri",
    "io.containerd.tracing.processor.v1.otlp",
    *(f"io.containerd.snapshotter.v1.{name}"
      for name in ("aufs", "blockfile", "btrfs", "devmapper", "erofs", "native", "overlayfs", "zfs")),
)  # fmt: skip

_CONFIG = """\
version = 2
root = "{base}/content"
state = "{base}/state"
disabled_plugins = [{disabled}]

[grpc]
  address = "{base}/containerd.sock"

[proxy_plugins.{snapshotter}]
  type = "snapshot"
  address = "{base}/dedup.sock"

# From 2.0 on, `ctr image import` unpacks only for the snapshotters that are listed here.
[plugins."io.containerd.transfer.v1.local"]
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux/{architecture}"
    snapshotter = "{snapshotter}"
"""


class Rig:
    """Everything started by __enter__, ended and removed by __exit__."""

    def __init__(
        self,
        base_dir: Path | None = None,
        *,
        namespace: str = "rig",
        daemon_arguments: Sequence[str] = (),
        dedup: Mapping[str, object] | None = None,
    ) -> None:
        """`base_dir` must not exist yet; without one a fresh directory is made where overlay can write.
        `namespace` is containerd's; `dedup`, settings of the daemon's configuration in the table of that name."""
        self._daemon_arguments = daemon_arguments
        self._dedup = dedup or {}
        self._requested = base_dir
        self._containerd_namespace = namespace
        self._exit = contextlib.ExitStack()
        self._containerd: Process | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self.base = self._make_base()
            undo.callback(self._remove_base)
            self.cgroup = f"/{self.base.name}"
            undo.callback(self._remove_cgroups)
            self.namespace = undo.enter_context(Namespace())
            self.daemon_root = self.base / "snapshots"
            config = write_config(self.base / "config.toml", dedup=self._dedup)
            self.daemon = Daemon(
                self.daemon_root, self.base / "dedup.sock",
                log=self.base / "daemon.log", namespace=self.namespace,
                arguments=["--config", str(config), *self._daemon_arguments],
            )  # fmt: skip
            undo.push(self.daemon.__exit__)
            self.daemon.start()
            undo.callback(self._stop_containerd)
            self._start_containerd()
            self._exit = undo.pop_all()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Stops containerd and the daemon in good order, kills what is left and removes it. Raises RigError
        where something resists."""
        if isinstance(exc, RigError) and not exc.log:
            exc.log = self.logs()
        self._exit.__exit__(exc_type, exc, tb)
        if exc is None and (left := self.leftovers()):
            raise RigError("left behind: " + ", ".join(left))

    # -- what a test does with it

    def ctr(
        self, *arguments: str | os.PathLike[str], check: bool = True, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs ctr. Its commands take our snapshotter by default. Raises RigError unless it exits with 0."""
        return self.namespace.run(
            ["ctr", "--address", self.base / "containerd.sock", "--namespace", self._containerd_namespace,
             *arguments],
            env={"CONTAINERD_SNAPSHOTTER": SNAPSHOTTER}, check=check, timeout_s=timeout_s,
        )  # fmt: skip

    def ctr_run(self, *options: str, image: str, name: str, argv: tuple[str, ...]) -> bytes:
        """`ctr run`: what the container wrote to stdout."""
        ours = ("--snapshotter", SNAPSHOTTER, "--cgroup", f"{self.cgroup}/{name}")
        return self.ctr("run", *ours, *options, image, name, *argv).stdout

    def snapctl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        """Runs snapctl."""
        return self.namespace.run(
            [sys.executable, "-m", "snapshotter.cli", "--address", self.daemon.address, *arguments],
            env={"PYTHONPATH": os.fspath(CHECKOUT)},
            check=check,
        )

    def run_in_namespace(self, argv: list[str], *, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        """Runs any command where the daemon's mounts can be seen."""
        return self.namespace.run(argv, check=check)

    def restart_daemon(self, *, kill: bool = False) -> None:
        """SIGTERM (or SIGKILL) and a new start; containerd and the containers stay."""
        if kill:
            self.daemon.kill()
        else:
            self.daemon.stop()
        self.start_daemon()

    def start_daemon(self) -> None:
        """Starts the stopped daemon again and waits until containerd has found it: after a refused connection
        its client waits for up to 3 s before the next (services/server/server.go), and calls fail meanwhile.
        """
        self.daemon.start()
        deadline = time.monotonic() + _STOP_S
        while self.ctr("snapshots", "list", check=time.monotonic() > deadline).returncode != 0:
            time.sleep(0.05)

    def restart_containerd(self) -> None:
        """SIGTERM and a new start; shims and containers stay."""
        self._stop_containerd()
        self._start_containerd()

    def collect_garbage(self) -> None:
        """Makes containerd collect now: it does so before it answers a synchronous deletion of anything."""
        self.ctr("leases", "create", "--id", "collect")
        self.ctr("leases", "delete", "--sync", "collect")

    def logs(self, lines: int = 12) -> str:
        """The ends of both logs."""
        parts = []
        for name in ("daemon.log", "containerd.log"):
            with contextlib.suppress(OSError):
                tail = (self.base / name).read_text(errors="replace").splitlines()[-lines:]
                parts.append("\n".join([f"-- {name}", *tail]))
        return "\n".join(parts)

    def leftovers(self) -> list[str]:
        """What of the rig is still there, one description each; empty once it has exited."""
        found = [f"mount {target}" for target in mounts_below(self.base)]
        found += [f"process {pid}: {command}" for pid, command in _processes_naming(self.base)]
        found += [f"cgroup {path}" for path in self._cgroup_directories()]
        if self.base.exists():
            found.append(f"directory {self.base}")
        return found

    # -- beginning and end

    def _make_base(self) -> Path:
        if self._requested is None:
            return Path(tempfile.mkdtemp(prefix="dedup-rig-", dir=directory_for_overlay()))
        self._requested.mkdir(parents=True, mode=0o700)
        return self._requested

    def _start_containerd(self) -> None:
        config = self.base / "containerd.toml"
        config.write_text(
            _CONFIG.format(
                base=self.base, snapshotter=SNAPSHOTTER, architecture=ARCHITECTURE,
                disabled=", ".join(f'"{name}"' for name in _DISABLED),
            )
        )  # fmt: skip
        self._containerd = self.namespace.popen(["containerd", "--config", config], log=self.base / "containerd.log")
        wait_until_serving(self.base / "containerd.sock", self._containerd, "containerd")

    def _stop_containerd(self) -> None:
        process, self._containerd = self._containerd, None
        if process is None:
            return
        process.signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.signal(signal.SIGKILL)
            process.wait(_STOP_S)

    def _remove_base(self) -> None:
        _make_mutable(self.base)
        shutil.rmtree(self.base)

    def _cgroup_directories(self) -> list[Path]:
        """On cgroup v2 there is one hierarchy, on v1 one for each controller (cgroups(7))."""
        name = self.cgroup.strip("/")
        return [path for path in [_CGROUPS / name, *_CGROUPS.glob(f"*/{name}")] if path.is_dir()]

    def _remove_cgroups(self) -> None:
        """After the end of all processes; the kernel may need a moment until it counts them out."""
        deadline = time.monotonic() + _STOP_S
        for top in self._cgroup_directories():
            for directory, _, _ in os.walk(top, topdown=False):
                _remove_cgroup(directory, deadline)


def directory_for_overlay() -> Path:
    """A directory on a filesystem that can be an overlay's upper. Raises RigError where there is none.

    An overlay cannot be upper of another, nor can a filesystem without the xattrs or file types it needs.
    """
    candidates = [Path(os.environ.get("TMPDIR", "/var/tmp")), Path("/var/tmp"), Path("/var/lib"), CHECKOUT]
    reasons = []
    for candidate in dict.fromkeys(candidates):
        if not candidate.is_dir():
            continue
        reason = _overlay_refusal(candidate)
        if not reason:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise RigError("no overlayfs here (" + "; ".join(reasons) + ")")


def _overlay_refusal(directory: Path) -> str:
    """Why a trial overlay mount in `directory` failed; empty when it works."""
    with tempfile.TemporaryDirectory(prefix="dedup-probe-", dir=directory) as probe:
        for name in ("lower", "upper", "work", "merged"):
            Path(probe, name).mkdir()
        options = f"lowerdir={probe}/lower,upperdir={probe}/upper,workdir={probe}/work"
        try:
            os.setxattr(probe, "user.probe", b"")
        except OSError as error:
            return f"no user xattrs: {error.strerror}"
        # Deleting a lower file makes a whiteout, which not every filesystem can hold.
        Path(probe, "lower", "file").touch()
        trial = 'mount -t overlay -o "$1" overlay "$2/merged" && rm "$2/merged/file" && umount "$2/merged"'
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", trial, "sh", options, probe],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return "" if done.returncode == 0 else " ".join(done.stderr.split()) or "no reason given"


def _make_mutable(top: Path) -> None:
    """Takes the immutable flag off the directories below `top`: the daemon's mountpoints have it."""
    for directory, _, _ in os.walk(top, topdown=False):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            flags = linux.get_inode_flags(fd)
            if flags & (linux.FS_IMMUTABLE_FL | linux.FS_APPEND_FL):
                linux.set_inode_flags(fd, flags & ~(linux.FS_IMMUTABLE_FL | linux.FS_APPEND_FL))
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP):
                raise
        finally:
            os.close(fd)


def _remove_cgroup(directory: str, deadline: float) -> None:
    while True:
        try:
            os.rmdir(directory)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise RigError(f"cannot remove cgroup {directory}: {error.strerror}") from error
            time.sleep(0.01)
        else:
            return


def _processes_naming(directory: Path) -> Iterator[tuple[int, str]]:
    """Processes with `directory` in their command line: containerd, the daemon, and every shim."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            words = Path("/proc", entry.name, "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(os.fsencode(directory) in word for word in words):
            yield int(entry.name), b" ".join(words).decode(errors="replace").strip()
