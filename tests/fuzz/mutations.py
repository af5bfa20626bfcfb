"""The corpus, and what becomes of it: messages and bytes that are nearly right.

A file of corpus/ is called METHOD-WHAT, and holds a request of that method as it is on the wire; those called wire-WHAT
hold what a connection begins with. A request that once did harm becomes a file there.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_DIRECTORY = Path(__file__).parent / "corpus"
_BYTES = (b"\x00", b"\x01", b"\x7f", b"\x80", b"\xff")
_VARINTS = (b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"\x80\x80\x80\x80\x00", b"\xff" * 12)
_TEXTS = (
    b"\0",
    b"\xff\xfe",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"..",
    b"/",
    b"\n",
    b"../" * 40,
    b"a" * 70_000,
    b'"',
    b"\\x",
)


@dataclass(frozen=True, slots=True)
class Seed:
    """One file."""

    method: str
    """"wire" where it is no request."""
    raw: bytes


def corpus() -> list[Seed]:
    return [Seed(path.name.partition("-")[0], path.read_bytes()) for path in sorted(_DIRECTORY.iterdir())]


def corpus_file(name: str) -> bytes:
    return (_DIRECTORY / name).read_bytes()


def mutate(chance: random.Random, raw: bytes, others: list[bytes]) -> bytes:
    """`raw`, changed in a few places; now and then not at all."""
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3, 8))):
        raw = chance.choice(_CHANGES)(chance, raw, others)
    return raw


Change = Callable[[random.Random, bytes, list[bytes]], bytes]


def _flip(chance: random.Random, raw: bytes, _others: list[bytes]) -> bytes:
    if not raw:
        return raw
    at = chance.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :]


def _set(chance: random.Random, raw: bytes, _others: list[bytes]) -> bytes:
    at = chance.randint(0, len(raw))
    return raw[:at] + chance.choice(_BYTES) + raw[at + 1 :]


def _insert(chance: random.Random, raw: bytes, _others: list[bytes]) -> bytes:
    at = chance.randint(0, len(raw))
    more = chance.choice((chance.choice(_VARINTS), chance.choice(_TEXTS), chance.randbytes(chance.randint(1, 20))))
    return raw[:at] + more + raw[at:]


def _delete(chance: random.Random, raw: bytes, _others: list[bytes]) -> bytes:
    begin, end = _range(chance, raw)
    return raw[:begin] + raw[end:]


def _repeat(chance: random.Random, raw: bytes, _others: list[bytes]) -> bytes:
    begin, end = _range(chance, raw)
    return raw[:begin] + raw[begin:end] * chance.choice((2, 3, 100)) + raw[end:]


def _cut(chance: random.Random, raw: bytes, _others: list[bytes]) -> bytes:
    return raw[: chance.randint(0, len(raw))]


def _splice(chance: random.Random, raw: bytes, others: list[bytes]) -> bytes:
    other = chance.choice(others)
    begin, end = _range(chance, other)
    at = chance.randint(0, len(raw))
    return raw[:at] + other[begin:end] + raw[at:]


_CHANGES: tuple[Change, ...] = (_flip, _set, _insert, _delete, _repeat, _cut, _splice)


def _range(chance: random.Random, raw: bytes) -> tuple[int, int]:
    begin = chance.randint(0, len(raw))
    return begin, min(len(raw), begin + chance.randint(0, 40))
