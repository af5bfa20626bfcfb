"""Our filters against containerd's own, built from its sources: the same verdict on random texts.

The same texts are refused, at the same byte, and the same snapshots match. The differences that are meant:
- a wrong regular expression is refused (containerd lets it match nothing);
- the expressions of `RE2_ONLY`, which Go's regexp refuses;
- expressions that need more memory than one may have.
"""

from __future__ import annotations

import base64
import json
import random
import re
import string
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from snapshotter.errors import InvalidArgument
from snapshotter.filters import BadFilter, compile_filters
from snapshotter.filters.parser import Operator, Parser
from snapshotter.model import Info, Kind
from tests.conformance import go

RE2_ONLY = re.compile(rb"\\C|\(\?<")
"""Any byte; and a group's name without a P, which Go takes since 1.22."""

INFOS = [
    Info("a", "", Kind.ACTIVE, 0, 0),
    Info("b", "a", Kind.VIEW, 0, 0, {"a": "b"}),
    Info("", "", Kind.COMMITTED, 0, 0, {"": "a", "a.b": "", "x/y": "é"}),
    Info("aB", "b", Kind.COMMITTED, 0, 0, {"labels": "name", "kind": "view", "a": "a b"}),
    Info("a,b", "/a/b", Kind.ACTIVE, 0, 0, {"a": "x" * 300, "A": "a", "1": "1", "_": "_"}),
    Info('a"b', "a|b", Kind.VIEW, 0, 0, {'"': '"', "é": "é"}),
    Info("é", "e\u0301", Kind.COMMITTED, 0, 0, {"a": "\n", "b": "a\nb"}),
    Info("\ufffd", "\0", Kind.COMMITTED, 0, 0, {"a": "\ufffd"}),
    Info("😀", "\\", Kind.ACTIVE, 0, 0, {"a": "ſK", "b": "\x7f\x80"}),
]

CHARACTERS = [
    *string.printable, *string.printable,
    *"\0\x01\x1c\x1f\x7f\x80\x85\xa0\xad\xb2éſßŽ\u0301\u0378\u1680\u180e\u2003\u200b\u200d\u2028\u2029\u202f",
    *"\u205f\u2160\u2603\u3000\u4e00\ue000\ufdd0\ufeff\ufffd\uffff😀\U000e0001\U0010ffff",
]  # fmt: skip
FIELDS = [
    "name",
    "parent",
    "kind",
    "labels",
    "labels.a",
    "labels.a.b",
    "foo",
    "_1",
    '"name"',
    '""',
    'labels."x/y"',
]
OPERATORS = ["==", "!=", "~="]
ESCAPES = [
    *(f"\\{char}" for char in "abfnrtv\\'\"/|qe\n"),
    *("\\141", "\\377", "\\400", "\\777", "\\18", "\\08", "\\x61", "\\xff", "\\xc3\\xa9", "\\xed\\xa0\\x80"),
    *("\\x6", "\\xg1", "\\u0061", "\\u00e9", "\\ud800", "\\ufffd", "\\u12", "\\U00000061", "\\U0001f600"),
    *("\\U0010ffff", "\\U00110000", "\\U7fffffff", "\\U80000061", "\\Uffffffe9", "\\U1"),
]
ATOMS = [
    *("a", "b", "B", "é", ".", "^", "$", "|", "(", ")", "(?:", "(?i)", "(?i:", "(?s)", "(?m)^", "(?U)"),
    *("(?P<n>", "(?<n>", "[a-c]", "[^a]", "[[:alpha:]]", "[", "]", r"\d", r"\W", r"\s", r"\b", r"\B", r"\A"),
    *(r"\z", r"\Z", r"\pL", r"\p{Greek}", r"\PN", r"\Q", r"\E", r"\C", r"\x41", r"\x{e9}", r"\141", r"\1"),
    *(r"\8", r"\n", r"\,", r"\\", "*", "+", "?", "*?", "{2}", "{1,3}", "{2,1}", "{,2}", "{1001}", "{500}"),
    *("{", "\\", "/", "\n"),
]


@dataclass(frozen=True)
class Verdict:
    error: bytes
    wrong: list[bytes]
    matches: list[bool]


class Texts:
    """Random filters: some right, most nearly right."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def lists(self, count: int) -> Iterator[list[str]]:
        for _ in range(count):
            yield [self.text() for _ in range(self._random.choice([1, 1, 1, 2, 5]))]

    def text(self) -> str:
        text = ",".join(self._selector() for _ in range(self._random.choice([1, 1, 2, 4])))
        for _ in range(self._random.choice([0, 0, 0, 1, 1, 2])):
            text = self._mutated(text)
        return text

    def _selector(self) -> str:
        field = self._choice(FIELDS)
        if self._random.random() < 0.1:
            field += "." + self._string('"')
        operator = self._choice(["", *OPERATORS])
        if not operator:
            return field
        space = self._choice(["", "", "", "", " ", "\t\u2003"])
        return f"{field}{self._choice(['', '', '', ' '])}{operator}{space}{self._value(operator)}"

    def _value(self, operator: str) -> str:
        if operator == "~=" and self._random.random() < 0.8:
            return self._regex()
        if self._random.random() < 0.4:
            return self._string('"')
        return self._choice([*(info.name for info in INFOS), "active", "view", "committed", self._word()])

    def _string(self, mark: str) -> str:
        parts = [self._choice([*ESCAPES, *"abé", self._word()]) for _ in range(self._random.randrange(4))]
        return f"{mark}{''.join(parts)}{mark}"

    def _regex(self) -> str:
        pattern = "".join(self._choice(ATOMS) for _ in range(self._random.choice([1, 2, 3, 5])))
        mark = self._choice(['"', "/", "|", ""])
        if not mark:
            return pattern
        escaped = pattern.replace("\\", "\\\\").replace("\n", "\\n").replace(mark, f"\\{mark}")
        return f"{mark}{escaped}{mark}"

    def _word(self) -> str:
        return "".join(self._random.choices(CHARACTERS, k=self._random.randrange(4)))

    def _mutated(self, text: str) -> str:
        at = self._random.randrange(len(text) + 1)
        new = self._choice(["", self._choice(CHARACTERS), *OPERATORS, *ESCAPES, *'",. =/|\\'])
        return text[:at] + new + text[at + self._random.randrange(3) :]

    def _choice(self, choices: list[str]) -> str:
        return self._random.choice(choices)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    go.require()
    binary = tmp_path_factory.mktemp("filters") / "judge"
    go.build(Path(__file__).parent / "filters", binary)
    return binary


def every_character() -> Iterator[list[str]]:
    """As a field, in a word, as its first character, and in a string."""
    for char in CHARACTERS:
        yield from (
            [f"a{char}"],
            [f"name==a{char}"],
            [f"name=={char}a"],
            [f'name=="{char}"'],
            [f"name{char}==a"],
        )


def every_pair_of_tokens() -> Iterator[list[str]]:
    tokens = [*FIELDS, *OPERATORS, *'=!~,."/| \n', "word", '"x"', "/x/", "|x|", "é", "\0", "\ufffd", '"\\q"']
    yield from ([f"{first}{second}"] for first in tokens for second in tokens)
    yield from ([f"name=={first}{second}"] for first in tokens for second in tokens)


def every_pair_of_atoms() -> Iterator[list[str]]:
    for first in ATOMS:
        for second in ATOMS:
            escaped = f"{first}{second}".replace("\\", "\\\\").replace("\n", "\\n").replace("|", "\\|")
            yield [f"name~=|{escaped}|"]


@pytest.mark.parametrize("cases", [every_character, every_pair_of_tokens, every_pair_of_atoms])
def test_same_verdict_on_every_small_text(judge: Path, cases: Any) -> None:
    compare(judge, list(cases()))


def test_same_verdict_on_random_texts(judge: Path) -> None:
    compare(judge, list(Texts(seed=0).lists(20_000)))


@pytest.mark.nightly
def test_same_verdict_on_many_random_texts(judge: Path) -> None:
    for _ in range(20):
        seed = random.randrange(1 << 32)
        print(f"seed={seed}")
        compare(judge, list(Texts(seed).lists(20_000)))


def compare(judge: Path, cases: list[list[str]]) -> None:
    verdicts = ask(judge, cases)
    assert len(verdicts) == len(cases)
    assert any(verdict.matches for verdict in verdicts)
    assert any(verdict.error or verdict.wrong for verdict in verdicts)
    for filters, theirs in zip(cases, verdicts, strict=True):
        check(filters, theirs)


def check(filters: list[str], theirs: Verdict) -> None:
    try:
        matches = compile_filters(filters)
    except BadFilter as error:
        assert theirs.error, f"only we refuse {filters}: {error}"
        assert any(theirs.error.startswith(prefix(text, error.offset_bytes)) for text in filters), (
            f"{filters}: we say {error}, they say {theirs.error!r}"
        )
    except InvalidArgument as error:
        assert not theirs.error, f"{filters}: we say {error}, they say {theirs.error!r}"
        assert theirs.wrong or "too large" in str(error), f"only we refuse {filters}: {error}"
    else:
        assert not theirs.error, f"only they refuse {filters}: {theirs.error!r}"
        for pattern in theirs.wrong:
            assert RE2_ONLY.search(pattern), f"only they refuse {pattern!r} in {filters}"
        if not theirs.wrong:
            assert [matches(info) for info in INFOS] == theirs.matches, f"{filters}"


def prefix(text: str, offset: int) -> bytes:
    """How containerd begins the message about `offset` in `text`."""
    raw = text.encode()
    if offset >= len(raw):
        return b"filters: parse error: [%b]: " % raw
    return b"filters: parse error: [%b >|%b|< %b]: " % (
        raw[:offset],
        raw[offset : offset + 1],
        raw[offset + 1 :],
    )


def ask(judge: Path, cases: list[list[str]]) -> list[Verdict]:
    lines = [json.dumps({"filters": case, "patterns": patterns(case), "infos": as_json()}) for case in cases]
    done = subprocess.run([judge], input="\n".join(lines), capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return [verdict(json.loads(line)) for line in done.stdout.splitlines()]


def patterns(filters: list[str]) -> list[str]:
    """The regular expressions in the filters, in base64; none where a filter is bad."""
    parser = Parser()
    try:
        selectors = [selector for text in filters for selector in parser.parse(text)]
    except BadFilter:
        return []
    return [
        base64.b64encode(s.value.encode("utf-8", "surrogateescape")).decode()
        for s in selectors
        if s.operator is Operator.MATCHES
    ]


def as_json() -> list[dict[str, Any]]:
    return [{"name": i.name, "parent": i.parent, "kind": i.kind.name.lower(), "labels": i.labels} for i in INFOS]


def verdict(answer: dict[str, Any]) -> Verdict:
    return Verdict(
        base64.b64decode(answer["error"] or ""),
        [base64.b64decode(pattern) for pattern in answer["wrong"] or []],
        answer["matches"] or [],
    )
