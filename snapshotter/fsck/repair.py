"""Repair: first a plan, then one act after the other.

A plan is for what was found; what one act puts right may show something else, so who repairs checks again until there
is nothing more to be done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from snapshotter.durable import Stopped
from snapshotter.errors import SnapshotterError
from snapshotter.fsck.findings import Finding
from snapshotter.fsck.fixes import Bench
from snapshotter.model import SnapshotId


class Step(NamedTuple):
    """One finding, and what is to be done about it."""

    finding: Finding
    obstacle: str = ""
    """Why nothing is done; empty if something is."""

    @property
    def text(self) -> str:
        """What is done, as an order; empty if nothing is."""
        fix = self.finding.fix
        return fix.describe() if fix is not None and not self.obstacle else ""


class Done(NamedTuple):
    """What became of a step."""

    step: Step
    failure: str = ""


def plan(findings: Iterable[Finding], in_use: Mapping[SnapshotId, str]) -> list[Step]:
    """`in_use`: snapshots that must not be touched, and why (places.in_use)."""
    return [Step(finding, _obstacle(finding, in_use)) for finding in findings]


def carry_out(steps: Iterable[Step], bench: Bench) -> Iterator[Done]:
    """Does what can be done, in order; a failure is said, and does not keep the others from being done."""
    for step in steps:
        fix = step.finding.fix
        if fix is None or step.obstacle:
            continue
        try:
            fix.apply(bench)
        except Stopped:
            raise
        except (OSError, SnapshotterError) as error:
            yield Done(step, getattr(error, "strerror", None) or str(error))
            if step.finding.id == "database-damaged":
                return  # to write into such a file may do more harm
        else:
            yield Done(step)


def _obstacle(finding: Finding, in_use: Mapping[SnapshotId, str]) -> str:
    if finding.fix is None:
        return "nothing can be done here"
    for snapshot_id in sorted(finding.fix.touches):
        if reason := in_use.get(snapshot_id):
            return f"snapshot {snapshot_id} is in use: {reason}"
    return ""
