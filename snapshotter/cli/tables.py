"""Columns of text, fitted to a terminal where there is one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from snapshotter.cli.text import display_width, shorten

_GAP = "  "
_MIN_FLEXIBLE = 12


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    right: bool = False
    """Aligned right, as numbers are."""
    flexible: bool = False
    """May be shortened where the line does not fit."""


def format_table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None, ellipsis: str = "…"
) -> Iterator[str]:
    """The lines of a table, title first. Cells must be printable. Without a width nothing is shortened."""
    table = [[column.title for column in columns], *rows]
    needed = [max(display_width(row[i]) for row in table) for i in range(len(columns))]
    widths = needed if width is None else _fit(columns, needed, width)
    for row in table:
        cells = (_cell(*each, ellipsis) for each in zip(row, columns, widths, strict=True))
        yield _GAP.join(cells).rstrip()


def format_fields(fields: Iterable[tuple[str, str]]) -> Iterator[str]:
    """One field a line, values aligned."""
    pairs = list(fields)
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        yield f"{name:<{width}}{_GAP}{value}".rstrip()


def _cell(text: str, column: Column, width: int, ellipsis: str) -> str:
    text = shorten(text, width, ellipsis) if column.flexible else text
    padding = " " * (width - display_width(text))
    return padding + text if column.right else text + padding


def _fit(columns: Sequence[Column], needed: Sequence[int], width: int) -> list[int]:
    """Column widths; the flexible ones share what the others leave, and a short one gives to the rest."""
    widths = list(needed)
    flexible = sorted((i for i, column in enumerate(columns) if column.flexible), key=lambda i: needed[i])
    left = width - len(_GAP) * (len(columns) - 1)
    left -= sum(needed[i] for i in range(len(columns)) if i not in flexible)
    for position, i in enumerate(flexible):
        share = max(_MIN_FLEXIBLE, left // (len(flexible) - position))
        widths[i] = min(needed[i], share)
        left -= widths[i]
    return widths
