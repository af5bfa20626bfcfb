"""All checks of one overlay."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from snapshotter.fsck_overlay.claims import Claims
from snapshotter.fsck_overlay.findings import Finding, finding
from snapshotter.fsck_overlay.index import IndexCheck, use_of_index
from snapshotter.fsck_overlay.layers import UPPER, WORK, Layers, Place, UnknownAttribute
from snapshotter.fsck_overlay.lookup import Lookup
from snapshotter.fsck_overlay.tree import IndexUse, Pass, Seen, root_origin_is_wrong

_INCOMPAT = Place(WORK, b"work/incompat")
_KNOWN_INCOMPAT = {b"volatile"}
_OF_THE_LOWER = {
    "whiteout-orphan", "redirect-dangling", "redirect-dangling-merge", "origin-type", "metacopy-no-data",
    "metacopy-size", "index-stale", "index-type",
}  # fmt: skip
"""What another lower would explain."""


@dataclass(slots=True)
class Result:
    findings: list[Finding]
    features: set[str]
    notes: list[str] = field(default_factory=list)


def check(layers: Layers) -> Result:
    """Changes nothing. Raises OSError, and UnknownAttribute."""
    lookup = Lookup(layers)
    seen = Seen()
    notes = _work_notes(layers, seen)
    index = use_of_index(layers)
    try:
        findings = _all(layers, lookup, index, seen)
    finally:
        if index.fd is not None:
            os.close(index.fd)
    if layers.upper and _is_other_lower(layers, seen, findings):
        told = f"{seen.origins_wrong} of {seen.origins_right + seen.origins_wrong} stored origins are not in it"
        findings = [finding("lower-replaced", Place(UPPER, b""), told)]
    elif seen.origins_wrong:
        notes.append(f"{seen.origins_wrong} files or directories of the lower are not those that were copied up")
    if not seen.can_decode:
        notes.append("origins and the index were not held against the lower: that needs CAP_DAC_READ_SEARCH")
    return Result(findings, seen.features, notes)


def _all(layers: Layers, lookup: Lookup, index: IndexUse, seen: Seen) -> list[Finding]:
    findings: list[Finding] = []
    passes = [Pass(layers, lookup, layer.number, index, seen) for layer in reversed(layers.stacked)]
    for one in passes:
        findings += one.run()
    findings += Claims(layers, lookup, seen.redirects, passes[0].without_redirect).check()
    if index.fd is not None:
        findings += IndexCheck(layers, lookup, seen).run()
    return findings


def _is_other_lower(layers: Layers, seen: Seen, findings: list[Finding]) -> bool:
    """The root's own origin is proof. Else most origins must be wrong, and something must come of it: a lower that was
    copied elsewhere has other inodes, and is as good."""
    if root_origin_is_wrong(layers):
        return True
    harm = seen.metacopy_wrong or any(found.kind.id in _OF_THE_LOWER for found in findings)
    return bool(harm and seen.origins_wrong > seen.origins_right)


def _work_notes(layers: Layers, seen: Seen) -> list[str]:
    """Raises UnknownAttribute where the kernel would refuse the mount for a feature that we do not know."""
    if not layers.work or not layers.inode(_INCOMPAT):
        return []
    for name in layers.names(_INCOMPAT):
        if name not in _KNOWN_INCOMPAT:
            raise UnknownAttribute(
                f"{layers.show(_INCOMPAT.child(name))} says that the overlay needs a feature that this version does "
                "not know; nothing was changed"
            )
    seen.features.add("volatile")
    mark = layers.show(_INCOMPAT.child(b"volatile"))
    return [
        f"it was mounted volatile: the kernel refuses it until {mark} is removed, and after a crash it may be damaged"
    ]
