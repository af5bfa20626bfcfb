"""What df and gc print, of given numbers: order, totals, reasons, and keys that are not there."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from typing import Any

import pytest

from snapshotter.cli import commands, main, space
from snapshotter.model import Extent, Freed, Kind, SnapshotSpace, Space

MIB = 1 << 20
AS_OF_NS = 1_748_779_200_000_000_001


def snapshot(name: str, exclusive: Extent, **other: Any) -> SnapshotSpace:
    values: dict[str, Any] = {
        "kind": Kind.COMMITTED,
        "strategy": "stub",
        "apparent_bytes": 3 * MIB,
        "allocated": Extent(2 * MIB, 30),
        "shared": Extent(MIB, 10),
        "private": {},
    }
    return SnapshotSpace(name=name, exclusive=exclusive, **(values | other))


SPACE = Space(
    as_of_ns=AS_OF_NS,
    took_ns=1_234_000_000,
    snapshots=(
        snapshot("small", Extent(4096, 1)),
        snapshot("large", Extent(MIB, 20), private={"small": 7, "no-links-left": 9}),
        snapshot("k/1/\x1b[2J", Extent(8192, 2), kind=Kind.ACTIVE, strategy="", shared=Extent(0, 0)),
    ),
    apparent_bytes=6 * MIB,
    allocated=Extent(3 * MIB, 60),
    unshared=Extent(4 * MIB, 50),
    objects=Extent(MIB, 10),
    filesystem_inodes=1000,
    filesystem_inodes_free=750,
    filesystem_bytes=100 * MIB,
    filesystem_bytes_free=90 * MIB,
    private={"small": 7, "no-links-left": 9},
)


class Answers:
    """A client that says what it is told to."""

    def __init__(self) -> None:
        self.space_asked: list[bool] = []
        self.freed = Freed(Extent(3 * MIB, 12), trees=1)

    def space(self, now: bool) -> Space:
        self.space_asked.append(now)
        return SPACE

    def collect(self, dry_run: bool) -> Freed:  # noqa: ARG002
        return self.freed


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    answers = Answers()
    monkeypatch.setattr(commands, "_connect", lambda _args: nullcontext(answers))
    return answers


@pytest.mark.usefixtures("answers")
def test_df_shows_the_store_and_then_what_removing_frees_most(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["df"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:7] == [
        "apparent         6.00 MiB",
        "allocated        3.00 MiB in 60 inodes",
        "without sharing  4.00 MiB in 50 inodes",
        "saved            1.00 MiB (25%), for 10 inodes more",
        "objects          1.00 MiB in 10 inodes",
        "filesystem       10.0 MiB of 100 MiB used (10%), 90.0 MiB free",
        "its inodes       250 of 1000 used (25%), 750 free",
    ]
    assert lines[7].startswith("as of            2025-0")
    assert lines[7].endswith("ago), took 1.2 s")
    assert [" ".join(line.split()) for line in lines[8:]] == [
        "",
        "NAME KIND STRATEGY APPARENT ALLOCATED SHARED EXCLUSIVE INODES EXCL.INODES",
        "large committed stub 3.00 MiB 2.00 MiB 1.00 MiB 1.00 MiB 30 20",
        r"k/1/\x1b[2J active - 3.00 MiB 2.00 MiB 0 B 8.00 KiB 30 2",
        "small committed stub 3.00 MiB 2.00 MiB 1.00 MiB 4.00 KiB 30 1",
    ]


@pytest.mark.usefixtures("answers")
def test_df_tells_why_files_stayed_private(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["df", "--why"]) == 0
    assert capsys.readouterr().out.splitlines()[-7:] == [
        "WHY PRIVATE    FILES",
        "no-links-left      9",
        "small              7",
        "",
        "NAME   WHY PRIVATE    FILES",
        "large  no-links-left      9",
        "large  small              7",
    ]


@pytest.mark.usefixtures("answers")
def test_df_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["df", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in shown["snapshots"]] == ["large", "k/1/\x1b[2J", "small"]
    assert shown["snapshots"][0] == {
        "name": "large",
        "kind": "committed",
        "strategy": "stub",
        "apparent_bytes": 3 * MIB,
        "allocated": {"size_bytes": 2 * MIB, "inodes": 30},
        "shared": {"size_bytes": MIB, "inodes": 10},
        "exclusive": {"size_bytes": MIB, "inodes": 20},
        "private": {"no-links-left": 9, "small": 7},
    }
    assert shown["store"] == {
        "as_of": "2025-06-01T12:00:00.000000001Z",
        "took_ns": 1_234_000_000,
        "apparent_bytes": 6 * MIB,
        "allocated": {"size_bytes": 3 * MIB, "inodes": 60},
        "unshared": {"size_bytes": 4 * MIB, "inodes": 50},
        "objects": {"size_bytes": MIB, "inodes": 10},
        "filesystem_bytes": 100 * MIB,
        "filesystem_bytes_free": 90 * MIB,
        "filesystem_inodes": 1000,
        "filesystem_inodes_free": 750,
        "private": {"no-links-left": 9, "small": 7},
    }


def test_df_of_some_keys_goes_on_after_one_that_is_not_there(
    answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["df", "small", "gone", "large", "small", "--json"]) == 3
    shown = capsys.readouterr()
    assert [each["name"] for each in json.loads(shown.out)["snapshots"]] == ["large", "small"]
    assert shown.err.startswith('snapctl: snapshot "gone" did not exist at 2025-0')
    assert shown.err.endswith("; --now looks again\n")
    assert main(["df", "gone", "--now"]) == 3
    assert "looks again" not in capsys.readouterr().err
    assert answers.space_asked == [False, True]


def test_gc_says_what_it_freed(answers: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gc"]) == 0
    assert capsys.readouterr().out == "freed 12 objects, 3.00 MiB, 12 inodes, and 1 removed tree\n"
    answers.freed = Freed(Extent(512, 1), trees=0)
    assert main(["gc", "--dry-run"]) == 0
    assert capsys.readouterr().out == "would free 1 object, 512 B, 1 inode\n"
    assert main(["gc", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "dry_run": True,
        "objects": {"size_bytes": 512, "inodes": 1},
        "trees": 0,
    }


@pytest.mark.parametrize(
    ("allocated", "unshared", "shown"),
    [
        (Extent(0, 0), Extent(0, 0), "0 B"),
        (Extent(30, 3), Extent(40, 3), "10 B (25%)"),
        (Extent(30, 3), Extent(40, 4), "10 B (25%) and 1 inode"),
        (Extent(4096, 3), Extent(4000, 1), "-96 B (-2%), for 2 inodes more"),
    ],
)
def test_saved_may_be_less_than_nothing(allocated: Extent, unshared: Extent, shown: str) -> None:
    assert dict(space.store_fields(changed(allocated=allocated, unshared=unshared), AS_OF_NS))["saved"] == shown


def test_a_filesystem_without_a_limit_of_inodes() -> None:
    fields = dict(space.store_fields(changed(filesystem_inodes=0, filesystem_inodes_free=0), AS_OF_NS))
    assert fields["its inodes"] == "no limit"


def changed(**values: Any) -> Space:
    return dataclasses.replace(SPACE, **values)
