"""What a call costs when the store is large, and what group commit saves.

Prints ratios measured in one run, the two sides taking turns, since machines drift:
    .venv/bin/python -m bench.metadata
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from snapshotter.config import LogConfig, MountConfig, OverlayConfig
from snapshotter.engine import Engine
from snapshotter.logs import configure
from snapshotter.model import Commitment, Creation, Kind
from snapshotter.root import claim

SMALL, LARGE = 10, 10_000
ROUNDS, CALLS = 20, 25
WRITERS, CALLS_EACH = 32, 20


def filled(directory: Path, count: int) -> Engine:
    """An engine with one layer and `count` active snapshots on it."""
    root, _ = claim(directory)
    engine = Engine(root, MountConfig(mode="client"), OverlayConfig())
    engine.create(Creation(Kind.ACTIVE, "tmp", "", {}))
    engine.commit(Commitment("base", "tmp", "", {}))
    in_threads(8, lambda t: [prepare(engine, f"filler-{t}-{i}") for i in range(count // 8 + 1)])
    return engine


def prepare(engine: Engine, key: str) -> None:
    engine.create(Creation(Kind.ACTIVE, key, "base", {"containerd.io/gc.root": "now"}))


def in_threads(count: int, act: Callable[[int], object]) -> None:
    threads = [threading.Thread(target=act, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def timed_us(act: Callable[[str], object]) -> float:
    began_s = time.perf_counter()
    for number in range(CALLS):
        act(f"bench-{number}")
    return (time.perf_counter() - began_s) / CALLS * 1e6


def compare_sizes(base: Path) -> None:
    engines = {count: filled(base / str(count), count) for count in (SMALL, LARGE)}
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for count, engine in engines.items():
            times.setdefault(("Prepare", count), []).append(timed_us(lambda key, e=engine: prepare(e, key)))  # type: ignore[misc]
            times.setdefault(("Stat", count), []).append(timed_us(engine.stat))
            times.setdefault(("Remove", count), []).append(timed_us(engine.remove))
            engine.cleanup().result()
    for call in ("Prepare", "Stat", "Remove"):
        small, large = (statistics.median(times[call, count]) for count in (SMALL, LARGE))
        print(
            f"{call:8} {small:8.0f} µs with {SMALL}, {large:8.0f} µs with {LARGE} snapshots: ratio {large / small:.2f}"
        )
    for engine in engines.values():
        engine.close()


def group_commit(base: Path) -> None:
    engine = filled(base / "writers", 0)
    store = engine._store
    before = store.batches
    began_s = time.perf_counter()
    in_threads(WRITERS, lambda t: [prepare(engine, f"w-{t}-{i}") for i in range(CALLS_EACH)])
    elapsed_s = time.perf_counter() - began_s
    calls = WRITERS * CALLS_EACH
    commits = store.batches - before
    print(
        f"{WRITERS} writers: {calls} Prepares in {commits} LMDB commits, {calls / commits:.1f} calls a commit, "
        f"{calls / elapsed_s:.0f} calls/s"
    )
    engine.close()


def main() -> None:
    configure(LogConfig(level="error"))
    base = Path(tempfile.mkdtemp(prefix="dds-bench-", dir="/var/tmp"))
    try:
        compare_sizes(base)
        group_commit(base)
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
