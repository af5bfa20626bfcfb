"""Trees of files to measure with: the same for the same arguments, in every run."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FILES_EACH = 100
"""In a directory."""
_TIME_NS = 1_700_000_000_000_000_000
_MEGABYTE = 1 << 20
_BIG_SHARES = (512, 256, 256, 128, 128, 128, 128, 64, 64, 64, 64, 32, 32, 32, 32, 32, 32, 32, 32)


@dataclass(frozen=True, slots=True)
class Tree:
    path: Path
    name: str
    files: int
    size_bytes: int


def small_files(path: Path, count: int, *, least_bytes: int = 64, duplicates: float = 0.1) -> Tree:
    """Sizes as in a tree of programs: most have 5 to 16 KiB, some fewer, few up to 64 KiB, none under `least_bytes`.
    Some are there twice, with the same mode and times."""
    chance = random.Random(count)
    total = 0
    made: list[tuple[bytes, int, int]] = []
    for number in range(count):
        if made and chance.random() < duplicates:
            data, mode, mtime_ns = chance.choice(made)
        else:
            data = chance.randbytes(max(least_bytes, _small_size(chance)))
            mode = 0o755 if chance.random() < 0.1 else 0o644
            mtime_ns = _TIME_NS + number // FILES_EACH * 1_000_000_000
            if number % FILES_EACH < 10:  # what may be repeated; not all of it, for memory's sake
                made.append((data, mode, mtime_ns))
        directory = path / f"package{number // FILES_EACH:04}"
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / f"file{number:06}.py", (data,), mode, mtime_ns)
        total += len(data)
    return Tree(path, f"{count:,} small files", count, total)


def _small_size(chance: random.Random) -> int:
    kind = chance.random()
    if kind < 0.3:
        return chance.randint(64, 4095)
    if kind < 0.92:
        return chance.randint(5 << 10, 16 << 10)
    return chance.randint(16 << 10, 64 << 10)


def big_files(path: Path, total_mb: int) -> Tree:
    """Of a quarter to a sixty-fourth of `total_mb`, one of the larger ones twice."""
    chance = random.Random(total_mb)
    path.mkdir(parents=True)
    sizes = [max(1, share * total_mb // sum(_BIG_SHARES)) * _MEGABYTE for share in _BIG_SHARES]
    seeds = [chance.getrandbits(64) for _ in sizes]
    seeds[2] = seeds[1]
    for number, (seed, size_bytes) in enumerate(zip(seeds, sizes, strict=True)):
        _write(path / f"model{number:02}.bin", _random_blocks(seed, size_bytes), 0o644, _TIME_NS)
    return Tree(path, f"{len(sizes)} big files", len(sizes), sum(sizes))


def _random_blocks(seed: int, size_bytes: int) -> Iterator[bytes]:
    source = random.Random(seed)
    for _ in range(size_bytes // _MEGABYTE):
        yield source.randbytes(_MEGABYTE)


def _write(path: Path, blocks: Iterable[bytes], mode: int, mtime_ns: int) -> None:
    with path.open("xb") as stream:
        stream.writelines(blocks)
    path.chmod(mode)
    os.utime(path, ns=(mtime_ns, mtime_ns))
