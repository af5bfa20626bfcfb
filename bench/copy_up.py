"""What `chown -R` of a mounted snapshot costs, with metacopy against without.

The same tree, 10,000 files of 250 MB in all, the two sides taking turns, since machines drift. Prints ratios
measured in one run:
    .venv/bin/python -m bench.copy_up
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from bench.roots import opened
from snapshotter.config import LogConfig, OverlayConfig
from snapshotter.engine import Engine
from snapshotter.logs import configure
from snapshotter.model import Commitment, Creation, Kind

DIRECTORIES, FILES_EACH, FILE_BYTES = 100, 100, 25_000
ROUNDS = 3
SIDES = {"on": OverlayConfig(), "off": OverlayConfig(metacopy="off")}


def add_layer(engine: Engine, template: Path) -> None:
    (mount,) = engine.create(Creation(Kind.ACTIVE, "tmp", "", {}))
    subprocess.run(["cp", "-a", f"{template}/.", mount.source], check=True)
    engine.commit(Commitment("base", "tmp", "", {}))


def make_template(directory: Path) -> None:
    for number in range(DIRECTORIES):
        (directory / str(number)).mkdir(parents=True)
        for name in range(FILES_EACH):
            (directory / str(number) / str(name)).write_bytes(os.urandom(FILE_BYTES))


def measure(engine: Engine, root: Path) -> tuple[float, int]:
    """Seconds, until it is on the disk, and the bytes that the upper then has allocated."""
    (mount,) = engine.create(Creation(Kind.ACTIVE, "bench", "base", {}))
    upper = root / "snapshots" / Path(mount.source).name / "fs"
    subprocess.run(["find", mount.source, "-newermt", "2100-01-01"], check=True)  # warms the inodes of both sides
    began_s = time.perf_counter()
    subprocess.run(["chown", "-R", "1000:1000", mount.source], check=True)
    subprocess.run(["sync", "--file-system", mount.source], check=True)
    elapsed_s = time.perf_counter() - began_s
    allocated = int(subprocess.run(["du", "-s", "-B1", upper], check=True, capture_output=True).stdout.split()[0])
    engine.remove("bench")
    engine.cleanup().result()
    return elapsed_s, allocated


def main() -> None:
    configure(LogConfig(level="error"))
    base = Path(tempfile.mkdtemp(prefix="dds-bench-", dir="/var/tmp"))
    try:
        make_template(base / "template")
        with ExitStack() as stack:
            engines = {side: stack.enter_context(opened(base / side, overlay)) for side, overlay in SIDES.items()}
            for engine in engines.values():
                add_layer(engine, base / "template")
            found: dict[str, list[tuple[float, int]]] = {side: [] for side in SIDES}
            for _ in range(ROUNDS):
                for side, engine in engines.items():
                    found[side].append(measure(engine, base / side))
    finally:
        shutil.rmtree(base)
    times = {side: statistics.median(elapsed_s for elapsed_s, _ in found[side]) for side in SIDES}
    sizes = {side: statistics.median(allocated for _, allocated in found[side]) for side in SIDES}
    print(
        f"chown -R of {DIRECTORIES * FILES_EACH} files, {DIRECTORIES * FILES_EACH * FILE_BYTES / 1e6:.0f} MB: "
        f"metacopy on {times['on']:.2f} s, off {times['off']:.2f} s: ratio {times['on'] / times['off']:.2f}; "
        f"allocated {sizes['on'] / 1e6:.1f} MB against {sizes['off'] / 1e6:.1f} MB: "
        f"ratio {sizes['on'] / sizes['off']:.3f}"
    )


if __name__ == "__main__":
    main()
