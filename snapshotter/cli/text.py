"""How values look on a terminal: names made harmless and fitted, sizes, times.

A key is any UTF-8 that some client chose. Printed as it is, it could move the cursor, change colours
or the title, or reverse the reading order; so everything that Python does not call printable (controls,
format characters such as bidi overrides, surrogates, unassigned) is shown as an escape sequence.
"""

from __future__ import annotations

import datetime
import unicodedata

_NS_PER_S = 1_000_000_000
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def printable(text: str) -> str:
    """`text` on one line, nothing in it that a terminal obeys."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def escape(text: str) -> str:
    r"""As `printable`, and reversible: a backslash becomes `\\`."""
    return printable(text.replace("\\", "\\\\"))


def _escaped(char: str) -> str:
    if char in _SHORT:
        return _SHORT[char]
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def display_width(text: str) -> int:
    """Columns that a terminal uses for a printable text."""
    return len(text) if text.isascii() else sum(map(_char_width, text))


def _char_width(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def shorten(text: str, width: int, ellipsis: str = "…") -> str:
    """`text` in at most `width` columns, the middle left out: what tells keys apart is often at the end."""
    if display_width(text) <= width:
        return text
    room = max(0, width - len(ellipsis))
    head = _prefix(text, (room + 1) // 2)
    tail = _prefix(text[::-1], room // 2)[::-1]
    return head + ellipsis + tail


def _prefix(text: str, width: int) -> str:
    used = 0
    for index, char in enumerate(text):
        used += _char_width(char)
        if used > width:
            return text[:index]
    return text


def human_size(size_bytes: int) -> str:
    """Three significant digits, binary units: 512 B, 4.00 KiB, 12.3 MiB, -1.00 KiB."""
    if size_bytes < 0:
        return "-" + human_size(-size_bytes)
    if size_bytes < 1024:
        return f"{size_bytes} B"
    units = iter(("KiB", "MiB", "GiB", "TiB", "PiB"))
    value, unit = size_bytes / 1024, next(units)
    while value >= 1023.5 and unit != "PiB":
        value, unit = value / 1024, next(units)
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def counted(count: int, what: str) -> str:
    """1 object, 2 objects."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def human_age(age_ns: int) -> str:
    """The largest whole unit: 12 s, 5 min, 3 h, 4 d, 2 y. A clock that was set back shows as 0 s."""
    age_s = max(0, age_ns // _NS_PER_S)
    for seconds, unit in ((365 * 86400, "y"), (86400, "d"), (3600, "h"), (60, "min")):
        if age_s >= seconds:
            return f"{age_s // seconds} {unit}"
    return f"{age_s} s"


def local_time(time_ns: int) -> str:
    """To the second, in the caller's time zone."""
    return f"{_utc(time_ns).astimezone():%Y-%m-%d %H:%M:%S}"


def local_time_exact(time_ns: int) -> str:
    """To the nanosecond, in the caller's time zone, which is named."""
    local = _utc(time_ns).astimezone()
    return f"{local:%Y-%m-%d %H:%M:%S}.{time_ns % _NS_PER_S:09d} {local:%z}"


def rfc3339(time_ns: int) -> str:
    """To the nanosecond, UTC: 2025-06-01T12:00:00.000000001Z, always nine digits."""
    return f"{_utc(time_ns):%Y-%m-%dT%H:%M:%S}.{time_ns % _NS_PER_S:09d}Z"


def _utc(time_ns: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(time_ns // _NS_PER_S, datetime.UTC)
