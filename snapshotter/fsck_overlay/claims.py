"""Which directories show a directory of a lower layer: without a fault, only the one that a rename moved it to.

A rename leaves a redirect at the new place, and something that hides the lower directory at the old one.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from snapshotter.fsck_overlay.findings import AddWhiteout, Finding, Step, finding
from snapshotter.fsck_overlay.layers import UPPER, Layers, Place
from snapshotter.fsck_overlay.lookup import Lookup, Stack
from snapshotter.fsck_overlay.tree import Redirect


@dataclass(frozen=True, slots=True)
class _Shown:
    """A directory of the overlay that the layers from some layer downwards make."""

    path: bytes
    stack: Stack
    parents: tuple[Place, ...]
    """What shows at each directory above it, outermost first, without the root."""
    via: Place | None
    """The directory whose redirect shows it; None where its own name does."""


class Claims:
    """`without_redirect`: the steps that take a directory's redirect away."""

    def __init__(
        self,
        layers: Layers,
        lookup: Lookup,
        redirects: Sequence[Redirect],
        without_redirect: Callable[[Place, Stack], tuple[Step, ...]],
    ) -> None:
        self._layers = layers
        self._lookup = lookup
        self._without_redirect = without_redirect
        # Layer by layer from below, so that of two redirects to one directory the lower one is right, then the first.
        self._redirects = sorted(redirects, key=lambda found: (-found.place.layer, found.place.path))
        self._by_target: dict[Place, list[Redirect]] = defaultdict(list)
        for redirect in self._redirects:
            for place in redirect.stack[1:]:
                self._by_target[place].append(redirect)
        self._known: dict[tuple[int, Place], list[_Shown]] = {}

    def check(self) -> Iterator[Finding]:
        """Only the upper is expected to hide what its redirects lead to: the kernel wrote it. A lower layer may have
        been made to show a directory twice."""
        kept: set[Place] = set()
        doubtful: set[Place] = set()
        uncovered: list[tuple[Place, Place, _Shown]] = []
        for redirect in self._redirects:
            place, target = redirect.place, redirect.stack[1]
            others = [shown for shown in self._showing(place.layer, target) if shown.path != place.path]
            rival = next((shown for shown in others if self._is_rival(shown, place.layer, kept)), None)
            if rival:
                doubtful.add(target)
                stack = self._stack_above(redirect)
                yield finding(
                    "redirect-duplicate", place, self._other(target, rival), *self._without_redirect(place, stack)
                )
                continue
            kept.add(place)
            if place.layer == UPPER:
                uncovered += [(target, place, shown) for shown in others if shown.via is None]
        for target, place, shown in uncovered:
            if target not in doubtful:
                whiteout = AddWhiteout(Place(place.layer, shown.path), shown.parents)
                yield finding("redirect-uncovered", place, f"at {os.fsdecode(shown.path)!r}", whiteout)

    @staticmethod
    def _is_rival(shown: _Shown, layer: int, kept: set[Place]) -> bool:
        return shown.via in kept if shown.via else shown.stack[0].layer == layer

    def _other(self, target: Place, rival: _Shown) -> str:
        return f"with {self._layers.show(target)}, and so is {os.fsdecode(rival.path)!r}"

    def _stack_above(self, redirect: Redirect) -> Stack:
        return self._resolve(redirect.place.layer, redirect.place.parent().path).stack

    def _resolve(self, top: int, path: bytes) -> _Shown:
        """A directory by its path in the overlay from `top` downwards, which it is in."""
        shown = _Shown(b"", self._lookup.roots(top), (), None)
        for name in path.split(b"/") if path else ():
            shown = self._below(shown, name)
        return shown

    def _below(self, shown: _Shown, name: bytes) -> _Shown:
        path = shown.path + b"/" + name if shown.path else name
        parents = (*shown.parents, shown.stack[0]) if shown.path else ()
        found = self._lookup.child(shown.stack, name)
        return _Shown(path, found.stack if found.is_directory else (), parents, None)

    def _showing(self, top: int, target: Place) -> list[_Shown]:
        """Every directory of the overlay from `top` downwards that `target` is merged into."""
        if (top, target) not in self._known:
            self._known[top, target] = []  # redirects in a circle end here
            self._known[top, target] = list(self._find_showing(top, target))
        return self._known[top, target]

    def _find_showing(self, top: int, target: Place) -> Iterator[_Shown]:
        if not target.path:
            yield self._resolve(top, b"")
            return
        seen = set()
        for shown in self._by_redirect(top, target):
            seen.add(shown.path)
            yield shown
        for parent in self._showing(top, target.parent()):
            shown = self._below(parent, target.name)
            if target in shown.stack and shown.path not in seen:
                yield shown

    def _by_redirect(self, top: int, target: Place) -> Iterator[_Shown]:
        for redirect in self._by_target.get(target, ()):
            if redirect.place.layer == top:
                shown = self._resolve(top, redirect.place.path)
                yield _Shown(shown.path, shown.stack, shown.parents, redirect.place)
            elif top < redirect.place.layer < target.layer:
                for shown in self._showing(top, redirect.place):
                    if target in shown.stack:
                        yield _Shown(shown.path, shown.stack, shown.parents, redirect.place)
