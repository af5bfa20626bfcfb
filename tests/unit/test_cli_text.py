"""What a terminal gets to see: harmless, unambiguous, of the promised width."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.cli.text import display_width, escape, human_age, human_size, printable, rfc3339, shorten

TEXTS = st.text(st.characters(codec=None, exclude_categories=()))  # lone surrogates, as argv may hold, too


def unescape(text: str) -> str:
    names = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(
        r"\\(?:x(..)|u(....)|U(.{8})|(.))",
        lambda m: names[m[4]] if m[4] else chr(int(m[1] or m[2] or m[3], 16)),
        text,
    )


@given(TEXTS)
def test_escaped_text_is_printable_and_reversible(text: str) -> None:
    assert escape(text).isprintable()
    assert unescape(escape(text)) == text


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("gnp.\u202eexe", r"gnp.\u202eexe"),
        ("\U000e0041", r"\U000e0041"),
        (r"back\slash", r"back\\slash"),
        ("naïve/ключ/鍵", "naïve/ключ/鍵"),
    ],
)
def test_nothing_that_a_terminal_obeys_passes(hostile: str, shown: str) -> None:
    assert escape(hostile) == shown


def test_a_message_keeps_its_backslashes() -> None:
    assert printable('no snapshot "a\\n"\x1b') == 'no snapshot "a\\n"\\x1b'


@given(st.text(), st.integers(min_value=1, max_value=60))
def test_a_shortened_text_fits_and_keeps_both_ends(text: str, width: int) -> None:
    text = escape(text)
    short = shorten(text, width)
    assert display_width(short) <= width
    if display_width(text) <= width:
        assert short == text
    else:
        head, tail = short.split("…", 1) if "…" not in text else (short[0:0], short[0:0])
        assert text.startswith(head)
        assert text.endswith(tail)


def test_wide_and_combining_characters_are_counted_in_columns() -> None:
    assert display_width("鍵") == 2
    assert display_width("e\u0301") == 1
    assert shorten("鍵鍵鍵鍵", 5) == "鍵…鍵"


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (4096, "4.00 KiB"), (12_595, "12.3 KiB"),
        (1_048_000, "1023 KiB"), (1_048_575, "1.00 MiB"), (5 << 40, "5.00 TiB"), (1 << 63, "8192 PiB"),
        (-1, "-1 B"), (-4096, "-4.00 KiB"),
    ],
)  # fmt: skip
def test_sizes_have_three_digits(size_bytes: int, shown: str) -> None:
    assert human_size(size_bytes) == shown


def test_ages_never_go_below_zero() -> None:
    assert [human_age(s * 10**9) for s in (-5, 0, 59, 60, 7200, 86400 * 3, 86400 * 800)] == [
        "0 s", "0 s", "59 s", "1 min", "2 h", "3 d", "2 y",
    ]  # fmt: skip


def test_a_time_has_nine_digits_and_loses_none() -> None:
    assert rfc3339(1_748_779_200_000_000_001) == "2025-06-01T12:00:00.000000001Z"
    assert rfc3339(1_748_779_200_100_000_000) == "2025-06-01T12:00:00.100000000Z"
