"""How long others wait for Stat while a large commit runs: the 99th percentile, as a multiple of an idle daemon's.

.venv/bin/python -m bench.latency [--files N] [--rounds N]
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

from bench.disk import fresh_ext4
from bench.trees import small_files
from snapshotter.client import Client
from tests.rig.host import Host, upper_of
from tests.rig.roots import tear_down

_PACE_S = 0.002
"""Between two calls, as if from a few clients."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000, metavar="N", help="in the layer")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument(
        "--directory", type=Path, default=Path("/var/tmp"), metavar="DIR", help="where to make a filesystem"
    )
    arguments = parser.parse_args()
    with fresh_ext4(arguments.directory) as base, Host(base) as host:
        try:
            print(f"{'':8}{'calls':>8}{'median ms':>12}{'p99 ms':>10}{'worst ms':>10}{'p99 to idle':>13}")
            ratios = [one_round(host, number, arguments.files) for number in range(arguments.rounds)]
            print(
                f"median of p99 during a commit of {arguments.files:,} files to idle: {statistics.median(ratios):.1f}"
            )
        finally:
            tear_down(host.root)


def one_round(host: Host, number: int, files: int) -> float:
    key = f"extract-{number} layer"
    other = f"other {number}"
    host.client.prepare(other)
    small_files(upper_of(host.client.prepare(key)), files)
    began_s = time.monotonic()
    idle = measured(host, other, lambda: time.monotonic() < began_s + 5)
    show("idle", idle, idle)
    commit = threading.Thread(target=host.client.commit, args=(f"layer {number}", key))
    commit.start()
    busy = measured(host, other, commit.is_alive)
    show("commit", busy, idle)
    return p99(busy) / p99(idle)


def measured(host: Host, key: str, goes_on: Callable[[], bool]) -> list[float]:
    """Milliseconds of each Stat, from a connection of its own."""
    found = []
    with Client(str(host.daemon.address)) as client:
        client.info()
        while goes_on():
            began_s = time.perf_counter()
            client.stat(key)
            found.append((time.perf_counter() - began_s) * 1e3)
            time.sleep(_PACE_S)
    return found


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[-1]


def show(what: str, values: list[float], idle: list[float]) -> None:
    median, high, worst = statistics.median(values), p99(values), max(values)
    print(f"{what:8}{len(values):8}{median:12.2f}{high:10.2f}{worst:10.2f}{high / p99(idle):13.1f}")


if __name__ == "__main__":
    main()
