"""A private mount and PID namespace: what is mounted or started in it cannot outlive it.

containerd keeps its shims' sockets and runc's state under /run/containerd whatever its configuration
says, and NRI and CNI have their places under /run too: so /run is a tmpfs of its own in here, and
nothing of the host's is touched. Mounts are private (they do not propagate to the host). The PID
namespace is what ends everything: when its first process dies, the kernel kills all others in it
(pid_namespaces(7)), shims and containers with them, and with the last process go the mounts
(mount_namespaces(7)). The first process waits for the end of its standard input, so this also happens
when the test run itself is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from snapshotter import linux

CHECKOUT = Path(__file__).resolve().parents[2]

# The first process ignores SIGCHLD, so the kernel reaps the orphans that become its children (wait(2)).
_FIRST_PROCESS = (
    "mount -t tmpfs -o mode=755 tmpfs /run && mkdir /run/containerd && echo ready && exec env --ignore-signal=CHLD cat"
)


def enter_private_mounts() -> None:
    """Gives the calling thread, and what it starts from now on, a mount namespace of its own."""
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("", "/", None, linux.MS_REC | linux.MS_PRIVATE, None)


class RigError(Exception):
    """The rig cannot do what was asked. One line for a person; `log` is the end of what explains it."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class Namespace:
    """The namespaces, alive between __enter__ and __exit__."""

    def __init__(self) -> None:
        self._unshare: subprocess.Popen[str] | None = None
        self._first_pid = 0

    def __enter__(self) -> Self:
        self._unshare = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--mount-proc",
             "sh", "-c", _FIRST_PROCESS],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert self._unshare.stdout and self._unshare.stderr
        if self._unshare.stdout.readline() != "ready\n":
            self._unshare.wait()
            raise RigError(f"no private namespace: {self._unshare.stderr.read().strip()}")
        self._first_pid = child_of(self._unshare.pid)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Ends every process inside and waits until all are gone, and their mounts with them."""
        assert self._unshare and self._unshare.stdin and self._unshare.stdout and self._unshare.stderr
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._first_pid, signal.SIGKILL)
        # unshare waits for the first process, which the kernel lets go only after all others.
        self._unshare.wait()
        for stream in (self._unshare.stdin, self._unshare.stdout, self._unshare.stderr):
            stream.close()

    def command(self, argv: Sequence[str | os.PathLike[str]]) -> list[str]:
        """The command line that runs `argv` inside, in the directory of the checkout."""
        return [
            "nsenter", "--mount", "--pid", f"--target={self._first_pid}", f"--wdns={CHECKOUT}", "--",
            *[os.fspath(word) for word in argv],
        ]  # fmt: skip

    def popen(
        self, argv: Sequence[str | os.PathLike[str]], *, log: Path, env: Mapping[str, str] | None = None
    ) -> Process:
        """Starts a process inside, its output appended to `log`."""
        return Process(self.command(argv), log=log, env=env, wrapped=True)

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        timeout_s: float = 60,
        stdin: bytes | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs `argv` inside to its end. Raises RigError where `check` and the exit status is not 0."""
        words = " ".join(os.fspath(word) for word in argv)
        try:
            done = subprocess.run(
                self.command(argv),
                env=_environment(env), input=stdin, capture_output=True, timeout=timeout_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RigError(f"`{words}` runs longer than {timeout_s:.0f} s") from None
        if check and done.returncode != 0:
            reason = " ".join(done.stderr.decode(errors="replace").split()) or "no message"
            raise RigError(f"`{words}` exited with {done.returncode}: {reason}")
        return done

    def mounts_below(self, directory: Path) -> list[str]:
        """Where something is mounted inside, at or below `directory`."""
        return mounts_below(directory, Path(f"/proc/{self._first_pid}/mountinfo"))


class Process:
    """A process with a log file, perhaps in a Namespace: nsenter stays its parent there, and passes its
    exit status on, but no signals."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        wrapped: bool = False,
    ) -> None:
        self.log = log
        self._wrapped = wrapped
        with log.open("ab") as stream:
            self._popen = subprocess.Popen(
                argv,
                env=_environment(env),
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """As this process sees it. Raises ProcessLookupError when it is gone."""
        return child_of(self._popen.pid) if self._wrapped else self._popen.pid

    def poll(self) -> int | None:
        """The exit status (negative: the signal), None while it runs."""
        return self._popen.poll()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal; nothing when the process is gone."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> int:
        """The exit status. Raises subprocess.TimeoutExpired."""
        return self._popen.wait(timeout_s)

    def log_tail(self, lines: int = 15) -> str:
        """The last lines that it wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def child_of(pid: int) -> int:
    """The pid of the one child of `pid`. Raises ProcessLookupError where it has none."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            with open(f"/proc/{entry.name}/stat", "rb") as stream:
                parent = stream.read().rpartition(b")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid:
            return int(entry.name)
    raise ProcessLookupError(f"process {pid} has no child")


def mounts_below(directory: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> list[str]:
    """Mount points at or below `directory` (proc_pid_mountinfo(5): the fifth field, octal escapes)."""
    found = []
    for line in mountinfo.read_bytes().splitlines():
        target = line.split(b" ")[4].decode("unicode_escape")
        if Path(target).is_relative_to(directory):
            found.append(target)
    return found


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, **(extra or {})}
