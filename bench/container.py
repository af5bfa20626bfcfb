"""What a container notices of files that are stored once: reading them, cold and warm, `rm -rf` and `chown -R`.

    .venv/bin/python -m bench.container [--files N] [--rounds N] [--strategies WORD ...]
    .venv/bin/python -m bench.container --quick

An image with one layer of files of at least a block, so that every one of them is shared, with another image that was
there first; and the same without deduplication. A container, that is a mounted active snapshot, reads the layer cold
(all caches of the machine are dropped) and warm; one more for each of the others changes it, warm, and is
removed. The strategies take turns, in rounds; medians are printed, and ratios to "off".
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.clock import Clock, Cost
from bench.disk import fresh_ext4
from bench.trees import Tree, small_files
from tests.rig.host import Host

STRATEGIES = ("off", "stub", "hardlink")
BASELINE = "off"
LEAST_BYTES = 4097
"""Over a block of every common filesystem: stubs are made of such files."""

Costs = dict[str, list[Cost]]
"""By what was done."""


@contextmanager
def started(strategy: str, tree: Tree, base: Path) -> Iterator[Host]:
    """With two images of the tree."""
    base.mkdir()
    with Host(base, dedup={"strategy": strategy}) as host:
        assert host.client.info().dedup_strategy == strategy, "the machine cannot have it"
        for name in ("another", "image"):
            host.unpack(name, fill=lambda target: copy(tree, target / "files"))
        yield host


def copy(tree: Tree, target: Path) -> None:
    subprocess.run(["cp", "-a", tree.path, target], check=True)


@contextmanager
def container(host: Host) -> Iterator[Path]:
    """Where its files are; nothing is left to be written."""
    with host.running("container", "image") as merged:
        subprocess.run(["sync", "--file-system", host.base], check=True)
        yield merged / "files"
    host.client.remove("container")
    host.client.cleanup()


def timed(directory: Path, *argv: str | Path) -> Cost:
    clock = Clock()
    subprocess.run(argv, cwd=directory, stdout=subprocess.DEVNULL, check=True)
    return clock.cost()


def names_of(tree: Tree, target: Path) -> Path:
    """The paths of all files in it, each ended by NUL; returns `target`."""
    with target.open("wb") as stream:
        subprocess.run(["find", ".", "-type", "f", "-print0"], cwd=tree.path, stdout=stream, check=True)
    return target


def warm(files: Path) -> None:
    subprocess.run(["find", files, "-newermt", "2100-01-01"], stdout=subprocess.DEVNULL, check=True)


def measure(host: Host, names: Path, costs: Costs) -> None:
    reading = ("xargs", "-0", "-a", names, "cat")
    with container(host) as files:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        costs.setdefault("read cold", []).append(timed(files, *reading))
        costs.setdefault("read warm", []).append(timed(files, *reading))
    with container(host) as files:
        warm(files)
        costs.setdefault("chown -R", []).append(timed(files.parent, "chown", "-R", "1000:1000", files))
    with container(host) as files:
        warm(files)
        costs.setdefault("rm -rf", []).append(timed(files.parent, "rm", "-rf", files))


def show(tree: Tree, found: dict[str, Costs]) -> None:
    rounds = len(found[BASELINE]["rm -rf"])
    print(
        f"\n{tree.name}, {tree.size_bytes / 1e6:.0f} MB, in a container; medians of {rounds} rounds, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':12}{'strategy':12}{'s':>8}{'least':>8}{'most':>8}{'ratio':>8}{'cpu s':>8}{'ratio':>8}")
    for act in found[BASELINE]:
        baseline = Cost.median(found[BASELINE][act])
        for strategy, costs in found.items():
            cost, times = Cost.median(costs[act]), [cost.elapsed_s for cost in costs[act]]
            print(
                f"{act:12}{strategy:12}{cost.elapsed_s:8.3f}{min(times):8.3f}{max(times):8.3f}"
                f"{cost.elapsed_s / baseline.elapsed_s:8.2f}{cost.cpu_s:8.3f}{cost.cpu_s / baseline.cpu_s:8.2f}"
            )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.container", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--quick", action="store_true", help="1,000 files, 3 rounds")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="where there is space for an image")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.files, arguments.rounds = 1000, 3
    return arguments


def main() -> None:
    arguments = parsed()
    strategies = [strategy for strategy in STRATEGIES if strategy in (BASELINE, *arguments.strategies)]
    with fresh_ext4(arguments.directory) as base:
        tree = small_files(base / "template", arguments.files, least_bytes=LEAST_BYTES)
        names = names_of(tree, base / "names")
        with ExitStack() as stack:
            hosts = {name: stack.enter_context(started(name, tree, base / name)) for name in strategies}
            found: dict[str, Costs] = {name: {} for name in strategies}
            for number in range(arguments.rounds):
                first = number % len(strategies)
                for name in [*strategies[first:], *strategies[:first]]:
                    measure(hosts[name], names, found[name])
        show(tree, found)


if __name__ == "__main__":
    main()
