"""Overlays by chance: layers made by mounting and using overlays with features by chance, as the kernel leaves them.

`python -m tests.rig.random_overlay DIRECTORY SEED STEPS [userxattr]` makes one and says what fsck.overlay finds in it:
for a user namespace, which a process has to be started in.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from snapshotter import linux
from snapshotter.fsck_overlay.check import check
from snapshotter.fsck_overlay.command import main
from snapshotter.fsck_overlay.layers import opened
from snapshotter.overlay.attributes import TRUSTED, USER
from snapshotter.overlay.mounting import Overlay, mount

_NAMES = ("a", "b", "c", "d")
_RENAME_EXCHANGE = 2


@dataclass
class Directories:
    """Of one overlay; `lowers` from the top down."""

    base: Path
    lowers: list[Path] = field(default_factory=list)
    data: Path | None = None

    def __post_init__(self) -> None:
        for path in (self.upper, self.work, self.merged):
            path.mkdir(parents=True, exist_ok=True)

    @property
    def upper(self) -> Path:
        return self.base / "upper"

    @property
    def work(self) -> Path:
        return self.base / "work"

    @property
    def merged(self) -> Path:
        return self.base / "merged"

    def lower(self, name: str = "lower") -> Path:
        """One more, below those that are there."""
        made = self.base / name
        made.mkdir()
        self.lowers.append(made)
        return made

    def mount(self, **switches: str | None) -> contextlib.AbstractContextManager[Path]:
        """Mounted within the block."""
        overlay = Overlay(tuple(self.lowers), self.upper, self.work, self.data, switches)
        return _mounted(overlay, self.merged)

    def options(self) -> str:
        """For -o."""
        data = f"::{self.data}" if self.data else ""
        return f"lowerdir={':'.join(map(str, self.lowers))}{data},upperdir={self.upper},workdir={self.work}"

    def fsck(self, *arguments: str, more: str = "") -> subprocess.CompletedProcess[str]:
        """Runs the command on it."""
        return fsck("-o", self.options() + more, *arguments)

    def found(self, userxattr: bool = False) -> list[str]:
        """Ids and places of what is found."""
        names = USER if userxattr else TRUSTED
        data = [str(self.data)] if self.data else []
        with opened([str(lower) for lower in self.lowers], data, str(self.upper), str(self.work), names) as layers:
            return sorted(
                f"{found.kind.id} {layers.show(found.place)} {found.detail}" for found in check(layers).findings
            )


def fsck(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs fsck.overlay, in this process; nobody answers questions."""
    output, errors = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    stdin, sys.stdin = sys.stdin, io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = main(arguments)
    except SystemExit as ended:  # argparse
        status = int(ended.code or 0)
    finally:
        sys.stdin = stdin
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, status, output.getvalue(), errors.getvalue())


@contextlib.contextmanager
def _mounted(overlay: Overlay, target: Path) -> Iterator[Path]:
    mount(overlay, target, "test")
    try:
        yield target
    finally:
        linux.umount2(str(target))


def random_switches(chance: random.Random, userxattr: bool) -> dict[str, str | None]:
    """Features that go together."""
    on = {name: chance.random() < 0.5 for name in ("index", "metacopy", "redirect_dir", "nfs_export", "xino")}
    if userxattr:
        on["metacopy"] = on["redirect_dir"] = False
    if on["nfs_export"]:
        on["index"], on["metacopy"] = True, False
    if on["metacopy"]:
        on["redirect_dir"] = True
    said = {name: "on" if value else "off" for name, value in on.items()}
    switches: dict[str, str | None] = dict(said)
    if userxattr:
        for name in ("metacopy", "redirect_dir", "nfs_export"):
            del switches[name]
        switches["index"] = "off" if chance.random() < 0.5 else switches["index"]
        switches["userxattr"] = None
    if chance.random() < 0.2:
        switches["volatile"] = None
    if chance.random() < 0.3:
        switches["uuid"] = "on"
    return switches


def make(
    base: Path, seed: int, steps: int, userxattr: bool = False, place: Path | None = None
) -> tuple[Directories, str]:
    """An overlay with up to three lowers, each but the lowest made as an upper; and how it was made. The lowest is made
    below `place`, if given: on another filesystem."""
    chance = random.Random(seed)
    lowest = (place or base) / "lowest"
    lowest.mkdir(parents=True)
    use(chance, lowest, steps)
    lowers = [lowest]
    told = []
    for number in range(chance.randint(1, 3)):
        overlay = Directories(base / str(number), list(lowers))
        # The layers below may need it, and so does everything above.
        always = {} if userxattr else {"metacopy": "on", "redirect_dir": "on", "nfs_export": "off"}
        for _ in range(chance.randint(1, 3)):
            switches = random_switches(chance, userxattr) | (always if number else {})
            told.append(f"{number}: {switches}")
            try:
                with overlay.mount(**switches):
                    use(chance, overlay.merged, steps)
            except OSError as error:
                told.append(str(error))
            shutil.rmtree(overlay.work / "work/incompat", ignore_errors=True)
        lowers.insert(0, overlay.upper)
    return overlay, "\n".join(told)


def use(chance: random.Random, top: Path, steps: int) -> None:
    """Changes a tree by chance; what cannot be done is left out."""
    for _ in range(steps):
        act = chance.choice(_ACTS)
        with contextlib.suppress(OSError):
            act(chance, _path(chance, top), _path(chance, top))


def read(path: Path) -> None:
    """Reads what can be read without waiting. Raises OSError."""
    if stat.S_ISREG(path.lstat().st_mode):
        path.read_bytes()


def _path(chance: random.Random, top: Path) -> Path:
    return top.joinpath(*(chance.choice(_NAMES) for _ in range(chance.choice((1, 1, 2, 2, 3)))))


def _write(chance: random.Random, path: Path, _other: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o644)  # a fifo may be there
    try:
        os.write(fd, b"x" * chance.choice((0, 1, 5000)))
    finally:
        os.close(fd)


def _mkdir(_chance: random.Random, path: Path, _other: Path) -> None:
    path.mkdir(parents=True)


def _remove(_chance: random.Random, path: Path, _other: Path) -> None:
    if stat.S_ISDIR(path.lstat().st_mode):
        shutil.rmtree(path)
    else:
        path.unlink()


def _rename(_chance: random.Random, path: Path, other: Path) -> None:
    path.rename(other)


def _exchange(_chance: random.Random, path: Path, other: Path) -> None:
    linux.renameat2(-100, os.fsencode(path), -100, os.fsencode(other), _RENAME_EXCHANGE)


def _link(_chance: random.Random, path: Path, other: Path) -> None:
    os.link(path, other, follow_symlinks=False)


def _chmod(chance: random.Random, path: Path, _other: Path) -> None:
    path.chmod(chance.choice((0o600, 0o644, 0o755)))


def _symlink(_chance: random.Random, path: Path, other: Path) -> None:
    path.symlink_to(other.name)


def _fifo(_chance: random.Random, path: Path, _other: Path) -> None:
    os.mkfifo(path)


def _truncate(chance: random.Random, path: Path, _other: Path) -> None:
    os.truncate(path, chance.choice((0, 100, 6000)))


def _list(_chance: random.Random, path: Path, _other: Path) -> None:
    os.listdir(path)  # the kernel takes needless marks of impurity away then


_ACTS = (
    *(_write,) * 4, *(_mkdir,) * 2, *(_remove,) * 2, *(_rename,) * 4, _exchange, *(_link,) * 3, *(_chmod,) * 2,
    _symlink, _fifo, _truncate, _list,
)  # fmt: skip


def _main(words: Sequence[str]) -> int:
    userxattr = "userxattr" in words
    overlay, told = make(Path(words[0]), int(words[1]), int(words[2]), userxattr)
    found = overlay.found(userxattr)
    if found:
        print(told, *found, sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
