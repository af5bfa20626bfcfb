"""What Commit with deduplication costs, beside the programs that do something like it, and beside reading and hashing.

    .venv/bin/python -m bench.dedup [--files N ...] [--big-mb MB] [--rounds N] [--sync off|on|both] [--only WORD ...]
    .venv/bin/python -m bench.dedup --quick

Each competitor works on a copy of the same tree, which is on the disk and in the page cache when the clock starts.
"new": nothing else is there. "known": the same tree is there already, handled by the same competitor. They take turns,
in rounds; medians are printed. Nothing is subtracted: "commit, off" is what Commit costs without deduplication.

Unsynced: the daemon and all others run under libeatmydata, and ostree with its own syncing off. Synced: who does not
sync what it did is followed by `sync --file-system` on the clock. The floor is `b3sum` of all files.

What is counted for hardlink and jdupes, "known", is a run over both trees: they remember nothing. "new", they read
only what has the size of another file. With the defaults it takes an hour.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.clock import Clock, Cost
from bench.disk import fresh_ext4
from bench.trees import Tree, big_files, small_files
from tests.rig.host import Host, upper_of
from tests.rig.roots import tear_down

CASES = ("new", "known")
FLOOR = "b3sum"

Costs = Iterator[tuple[str, Cost]]
"""What was measured, and what it took."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One competitor's, in a directory of its own on the filesystem that all use."""

    tree: Tree
    base: Path
    synced: bool

    def copy(self, name: str) -> Path:
        """A fresh copy of the tree, ready for the clock."""
        target = self.base / name
        target.mkdir()
        self.fill(target)
        self.settle(target)
        return target

    def fill(self, target: Path) -> None:
        subprocess.run(["cp", "-a", f"{self.tree.path}/.", target], check=True)

    def settle(self, target: Path) -> None:
        """Nothing is left to be written, and all of the tree is in memory."""
        subprocess.run(["sync", "--file-system", self.base], check=True)
        names_of(target, self.base / "names")
        subprocess.run(["xargs", "-0", "-a", self.base / "names", "cat"], stdout=subprocess.DEVNULL, check=True)

    def run(self, *argv: str | Path, syncs: bool = False) -> Cost:
        """`syncs`: whether the program makes durable what it did."""
        wrapper = [] if self.synced else ["eatmydata"]
        clock = Clock()
        subprocess.run([*wrapper, *argv], stdout=subprocess.DEVNULL, check=True)
        if self.synced and not syncs:
            subprocess.run(["sync", "--file-system", self.base], check=True)
        return clock.cost()

    def environment(self) -> dict[str, str]:
        """The daemon's."""
        if self.synced:
            return {}
        script = 'echo "$LD_PRELOAD"; echo "$LD_LIBRARY_PATH"'
        found = subprocess.run(["eatmydata", "sh", "-c", script], check=True, capture_output=True, text=True)
        preload, library_path = found.stdout.splitlines()
        return {"LD_PRELOAD": preload, "LD_LIBRARY_PATH": library_path}


def names_of(directory: Path, target: Path) -> None:
    """Writes all files' paths, each ended by NUL."""
    with target.open("wb") as stream:
        subprocess.run(["find", directory, "-type", "f", "-print0"], stdout=stream, check=True)


# -- the competitors


def commit(strategy: str, turn: Turn) -> Costs:
    with Host(turn.base, dedup={"strategy": strategy}, environment=turn.environment()) as host:
        assert host.client.info().dedup_strategy == strategy, "the machine cannot have it"
        # Its workers run from now on.
        host.unpack("little", fill=lambda tree: (tree / "file").write_bytes(os.urandom(10_000)))
        for case in CASES:
            key = f"extract-1 {case}"
            upper = upper_of(host.client.prepare(key))
            turn.fill(upper)
            turn.settle(upper)
            clock = Clock(host.daemon.pid)
            host.client.commit(case, key)
            yield f"commit, {strategy}, {case}", clock.cost()


def ostree(turn: Turn) -> Costs:
    repository = turn.base / "repository"
    subprocess.run(["ostree", f"--repo={repository}", "init", "--mode=bare"], check=True)
    fsync = "true" if turn.synced else "false"
    subprocess.run(["ostree", f"--repo={repository}", "config", "set", "core.fsync", fsync], check=True)
    for case in CASES:
        tree = turn.copy(case)
        options = [f"--repo={repository}", f"--branch={case}", f"--tree=dir={tree}", f"--fsync={fsync}"]
        yield f"ostree commit, {case}", turn.run("ostree", "commit", *options, syncs=True)


def hardlink(turn: Turn) -> Costs:
    trees = []
    for case in CASES:
        trees.append(turn.copy(case))
        yield f"hardlink, {case}", turn.run("hardlink", "--quiet", *trees)


def jdupes(turn: Turn) -> Costs:
    trees = []
    for case in CASES:
        trees.append(turn.copy(case))
        yield f"jdupes -L, {case}", turn.run("jdupes", "--quiet", "--recurse", "--link-hard", *trees)


def copying(turn: Turn) -> Costs:
    yield "cp -a", turn.run("cp", "-a", turn.copy("tree"), turn.base / "copy")


def hashing(turn: Turn) -> Costs:
    names_of(turn.copy("tree"), turn.base / "names")
    yield FLOOR, turn.run("xargs", "-0", "-a", turn.base / "names", "b3sum", syncs=True)


COMPETITORS: dict[str, Callable[[Turn], Costs]] = {
    FLOOR: hashing,
    "off": partial(commit, "off"),
    "stub": partial(commit, "stub"),
    "hardlink": partial(commit, "hardlink"),
    "ostree": ostree,
    "hardlink(1)": hardlink,
    "jdupes": jdupes,
    "cp": copying,
}


# -- measuring


def measure(tree: Tree, base: Path, names: Sequence[str], rounds: int, synced: bool) -> dict[str, list[Cost]]:
    """Of every round, of everything that the competitors of these names measure."""
    found: dict[str, list[Cost]] = {}
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            turn = Turn(tree, base / "turn", synced)
            turn.base.mkdir()
            try:
                for what, cost in COMPETITORS[name](turn):
                    found.setdefault(what, []).append(cost)
            finally:
                tear_down(turn.base)
    return found


def show(tree: Tree, found: dict[str, list[Cost]], synced: bool) -> None:
    rounds = len(found[FLOOR])
    floor = Cost.median(found[FLOOR])
    print(
        f"\n{tree.name}, {tree.size_bytes / 1e6:.0f} MB, {'synced' if synced else 'unsynced'}; "
        f"medians of {rounds} rounds, load {os.getloadavg()[0]:.1f}"
    )
    print(
        f"{'':24}{'s':>8}{'least':>8}{'most':>8}{'MB/s':>7}{'µs/file':>9}{'over floor':>12}{'ratio':>7}"
        f"{'cpu s':>8}{'µs/file':>9}{'over floor':>12}{'ratio':>7}"
    )
    for what, costs in found.items():
        cost, times = Cost.median(costs), [cost.elapsed_s for cost in costs]
        print(
            f"{what:24}{cost.elapsed_s:8.3f}{min(times):8.3f}{max(times):8.3f}"
            f"{tree.size_bytes / cost.elapsed_s / 1e6:7.0f}"
            f"{beside(cost.elapsed_s, floor.elapsed_s, tree.files)}{cost.cpu_s:8.2f}"
            f"{beside(cost.cpu_s, floor.cpu_s, tree.files)}",
            flush=True,
        )


def beside(seconds: float, floor_s: float, files: int) -> str:
    return f"{seconds / files * 1e6:9.0f}{(seconds - floor_s) / files * 1e6:12.0f}{seconds / floor_s:7.2f}"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.dedup", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, nargs="*", default=[10_000, 100_000], help="numbers of small files")
    parser.add_argument("--big-mb", type=int, default=2048, help="megabytes of big files; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sync", choices=("off", "on", "both"), default="both")
    parser.add_argument("--only", nargs="+", choices=COMPETITORS, default=list(COMPETITORS), metavar="WORD",
                        help=", ".join(COMPETITORS))  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="1,000 files, 128 MB, one round")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="where there is space for an image")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.files, arguments.big_mb, arguments.rounds = [1000], min(arguments.big_mb, 128), 1
    return arguments


def main() -> None:
    arguments = parsed()
    names = [name for name in COMPETITORS if name in (FLOOR, *arguments.only)]
    makers: list[Callable[[Path], Tree]] = [partial(small_files, count=count) for count in arguments.files]
    if arguments.big_mb:
        makers.append(partial(big_files, total_mb=arguments.big_mb))
    with fresh_ext4(arguments.directory) as base:
        for make in makers:
            tree = make(base / "template")
            for synced in (False, True):
                if arguments.sync in ("both", "on" if synced else "off"):
                    show(tree, measure(tree, base, names, arguments.rounds, synced), synced)
            shutil.rmtree(tree.path)


if __name__ == "__main__":
    main()
