"""containerd's filter grammar: what each production selects, what is refused and where, and at what cost.

Nothing but InvalidArgument ever comes out, whatever the text; a quoted text stands for itself; and
filters find the same in dictionaries and joined expressions as when each is tried alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.errors import InvalidArgument
from snapshotter.filters import BadFilter, compile_filters
from snapshotter.filters.parser import MAX_FIELDS
from snapshotter.model import Info, Kind

BASE = Info("base", "", Kind.COMMITTED, 0, 0)
CHILD = Info("child", "base", Kind.ACTIVE, 0, 0, {"a": "1", "a.b": "2", "x/y": "é", "": "none", "kind": "cat"})
SPACED = Info("with space, comma", "base", Kind.VIEW, 0, 0, {"a": "", "path": "/a/b"})
INFOS = [BASE, CHILD, SPACED]

SELECTED: list[tuple[list[str], list[Info]]] = [
    # no filter, an empty one, several
    ([], INFOS),
    ([""], INFOS),
    (["name==x", ""], INFOS),
    (["name==base", "name==child"], [BASE, CHILD]),
    (["name==base", "name==base", "kind==committed"], [BASE]),
    # operators
    (["name==base"], [BASE]),
    (["name!=base"], [CHILD, SPACED]),
    (["name!=base,name!=child"], [SPACED]),
    (["name~=as"], [BASE]),
    (["name~=^(child|base)$"], [BASE, CHILD]),
    (["parent"], INFOS),
    (["labels.a"], [CHILD, SPACED]),
    # several selectors
    (["kind==active,name==child"], [CHILD]),
    (["kind==active,name==base"], []),
    (["name==child,name!=child"], []),
    (["name==child,name~=^x"], []),
    (["labels.a,labels.path"], [SPACED]),
    (["labels.a,name~=c"], [CHILD, SPACED]),
    # fields
    (["parent==base"], [CHILD, SPACED]),
    (['parent==""'], [BASE]),
    (["kind==committed"], [BASE]),
    (["kind==view", "kind==active"], [CHILD, SPACED]),
    (["labels.a==1"], [CHILD]),
    (["labels.a.b==2"], [CHILD]),
    (['labels."a.b"==2'], [CHILD]),
    (['labels."x/y"==é'], [CHILD]),
    (["labels"], [CHILD]),
    (['labels.""==none'], [CHILD]),
    (["labels.kind==cat"], [CHILD]),
    (['"name"==base'], [BASE]),
    ([r'"n\x61me"==base'], [BASE]),
    (["name.what.ever==base"], [BASE]),
    (["size==1"], []),
    (["size"], []),
    (["_0==1"], []),
    # a field that is not there is empty for != and ~=
    (["labels.a!=1"], [BASE, SPACED]),
    (['labels.a!=""'], [CHILD]),
    (["labels.a~=^$"], [BASE, SPACED]),
    (['labels.a==""'], [SPACED]),
    (["size!=1"], INFOS),
    (['size!=""'], []),
    (['size~=".*"'], INFOS),
    # values
    (['name=="with space, comma"'], [SPACED]),
    (["name==with"], []),
    (["labels.path==a/b"], []),
    (["name==a=b", "name==a.b", 'name==a"b', "name==\x01", "name==😀"], []),
    # strings
    (["name~=/^b/"], [BASE]),
    (["name~=|^b|"], [BASE]),
    (['name~="^b"'], [BASE]),
    (["labels.path~=/^\\/a/"], [SPACED]),
    (["labels.path~=|^/a|"], [SPACED]),
    ([r'name=="\142\x61\u0073\U00000065"'], [BASE]),
    ([r'labels."x/y"=="\xc3\xa9"'], [CHILD]),
    ([r'name=="\xff"', r'name=="\ud800"', r'name=="\a\b\f\n\r\t\v\\\""'], []),
    ([r'name!="\xff"'], INFOS),
    # spaces: before a field, an operator, a value
    (["\t name ==\u2003base, kind\n== committed"], [BASE]),
    (["labels. a"], [CHILD, SPACED]),
]  # fmt: skip

REFUSED = [
    # a field
    (" ", 1, "field"),
    (",", 0, "field"),
    ("name==x,", 8, "field"),
    ("name==x,,kind", 8, "field"),
    ("labels.", 7, "field"),
    ("labels..a", 7, "field"),
    ("é", 0, "field"),
    ("==x", 0, "field"),
    ("-a", 0, "field"),
    ("/a/==x", 0, "field"),
    ("\0", 0, "field"),
    # an operator
    ("name=x", 4, 'unknown operator "="'),
    ("name===x", 4, 'unknown operator "==="'),
    ("name!x", 4, 'unknown operator "!"'),
    ("name =~x", 5, 'unknown operator "=~"'),
    ("name x", 5, "expected =="),
    ("labels.a-b", 8, "expected =="),
    ("labels.é==x", 7, "field"),
    ('labels."é"-', 11, "expected =="),
    ("name\ufffd", 4, "expected =="),
    ("name ,kind", 5, "expected =="),
    ("name ", 5, "expected =="),
    ("labels .a", 7, "expected =="),
    # a value
    ("name==", 6, "value"),
    ("name== ", 7, "value"),
    ("name==,kind", 6, "value"),
    ("name==.x", 6, "value"),
    ("name== =x", 7, "value"),
    ("name==\0", 6, "value"),
    ("name==\ufffd", 6, "value"),
    ("name==\udc80", 6, "value"),
    ("name==/x/", 6, "double quotes"),
    ("name!=|x|", 6, "double quotes"),
    # what follows it
    ("name==x y", 7, "comma"),
    ("name==é\0", 8, "comma"),
    ("name==a\u200bb", 7, "comma"),
    ('name=="x"y', 9, "comma"),
    ('name=="x" ', 9, "comma"),
    # a string
    ('name=="x', 6, "does not end"),
    ('name=="x\n"', 6, "does not end"),
    ("name~=/x", 6, "does not end"),
    ('name=="x\\"', 6, "does not end"),
    ('name=="\0"', 6, "no filter may have"),
    ('name=="\ufffd"', 6, "no filter may have"),
    ('name=="\ud800"', 6, "no filter may have"),
    (r'name=="\q"', 6, "escape"),
    (r'name=="\'"', 6, "escape"),
    (r'name=="\/"', 6, "escape"),
    (r"name~=/\"/", 6, "escape"),
    (r"name~=/\d/", 6, "escape"),
    (r'name=="\x6"', 6, "escape"),
    (r'name=="\08"', 6, "escape"),
    (r'name=="\u00e"', 6, "escape"),
    (r'name=="\U0010fff"', 6, "escape"),
    (r'name=="\400"', 6, "beyond a byte"),
    (r'name=="\U00110000"', 6, "beyond Unicode"),
    (r'labels."\q"', 7, "escape"),
]  # fmt: skip


def select(*filters: str) -> list[Info]:
    return list(filter(compile_filters(filters), INFOS))


@pytest.mark.parametrize(("filters", "infos"), SELECTED)
def test_selects(filters: list[str], infos: list[Info]) -> None:
    assert select(*filters) == infos


@pytest.mark.parametrize(("text", "offset", "problem"), REFUSED)
def test_refuses_and_says_where(text: str, offset: int, problem: str) -> None:
    with pytest.raises(BadFilter, match=problem) as caught:
        compile_filters(["name==good", text])
    assert caught.value.offset_bytes == offset
    assert str(caught.value).isascii() and str(caught.value).isprintable()


def test_the_message_of_a_long_filter_is_short_and_shows_the_place() -> None:
    text = f"name=={'é' * 30_000} oops,{'kind,' * 10_000}"
    with pytest.raises(InvalidArgument, match='byte 60006, before " oops,') as caught:
        compile_filters([text])
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(", "missing"), ("a**", "repetition"), ("x{1001}", "repetition"), (r"\\1", "escape"),
        ("(?=a)", "invalid"), (r"\xff", "not UTF-8"), (r"\xed\xa0\x80", "not UTF-8"),
        (r"(\\pL{100}){10}", "too large"), ("[" * 60_000, "missing"),
    ],
)  # fmt: skip
def test_refuses_a_wrong_regular_expression_and_names_it(pattern: str, problem: str) -> None:
    for filters in ([f'name~="{pattern}"'], [f'kind==view,name~="{pattern}"']):
        with pytest.raises(InvalidArgument, match=f"^regular expression .*{problem}") as caught:
            compile_filters(filters)
        assert len(str(caught.value)) < 2000


def test_joined_regular_expressions_keep_their_meaning() -> None:
    filters = [r'name~="\\Qx"', 'name~="(?i)Z"', 'name~="(?P<n>q)"', 'name~="(?P<n>r)"', 'name~="^x|y$"']
    assert select(*filters) == []
    assert select(*filters, "name~=C") == []
    assert select(*filters, "name~=child") == [CHILD]
    assert select(*filters, "name~=^e", "parent~=^base$") == [CHILD, SPACED]


@given(
    st.lists(
        st.lists(
            st.builds(
                lambda field, condition: f"{field}{condition}",
                st.sampled_from(["name", "parent", "kind", "labels.a", "labels.path", "size"]),
                st.sampled_from(["", "==base", "==1", "!=base", "!=1", "~=a", "~=^$", "~=^.a", "==view", '==""']),
            ),
            min_size=1,
            max_size=3,
        ),
        max_size=6,
    )
)
def test_many_filters_select_what_each_alone_does(filters: list[list[str]]) -> None:
    matches = compile_filters([",".join(selectors) for selectors in filters])
    alone = [[compile_filters([selector]) for selector in selectors] for selectors in filters]
    for info in INFOS:
        expected = not filters or any(all(holds(info) for holds in selectors) for selectors in alone)
        assert matches(info) == expected


TOKENS = st.sampled_from(
    [
        "name",
        "labels",
        "a",
        ".",
        ",",
        "==",
        "!=",
        "~=",
        '"',
        "/",
        "|",
        "\\",
        "\\x",
        "\\U",
        "(",
        " ",
        "\n",
        "\0",
        "é",
    ]
)


@given(st.one_of(st.text(), st.text(st.characters()), st.lists(TOKENS).map("".join)))
def test_never_anything_but_invalid_argument(text: str) -> None:
    try:
        matches = compile_filters([text])
    except InvalidArgument as error:
        assert str(error).isascii() and "\n" not in str(error)
    else:
        for info in INFOS:
            matches(info)


def quoted(text: str, how: list[int]) -> str:
    """`text` in double quotes, each character escaped in the way that `how` says."""
    styles: list[Callable[[str], str]] = [
        lambda c: "".join(f"\\x{byte:02x}" for byte in c.encode()),
        lambda c: "".join(f"\\{byte:03o}" for byte in c.encode()),
        lambda c: f"\\U{ord(c):08X}",
        lambda c: f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}",
        lambda c: f"\\{c}" if c in '\\"' else f"\\U{ord(c):08x}" if c in "\n\0\ufffd" else c,
    ]
    return f'"{"".join(styles[how[at % len(how)]](char) for at, char in enumerate(text))}"'


@given(st.text(st.characters(codec="utf-8")), st.lists(st.integers(0, 4), min_size=1))
def test_a_quoted_text_stands_for_itself(text: str, how: list[int]) -> None:
    matches = compile_filters([f"name=={quoted(text, how)},labels.{quoted(text, how)}"])
    assert matches(Info(text, "", Kind.ACTIVE, 0, 0, {text: ""}))
    assert not matches(Info(text + "x", "", Kind.ACTIVE, 0, 0, {text: ""}))
    assert not matches(Info(text, "", Kind.ACTIVE, 0, 0, {text + "x": ""}))


@pytest.mark.parametrize(
    "template",
    [
        "name=={}", "name==x{},kind==active", "kind==active,labels.a=={}", "labels.k{}", "name~=^{}$",
        "kind==view,name!={}", "name~=x{}.*y,labels.a", "name!=x,name!=child{}",
    ],
)  # fmt: skip
def test_ten_thousand_filters(template: str) -> None:
    """Finishes: what finds one filter after the other would take minutes for some of these."""
    filters = [template.format(number) for number in range(10_000)]
    matches = compile_filters(filters)
    infos = [Info(f"{number}", "", Kind.VIEW, 0, 0, {"a": "5"}) for number in range(9_500, 10_500)]
    selected = sum(map(matches, infos))
    alone = compile_filters([template.format(10_000)])
    assert selected in (0, 500, 1000) and (selected < 1000 or alone(infos[0]))


@pytest.mark.parametrize(
    "text",
    [
        "name" + " " * 15_000_000, 'name=="' + "x" * 15_000_000, 'name=="' + r"\x41" * 3_000_000 + '"',
        'name=="' + r"\U00000041" * 1_500_000, "name==" + "é\u200b" * 3_000_000, "name==" + "x" * 15_000_000,
        "a" * 15_000_000, "=" * 15_000_000, "name~=" + "(" * 15_000_000, '"' * 15_000_000,
    ],
)  # fmt: skip
def test_a_hostile_filter_of_15_mb_takes_linear_time(text: str) -> None:
    try:
        compile_filters([text])
    except InvalidArgument as error:
        assert len(str(error)) < 2000


@pytest.mark.parametrize(
    "filters",
    [["a"] * (MAX_FIELDS + 1), [",".join("a" * (MAX_FIELDS + 1))], [".".join("a" * (MAX_FIELDS + 1))]],
)
def test_too_many_fields_are_refused(filters: list[str]) -> None:
    with pytest.raises(InvalidArgument, match="several calls"):
        compile_filters(filters)


def test_regular_expressions_too_large_together_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="several calls"):
        compile_filters([f"name~={number}[a-z]{{900}}" for number in range(5_000)])
