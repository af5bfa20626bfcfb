"""The command line, right and wrong."""

from __future__ import annotations

import re

import pytest

from snapshotter.cli.arguments import (
    ADDRESS_VARIABLE,
    DEFAULT_ADDRESS,
    build,
    parse,
    parse_label_changes,
    parse_labels,
)
from snapshotter.cli.commands import COMMANDS
from snapshotter.errors import InvalidArgument


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)


@pytest.mark.parametrize(
    "words",
    [
        "--json --address /s prepare k p --label a=b --label c=d",
        "--json prepare --address=/s k --label a=b p --label=c=d",
        "prepare --label a=b --label c=d --address /s --json -- k p",
        "--address /other --json prepare k --label a=b --address /s p --label c=d",
        "--json -- prepare --label a=b k --label c=d --address /s -- p",
    ],
)
def test_options_may_stand_anywhere(words: str) -> None:
    args = parse(words.split())
    assert (args.key, args.parent, args.labels) == ("k", "p", ["a=b", "c=d"])
    assert (args.json, args.address) == (True, "/s")


def test_a_key_may_begin_with_a_dash_after_two_dashes() -> None:
    assert parse(["rm", "a", "--", "-b", "--json"]).keys == ["a", "-b", "--json"]
    assert parse(["commit", "--", "-n", "-k"]).key == "-k"
    assert parse(["label", "--", "-k", "a=b"]).changes == ["a=b"]
    assert parse(["stat", "-"]).key == "-"


def test_optional_arguments_are_optional() -> None:
    assert parse(["prepare", "k"]).parent == ""
    assert parse(["ls"]).filters == []
    assert parse(["usage", "--json"]).keys == []
    assert parse(["df", "--now"]).keys == []
    assert parse(["df", "a", "--why", "b"]).keys == ["a", "b"]
    assert parse(["ls", "--names", "kind==active", "name==x"]).filters == ["kind==active", "name==x"]


def test_the_option_goes_before_the_variable_before_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(["ls"]).address == DEFAULT_ADDRESS
    monkeypatch.setenv(ADDRESS_VARIABLE, "/variable")
    assert parse(["ls"]).address == "/variable"
    assert parse(["ls", "--address", "/option"]).address == "/option"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mout", "k", "t"], 'no command "mout"; did you mean "mount"? (see snapctl --help)'),
        (["--address", "/s", "lst"], 'no command "lst"; did you mean "ls"? (see snapctl --help)'),
        (["xyzzy"], 'no command "xyzzy" (see snapctl --help)'),
        (["rm"], "the following arguments are required: KEY (see snapctl rm --help)"),
        (["stat", "a", "b"], "unrecognized arguments: b (see snapctl --help)"),
        (["ls", "--siz"], "unrecognized arguments: --siz (see snapctl --help)"),
        (["ls", "--address"], "argument --address: expected one argument (see snapctl ls --help)"),
        (["stat", "a\udcff"], r'argument KEY: "a\udcff" is not UTF-8 (see snapctl stat --help)'),
    ],
)
def test_a_mistake_is_one_line_that_helps(words: list[str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{re.escape(message)}$"):
        parse(words)


def test_without_a_command_they_are_named() -> None:
    with pytest.raises(InvalidArgument, match="prepare, view, commit"):
        parse([])


def test_every_command_of_the_parser_can_be_run() -> None:
    assert set(build()[1]) == set(COMMANDS)


def test_labels_are_split_at_the_first_equals_sign() -> None:
    assert parse_labels(["a=b=c", "d="]) == {"a": "b=c", "d": ""}
    for wrong in ("a", "=b", ""):
        with pytest.raises(InvalidArgument):
            parse_labels([wrong])


def test_label_changes() -> None:
    assert parse_label_changes(["a=1", "b-", "c-=2", "d/e-f-"]) == ({"a": "1", "c-": "2"}, ["b", "d/e-f"])
    for wrong in (["a"], ["-"], ["a=1", "a-"]):
        with pytest.raises(InvalidArgument):
            parse_label_changes(wrong)
