"""Where results go: text for a person or JSON for a script, on one stream.

The JSON is pure ASCII. A list is written element by element, each on a line of its own inside one
array, so that memory stays flat, and a list that was cut short by an error does not parse.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

from snapshotter.cli.tables import Column, format_fields, format_table

JsonValue = Mapping[str, "JsonValue"] | Sequence["JsonValue"] | str | int | bool | None


class Output:
    """`width` is the terminal's, None where the stream is none: then nothing is shortened."""

    def __init__(self, stream: TextIO, json: bool = False, width: int | None = None) -> None:
        self._stream = stream
        self.json = json
        self.width = width
        self.unicode = _can_encode(stream, "…└─")

    def line(self, text: str) -> None:
        self._stream.write(text + "\n")

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]], fit: bool = True) -> None:
        ellipsis = "…" if self.unicode else "~"
        for line in format_table(columns, rows, self.width if fit else None, ellipsis):
            self.line(line)

    def fields(self, fields: Iterable[tuple[str, str]]) -> None:
        for line in format_fields(fields):
            self.line(line)

    def object(self, value: JsonValue) -> None:
        self.line(json.dumps(value, indent=2))

    def array(self, elements: Iterable[JsonValue]) -> None:
        separator = "[\n"
        for element in elements:
            self._stream.write(separator + json.dumps(element))
            separator = ",\n"
        self._stream.write("[]\n" if separator == "[\n" else "\n]\n")


def standard_output(json: bool) -> Output:
    """On stdout; a character that its encoding lacks is escaped. Without a stdout (`>&-`) it goes nowhere."""
    stream = sys.stdout
    if stream is None:
        return Output(io.StringIO(), json)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return Output(stream, json, _terminal_width(stream))


def _terminal_width(stream: TextIO) -> int | None:
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except OSError:  # not a terminal (ENOTTY), or not even a file (io.UnsupportedOperation)
        return None


def _can_encode(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
