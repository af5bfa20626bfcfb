"""Snapshots as parents and children, without recursion: a chain may be hundreds deep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from snapshotter.model import Info


@dataclass(frozen=True, slots=True)
class Node:
    """A snapshot at its place in the tree."""

    info: Info
    last: tuple[bool, ...]
    """For each ancestor below the root, then for the node itself: is it its parent's last child?
    Empty for a root; the length is the depth."""


def arrange(infos: Iterable[Info]) -> Iterator[Node]:
    """Every snapshot, parents before their children, siblings by time of creation.

    A snapshot whose parent is not among them (it was removed meanwhile) is shown as a root.
    """
    by_name = {info.name: info for info in infos}
    children: dict[str, list[Info]] = {}
    for info in by_name.values():
        children.setdefault(info.parent if info.parent in by_name else "", []).append(info)
    for siblings in children.values():
        siblings.sort(key=lambda info: (info.created_ns, info.name), reverse=True)
    stack = [Node(info, ()) for info in children.get("", [])]
    while stack:
        node = stack.pop()
        yield node
        below = children.get(node.info.name, [])
        stack += [Node(info, (*node.last, index == 0)) for index, info in enumerate(below)]


def branch(last: tuple[bool, ...], unicode: bool = True, width: int | None = None) -> str:
    """What is drawn before a node. In a `width`, the outer levels give way to their number."""
    through, turn, end = ("│  ", "├─ ", "└─ ") if unicode else ("|  ", "|- ", "`- ")
    hidden = 0
    if width is not None and 3 * len(last) > width:
        hidden = len(last) - max(1, (width - len("(+999) ")) // 3)
    if not last:
        return ""
    drawn = "".join("   " if is_last else through for is_last in last[hidden:-1])
    return (f"(+{hidden}) " if hidden else "") + drawn + (end if last[-1] else turn)
