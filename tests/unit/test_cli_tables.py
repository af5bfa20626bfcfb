"""Columns stay aligned, and give way only on a terminal."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.cli.output import Output
from snapshotter.cli.tables import Column, format_fields, format_table
from snapshotter.cli.text import display_width

COLUMNS = (Column("NAME", flexible=True), Column("SIZE", right=True), Column("PARENT", flexible=True))
CELLS = st.text("ab鍵e\u0301-", max_size=80)


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    lines = list(format_table(COLUMNS, [["a", "10 B", "-"], ["longer", "1 B", "p"]], None))
    assert lines == ["NAME    SIZE  PARENT", "a       10 B  -", "longer   1 B  p"]


@given(st.lists(st.tuples(CELLS, CELLS).map(lambda pair: [pair[0], "1 B", pair[1]])), st.integers(40, 200))
def test_no_line_is_wider_than_the_terminal(rows: list[list[str]], width: int) -> None:
    assert all(display_width(line) <= width for line in format_table(COLUMNS, rows, width))


@given(st.lists(st.tuples(CELLS, CELLS).map(lambda pair: [pair[0], "1 B", pair[1]])))
def test_without_a_terminal_nothing_is_shortened(rows: list[list[str]]) -> None:
    for row, line in zip(rows, list(format_table(COLUMNS, rows, None))[1:], strict=True):
        assert line.startswith(row[0])
        assert line.endswith(row[2])


def test_a_short_column_leaves_its_room_to_a_long_one() -> None:
    long = "x" * 60
    line = list(format_table(COLUMNS, [[long, "1 B", "p"]], 80))[1]
    assert line.startswith(long)


def test_fields_are_aligned() -> None:
    fields = [("a", "1"), ("longer", ""), ("", "2")]
    assert list(format_fields(fields)) == ["a       1", "longer", "        2"]


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none())))
def test_an_array_is_json_in_ascii_with_an_element_a_line(elements: list[dict[str, object]]) -> None:
    stream = io.StringIO()
    Output(stream, json=True).array(elements)  # type: ignore[arg-type]
    written = stream.getvalue()
    assert json.loads(written) == elements
    assert written.isascii()
    assert len(written.splitlines()) == (len(elements) + 2 if elements else 1)


def test_an_array_cut_short_does_not_parse() -> None:
    stream = io.StringIO()

    def failing() -> object:
        yield {"name": "a"}
        raise ConnectionError

    with pytest.raises(ConnectionError):
        Output(stream, json=True).array(failing())  # type: ignore[arg-type]
    assert stream.getvalue() == '[\n{"name": "a"}'


def test_an_encoding_without_an_ellipsis_gets_ascii() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    out = Output(stream, width=30)
    out.table([Column("NAME", flexible=True)], [["x" * 50]])
    stream.flush()
    assert out.unicode is False
    assert b"xx~xx" in raw.getvalue()
