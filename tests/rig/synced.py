"""What a daemon had made durable at the moments when it had to, by its system calls and those of its workers.

    trace = Trace(base / "trace")
    host.daemon.wrapper = trace.wrapper()
    ...                                    # a call of a client, from trace.position() to trace.position()
    host.stop()
    unsynced(trace, host.root, [Step(...)])    # empty when all is well

Where a test cuts the power, what was written may have reached the disk without any sync; the calls show whether it had
to. A name that changes makes its directory dirty, a new file or directory is dirty itself, fsync makes clean. What a
transaction names must be clean before the sync of that transaction begins.

Symlinks, devices and fifos cannot be synced by themselves. They, and changes of attributes alone, are durable on
filesystems with a journal once a later change is: a directory's times, set and synced. Elsewhere that takes syncfs.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.rig.namespace import RigError

_TRACED = (
    "fsync,fdatasync,syncfs,mkdir,mkdirat,open,openat,link,linkat,symlink,symlinkat,mknod,mknodat,"
    "rename,renameat,renameat2,unlink,unlinkat,rmdir,utimensat,exit_group"
)
_LINE = re.compile(r"(\d+) +(.*)")
_DONE = re.compile(r"(\w+)\((.*)\) += \d+(?:<([^>]*)>)?")
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)")
_UNFINISHED = re.compile(r"(.*?),? ?<unfinished \.\.\.>")
_PATH = re.compile(r'(?:\b(?:AT_FDCWD|\d+)<(?P<directory>[^>]*)>)?(?:, )?(?:"(?P<name>[^"]*)")?')
_ENDS_S = 10

ATTRIBUTES = "attributes"
"""In a finding: what cannot be synced by itself."""


@dataclass(frozen=True, slots=True)
class Call:
    """One that succeeded."""

    name: str
    paths: tuple[str, ...]
    flags: str
    start: int
    end: int
    """Line numbers."""


class Trace:
    """The file that strace writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def wrapper(self) -> list[str]:
        """What runs the daemon: strace as a grandchild of it, so that the daemon is the process that it was."""
        options = ["-D", "-f", "-qq", "-y", "-s", "4096", "--seccomp-bpf", "-e", "signal=none"]
        return ["strace", *options, "-e", f"trace={_TRACED}", "-o", str(self.path)]

    def position(self) -> int:
        """How many lines there are. All calls of an operation are, once it was answered."""
        return self.path.read_bytes().count(b"\n")

    def calls(self) -> Iterator[Call]:
        """In the order in which they ended."""
        begun: dict[str, tuple[int, str]] = {}
        for number, line in enumerate(self.path.read_text(errors="replace").splitlines()):
            pid, text = _LINE.fullmatch(line).groups()  # type: ignore[union-attr]
            start = number
            if unfinished := _UNFINISHED.fullmatch(text):
                begun[pid] = number, unfinished[1]
            elif resumed := _RESUMED.fullmatch(text):
                start, head = begun.pop(pid)
                text = head + resumed[1]
            if done := _DONE.match(text):
                found = (match for match in _PATH.finditer(done[2]) if match[0].strip(", "))
                paths = tuple(os.path.join(match["directory"] or "", match["name"] or "") for match in found)
                if done[3]:  # what was opened, wherever links led
                    paths = (done[3],)
                yield Call(done[1], tuple(path.rstrip("/") for path in paths), done[2], start, number)

    def wait_for_the_end(self) -> None:
        """Of strace, which ends after the daemon and its workers."""
        deadline = time.monotonic() + _ENDS_S
        while any(os.path.realpath(f"/proc/{pid}/exe").endswith("/strace") for pid in self._writers()):
            if time.monotonic() > deadline:
                raise RigError(f"strace still writes {self.path}")
            time.sleep(0.01)

    def _writers(self) -> Iterator[str]:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if str(self.path).encode() in Path("/proc", pid, "cmdline").read_bytes().split(b"\0"):
                    yield pid
            except OSError:
                continue


@dataclass(frozen=True, slots=True)
class Step:
    """An operation that makes a snapshot, from one position in the trace to another."""

    what: str
    start: int
    end: int
    directory: Path
    """snapshots/<id> of what it made."""
    transactions: int = 1
    brought: Collection[Path] = ()
    """The layer's files and directories, durable when the first transaction is."""
    changed: Collection[Path] = ()
    """Of them, those that are changed after the first transaction, durable when the second one is."""
    same: Mapping[Path, Path] = field(default_factory=dict)
    """Hard links: of each name, the one that stands for all."""


def unsynced(trace: Trace, root: Path, steps: Sequence[Step], has_journal: bool = True) -> list[str]:
    """One line for everything that was not durable when it had to be: the operation, which of its transactions,
    what. The daemon must have been stopped."""
    trace.wait_for_the_end()
    replay, pending, findings = _Replay(root, has_journal), list(steps), list[str]()
    step, transactions = None, 0
    for call in trace.calls():
        if pending and call.start >= pending[0].start:
            step, transactions = pending.pop(0), 0
            replay.same |= {str(name): str(one) for name, one in step.same.items()}
            replay.brought(step, step.brought, step.start)
        is_transaction = call.name == "fdatasync" and call.paths == (f"{root}/metadata/data.mdb",)
        if step and call.start < step.end and is_transaction:
            transactions += 1
            found = replay.not_durable(step, transactions)
            findings += [f"{step.what}, transaction {transactions}: {what}" for what in found]
            replay.brought(step, step.changed if transactions == 1 else (), call.start)
        if step and call.start >= step.end:
            assert transactions == step.transactions, f"{step.what}: {transactions} transactions"
            step = None
        findings += replay.apply(call)
    assert not pending, "the trace ends early"
    return findings


@dataclass(slots=True)
class _Replay:
    """What is not durable yet."""

    root: Path
    has_journal: bool
    dirty: dict[str, int] = field(default_factory=dict)
    """Files and directories, with the line of their last change."""
    loose: dict[str, int] = field(default_factory=dict)
    """Directories of snapshots, with the line of the last change below them that may need a later one synced."""
    touched: dict[str, int] = field(default_factory=dict)
    """Of them, those whose times were set."""
    known: set[str] = field(default_factory=set)
    """Files and directories that were made."""
    exchanged: dict[str, int] = field(default_factory=dict)
    """Directories of snapshots with a new tree, and the line of the exchange, while that is not durable."""
    same: dict[str, str] = field(default_factory=dict)
    """Step.same"""

    def brought(self, step: Step, paths: Collection[Path], line: int) -> None:
        self.dirty |= {self._one(str(path)): line for path in paths}
        if paths:
            self.loose[str(step.directory)] = line

    def not_durable(self, step: Step, transaction: int) -> list[str]:
        above = {
            os.path.normpath(self.root / name) for name in ("../..", "..", ".", "metadata", "snapshots", "objects")
        }
        own = f"{step.directory}/"
        found = []
        for path in sorted(self.dirty):
            part = path.removeprefix(own).partition("/")[0] if path.startswith(own) else ""
            is_plan = transaction == 1 and path in (f"{own}seal", f"{own}seal/plan")
            is_object = bool(step.brought) and path.startswith(f"{self.root}/objects/")
            if path in above or path == str(step.directory) or part in ("fs", "refs") or is_plan or is_object:
                found.append(os.path.relpath(path, self.root))
        # A new snapshot that is no layer is nothing but directories.
        return [*found, *([ATTRIBUTES] if step.brought and str(step.directory) in self.loose else [])]

    def apply(self, call: Call) -> list[str]:
        """Findings: what a call must not be made before."""
        name, paths = call.name, call.paths
        if name in ("fsync", "fdatasync"):
            self._synced(paths[0], call.start)
        elif name == "syncfs":
            self.dirty = {path: line for path, line in self.dirty.items() if line > call.start}
            self.loose = {path: line for path, line in self.loose.items() if line > call.start}
        elif name == "utimensat":
            self._times_set(paths[0], call.end, is_open=">, NULL, " in call.flags)
        elif paths == (f"{self.root}/metadata/reserve",):
            pass  # lost, it is made again
        elif name.startswith("mkdir") or "O_CREAT" in call.flags:
            self._made(paths[0], call.end)
        elif name.startswith("rename"):
            found = self._before_rename(*paths, call.end)
            for path in paths:
                self._changed(str(Path(path).parent), call.end)
            return found
        elif name.startswith(("link", "symlink", "mknod", "unlink", "rmdir")):
            self._changed(str(Path(paths[-1]).parent), call.end)
        return []

    def _before_rename(self, old: str, new: str, line: int) -> list[str]:
        """A new tree is durable before it takes the place of the old one, and there before that one goes."""
        directory = str(Path(old).parent)
        if (Path(old).name, Path(new).name) == ("fs", "new"):
            found = [os.path.relpath(path, self.root) for path in self.dirty if f"{path}/".startswith(f"{new}/")]
            found += [ATTRIBUTES] if directory in self.loose else []
            self.exchanged[directory] = line
        elif Path(old).name == "new":
            found = [os.path.relpath(path, self.root) for path in self.exchanged if path == directory]
        else:
            found = []
        return [f"{Path(old).name} renamed: {what}" for what in found]

    def _synced(self, path: str, line: int) -> None:
        path = self._one(path)
        if self.dirty.get(path, line) < line:
            del self.dirty[path]
        if self.exchanged.get(path, line) < line:
            del self.exchanged[path]
        if self.has_journal and self.loose.get(path, line) < self.touched.get(path, -1) < line:
            del self.loose[path]

    def _made(self, path: str, line: int) -> None:
        if path not in self.known:
            self.known.add(path)
            self._changed(str(Path(path).parent), line)
            # An empty directory of the store matters with the first object in it.
            if Path(path).parent != self.root / "objects":
                self.dirty[path] = line

    def _times_set(self, path: str, line: int, is_open: bool) -> None:
        if Path(path).parent == self.root / "snapshots":
            self.touched[path] = line
        elif is_open or path in self.known:
            self._changed(path, line)
        else:  # of a symlink, perhaps
            self._loosened(path, line)

    def _changed(self, path: str, line: int) -> None:
        self.dirty[self._one(path)] = line
        self._loosened(path, line)

    def _loosened(self, path: str, line: int) -> None:
        if path.startswith(f"{self.root}/snapshots/"):
            self.loose[str(self.root / "snapshots" / Path(path).relative_to(self.root / "snapshots").parts[0])] = line

    def _one(self, path: str) -> str:
        return self.same.get(path, path)
