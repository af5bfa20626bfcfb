"""What Prepare, Mounts and Remove of a materialized snapshot cost when a thousand others are mounted.

Prints ratios measured in one run, the two sides taking turns, since machines drift:
    .venv/bin/python -m bench.mounts

The mount table is one for both sides: so the others are mounted and removed again each round.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.roots import opened
from snapshotter.config import LogConfig
from snapshotter.engine import Engine
from snapshotter.logs import configure
from snapshotter.model import Commitment, Creation, Kind

FEW, MANY = 10, 1000
ROUNDS, CALLS = 5, 50
LAYERS = 10

Times = dict[str, list[float]]


def add_layers(engine: Engine) -> None:
    for number in range(LAYERS):
        (mount,) = engine.create(Creation(Kind.ACTIVE, "tmp", str(number - 1) if number else "", {}))
        Path(mount.source, str(number)).touch()
        engine.commit(Commitment(str(number), "tmp", "", {}))


def prepare(engine: Engine, key: str) -> None:
    engine.create(Creation(Kind.ACTIVE, key, str(LAYERS - 1), {}))


def timed_us(act: Callable[[str], object]) -> list[float]:
    found = []
    for number in range(CALLS):
        began_s = time.perf_counter()
        act(f"bench-{number}")
        found.append((time.perf_counter() - began_s) * 1e6)
    return found


def measure(engine: Engine, times: Times) -> None:
    times.setdefault("Prepare", []).extend(timed_us(lambda key: prepare(engine, key)))
    times.setdefault("Mounts", []).extend(timed_us(engine.mounts))
    times.setdefault("Remove", []).extend(timed_us(engine.remove))
    engine.cleanup().result()


def change(act: Callable[[str], object]) -> None:
    for number in range(FEW, MANY):
        act(f"filler-{number}")


def main() -> None:
    configure(LogConfig(level="error"))
    base = Path(tempfile.mkdtemp(prefix="dds-bench-", dir="/var/tmp"))
    few: Times = {}
    many: Times = {}
    try:
        with opened(base / "root") as engine:
            add_layers(engine)
            for number in range(FEW):
                prepare(engine, f"filler-{number}")
            for _ in range(ROUNDS):
                measure(engine, few)
                change(lambda key: prepare(engine, key))
                measure(engine, many)
                change(engine.remove)
                engine.cleanup().result()
            measure(engine, few)
    finally:
        shutil.rmtree(base)
    for call in few:
        small, large = statistics.median(few[call]), statistics.median(many[call])
        print(f"{call:8} {small:6.0f} µs with {FEW}, {large:6.0f} µs with {MANY} mounted: ratio {large / small:.2f}")


if __name__ == "__main__":
    main()
