"""Reads the text of a filter into selectors (the grammar is drawn in the package's docstring).

The rules that no grammar shows are those of containerd's pkg/filters/scanner.go and quote.go: a word is
anything printable (Unicode categories L, M, N, P, S), but its first character may be anything that does
not begin another token; U+0000 and U+FFFD are refused everywhere; `\\xNN` and `\\NNN` are bytes, which need
not be UTF-8 together. Python and Go agree on what is printable up to their versions of Unicode.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import NoReturn

from snapshotter.errors import InvalidArgument, quote

MAX_FIELDS = 1 << 17
"""In the paths of all filters of a call together: bounds time and memory, a dozen times what 10,000 filters
by name need."""


class Operator(enum.Enum):
    PRESENT = ""
    EQUAL = "=="
    NOT_EQUAL = "!="
    MATCHES = "~="


@dataclass(frozen=True, slots=True)
class Selector:
    """One condition. Where escapes made text that is not UTF-8, the bytes that are not are surrogates
    (as with "surrogateescape"), so that it equals no text of a snapshot."""

    path: tuple[str, ...]
    operator: Operator
    value: str


class BadFilter(InvalidArgument):
    """`offset_bytes` is where, in the filter's UTF-8, as containerd counts it."""

    def __init__(self, text: str, at: int, problem: str) -> None:
        self.offset_bytes = len(text[:at].encode("utf-8", "surrogatepass"))
        place = f"byte {self.offset_bytes}, before {quote(text[at : at + 20])}" if text[at:] else "its end"
        super().__init__(f"filter {quote(text)}: {problem} at {place}")


# Go's unicode.IsSpace.
_SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*+")
_BARE_FIELD = re.compile("[A-Za-z0-9_]*+")
_OPERATOR = re.compile("[=!~]*+")
_UP_TO_SEPARATOR = re.compile("[^, \ufffd]*+")

_ILLEGAL = "\0\ufffd\ud800-\udfff"
_ILLEGAL_CHARACTER = re.compile(f"[{_ILLEGAL}]")
_ESCAPE = r"\\(?:[abfnrtv\\%s]|[0-7]{3}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8})"
_QUOTES = '"/|'
# Up to a thousand pieces at a time: what an unbounded repeat remembers to go back to grows with the text, and
# Python before 3.11.5 miscounts possessive repeats of groups.
_STRING_PIECES = {
    mark: re.compile(rf"(?:[^{re.escape(mark)}\\\n{_ILLEGAL}]+|{_ESCAPE % re.escape(mark)}){{0,1000}}")
    for mark in _QUOTES
}

_ESCAPED = re.compile(rb"\\(?:([0-7]{3})|x(..)|u(....)|U(........)|(.))")
_NAMED_ESCAPES = {b"a": b"\a", b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}


class Parser:
    """Parses the filters of one call. Never backtracks: the time is linear in the text."""

    def __init__(self) -> None:
        self._fields = 0
        self._text = ""
        self._at = 0

    def parse(self, text: str) -> tuple[Selector, ...]:
        """The selectors that must hold together: none for an empty text, which matches everything.

        Raises: BadFilter; InvalidArgument when all texts so far have more than MAX_FIELDS fields.
        """
        if not text:
            return ()
        self._text, self._at = text, 0
        selectors = [self._selector()]
        while self._at < len(text):
            if text[self._at] != ",":
                self._refuse(self._at, "expected a comma or the end")
            self._at += 1
            selectors.append(self._selector())
        return tuple(selectors)

    def _selector(self) -> Selector:
        path = self._path()
        if self._peek() in ("", ","):
            return Selector(path, Operator.PRESENT, "")
        operator = self._operator()
        return Selector(path, operator, self._value(operator))

    def _path(self) -> tuple[str, ...]:
        fields = [self._field()]
        while self._peek() == ".":
            self._at += 1
            fields.append(self._field())
        return tuple(fields)

    def _field(self) -> str:
        self._fields += 1
        if self._fields > MAX_FIELDS:
            raise InvalidArgument(f"filters: more than {MAX_FIELDS} fields in one call; use several calls")
        self._skip(_SPACES)
        if self._peek() == '"':
            return self._string()
        field = self._skip(_BARE_FIELD)
        if not field:
            self._refuse(self._at, "expected a field (letters, digits and _, or a string in double quotes)")
        return field

    def _operator(self) -> Operator:
        self._skip(_SPACES)
        start = self._at
        sign = self._skip(_OPERATOR)
        if not sign:
            self._refuse(start, "expected ==, !=, ~= or a comma")
        try:
            return Operator(sign)
        except ValueError:
            self._refuse(start, f"unknown operator {quote(sign, 20)} (there are ==, != and ~=)")

    def _value(self, operator: Operator) -> str:
        self._skip(_SPACES)
        first = self._peek()
        if first and first in _QUOTES:
            if first != '"' and operator is not Operator.MATCHES:
                self._refuse(self._at, f"expected double quotes around a value that begins with {first}")
            return self._string()
        if not first or first in ",.=!~" or _ILLEGAL_CHARACTER.match(first):
            self._refuse(self._at, "expected a value (a word, or a string in double quotes)")
        self._at += 1
        return first + self._rest_of_word()

    def _rest_of_word(self) -> str:
        start = self._at
        word = self._skip(_UP_TO_SEPARATOR)
        # Of all spaces only the ASCII one is printable for Python, and no word has that.
        if not word.isprintable():
            word = word[: next(at for at, char in enumerate(word) if not char.isprintable())]
            self._at = start + len(word)
        return word

    def _string(self) -> str:
        start = self._at
        mark = self._peek()
        self._at += 1
        pieces = []
        while piece := self._skip(_STRING_PIECES[mark]):
            pieces.append(piece)
        body = "".join(pieces)
        if self._peek() != mark:
            self._refuse(start, f"string that {self._what_is_wrong_with_string()}")
        self._at += 1
        if "\\" not in body:
            return body
        try:
            return _ESCAPED.sub(_unescape, body.encode()).decode("utf-8", "surrogateescape")
        except _NoCharacterError as error:
            self._refuse(start, f"string with {error}")

    def _what_is_wrong_with_string(self) -> str:
        """In the string whose good part ends here."""
        found = self._peek()
        if found == "\\":
            return f"has an invalid escape, {quote(self._text[self._at : self._at + 4], 20)},"
        if found in ("", "\n"):
            return "does not end on its line"
        return f"has a character that no filter may have, {quote(found)},"

    def _peek(self) -> str:
        """The next character, empty at the end."""
        return self._text[self._at : self._at + 1]

    def _skip(self, pattern: re.Pattern[str]) -> str:
        """What matches here, which may be nothing; moves behind it."""
        match = pattern.match(self._text, self._at)
        assert match  # each pattern matches the empty text
        self._at = match.end()
        return match.group()

    def _refuse(self, at: int, problem: str) -> NoReturn:
        raise BadFilter(self._text, at, problem)


class _NoCharacterError(ValueError):
    """An escape stands for nothing; the message is about it."""


def _unescape(match: re.Match[bytes]) -> bytes:
    """What one escape stands for."""
    octal, byte, short, long, named = match.groups()
    if named is not None:
        return _NAMED_ESCAPES.get(named, named)
    if byte is not None:
        return bytes([int(byte, 16)])
    if octal is not None:
        if octal > b"377":
            raise _NoCharacterError(f"an escape beyond a byte, \\{octal.decode()},")
        return bytes([int(octal, 8)])
    return _encode_code_point(int(short or long, 16))


def _encode_code_point(code: int) -> bytes:
    """Go encodes a surrogate as U+FFFD. From 1 << 31 up a code is a negative number for containerd,
    which passes its range check and is cut to a byte."""
    if code >= 1 << 31:
        return bytes([code & 0xFF])
    if code > 0x10FFFF:
        raise _NoCharacterError(f"an escape beyond Unicode, \\U{code:08x},")
    return chr(0xFFFD if 0xD800 <= code <= 0xDFFF else code).encode()
