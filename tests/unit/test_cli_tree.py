"""The tree: complete, parents first, whatever its depth."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from snapshotter.cli.tree import arrange, branch
from snapshotter.model import Info, Kind


def info(name: str, parent: str = "", created_ns: int = 0) -> Info:
    return Info(name, parent, Kind.COMMITTED, created_ns, created_ns)


def drawn(infos: list[Info]) -> list[str]:
    return [branch(node.last) + node.info.name for node in arrange(infos)]


def test_siblings_are_ordered_by_creation_and_drawn_below_their_parent() -> None:
    infos = [
        info("b", "r", 2),
        info("x", "b"),
        info("r"),
        info("a", "r", 1),
        info("c", "a"),
        info("s", "", 1),
    ]
    assert drawn(infos) == ["r", "├─ a", "│  └─ c", "└─ b", "   └─ x", "s"]


def test_a_snapshot_whose_parent_is_not_listed_is_a_root() -> None:
    assert drawn([info("b", "gone"), info("c", "b")]) == ["b", "└─ c"]


def test_a_chain_of_500_needs_no_recursion() -> None:
    nodes = list(arrange([info("0"), *(info(str(n), str(n - 1)) for n in range(1, 500))]))
    assert [len(node.last) for node in nodes] == list(range(500))


@given(st.lists(st.integers(min_value=0), max_size=60))
def test_everything_is_shown_once_after_its_parent(choices: list[int]) -> None:
    infos = [info("0")]
    for number, choice in enumerate(choices, 1):
        infos.append(info(str(number), str(choice % number)))
    depths: dict[str, int] = {}
    for node in arrange(reversed(infos)):
        assert len(node.last) == (depths[node.info.parent] + 1 if node.info.parent else 0)
        depths[node.info.name] = len(node.last)
    assert len(depths) == len(infos)


@given(st.lists(st.booleans(), max_size=600), st.integers(20, 200))
def test_a_branch_keeps_to_its_width_and_says_what_it_hides(last: list[bool], width: int) -> None:
    line = branch(tuple(last), True, width)
    assert len(line) <= width
    assert ("(+" in line) == (3 * len(last) > width)


def test_ascii_for_a_terminal_without_line_drawing() -> None:
    assert branch((False, True), unicode=False) == "|  `- "
    assert branch((False,), unicode=False) == "|- "
