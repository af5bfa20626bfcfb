"""snapctl fsck: checks a root through its daemon, or without it, and repairs it. Its reference is docs/fsck.md.

The exit status is that of fsck(8), a sum: 1 errors were corrected, 4 errors are left, 8 the check itself failed,
16 the command line is wrong, 32 it was interrupted.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from snapshotter import errors
from snapshotter.cli.output import JsonValue, Output
from snapshotter.cli.text import counted, escape, printable

if TYPE_CHECKING:
    from snapshotter.fsck.findings import Finding, Progress
    from snapshotter.fsck.repair import Done, Step

CORRECTED = 1
LEFT = 4
FAILED = 8
USAGE = 16
INTERRUPTED = 32


class Row(NamedTuple):
    """One finding as it is shown."""

    finding: Finding
    repair: str
    """What repair would do, or cannot."""


def status_of(error: Exception) -> int:
    """Of a command that could not be carried out."""
    return USAGE if isinstance(error, errors.InvalidArgument) else FAILED


def run(args: Namespace, out: Output) -> int:
    if args.root is None and (args.repair or args.dry_run):
        raise errors.InvalidArgument("repair needs the root itself: stop the daemon, and name it with --root DIR")
    if args.from_content is not None and not (args.repair or args.dry_run):
        raise errors.InvalidArgument("--from-content DIR says where --repair may find contents: give both")
    if args.root == "":  # an unset variable of a script, and not where we are
        raise errors.InvalidArgument("--root is empty: name the root")
    report = _Report(out, plans=args.dry_run)
    if args.root is None:
        _online(args, report)
    else:
        _offline(args, report)
    return report.end()


def _online(args: Namespace, report: _Report) -> None:
    from snapshotter.client import Client, Found

    try:
        client = Client(args.address)
    except errors.Unavailable as error:
        raise errors.Unavailable(f"{error}; or check its root without it, with --root DIR") from error
    with client:
        for event in client.check(args.verify_content):
            if isinstance(event, Found):
                report.found(Row(event.finding, event.repair))
            else:
                report.progress(event)


def _offline(args: Namespace, report: _Report) -> None:
    from snapshotter.fsck import blobs, offline
    from snapshotter.fsck.findings import Finding
    from snapshotter.fsck.runner import Check

    with ExitStack() as stack:
        subject = stack.enter_context(offline.opened(Path(args.root).absolute()))
        sources = []
        if args.from_content is not None:
            directory = Path(args.from_content).absolute()
            sources.append(stack.enter_context(blobs.opened(directory, subject.root, subject.workers)))
        check, findings = Check(subject, args.verify_content), []
        try:
            for event in check.events():
                if isinstance(event, Finding):
                    findings.append(event)
                else:
                    report.progress(event)
            steps = offline.steps_for(check, findings)
            for step in steps:
                report.found(_row(step))
            if args.repair and not args.dry_run:
                report.repaired(offline.repair(check, steps, sources))
        except OSError as error:
            raise errors.from_os_error(f"checking {args.root}", error) from error


def _row(step: Step) -> Row:
    return Row(step.finding, step.text or step.obstacle)


class _Report:
    """Writes findings as they come, or at the end as JSON, and knows the exit status."""

    def __init__(self, out: Output, plans: bool) -> None:
        self._out = out
        self._plans = plans
        self._shows_progress = sys.stderr is not None and sys.stderr.isatty()
        self._rows: list[Row] = []
        self._left: list[Finding] | None = None
        """After a repair: what is still found."""
        self._done: list[Done] = []

    def progress(self, event: Progress) -> None:
        if self._shows_progress:
            print(f"\r\x1b[K{event.stage} {event.done}/{event.total}", end="", file=sys.stderr, flush=True)

    def found(self, row: Row) -> None:
        self._rows.append(row)
        finding = row.finding
        self._line(_line(finding))
        if self._plans and finding.is_error:
            self._line(f"    plan: {printable(row.repair)}")

    def repaired(self, events: Iterable[Done | Finding | Progress]) -> None:
        from snapshotter.fsck.findings import Finding
        from snapshotter.fsck.repair import Done

        self._left = []
        for event in events:
            if isinstance(event, Done):
                self._done.append(event)
                outcome = f"failed: {event.failure}" if event.failure else "done"
                self._line(f"repair {event.step.finding.id}: {printable(event.step.text)}: {printable(outcome)}")
            elif isinstance(event, Finding):
                self._left.append(event)
            else:
                self.progress(event)
        for finding in self._left:
            if finding.is_error:
                self._line(f"left: {_line(finding)}")

    def end(self) -> int:
        """The exit status, after the rest of the output."""
        left = [row.finding for row in self._rows] if self._left is None else self._left
        errors_left = sum(finding.is_error for finding in left)
        status = (LEFT if errors_left else 0) | (CORRECTED if any(not done.failure for done in self._done) else 0)
        if self._out.json:
            self._out.object(self._shape(left, status))
            return status
        for line in _meanings(row.finding for row in self._rows):
            self._line(line)
        notes = len(left) - errors_left
        self._line(f"{counted(errors_left, 'error')}, {counted(notes, 'note')}")
        return status

    def _line(self, text: str) -> None:
        if self._shows_progress:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if not self._out.json:
            self._out.line(text)

    def _shape(self, left: list[Finding], status: int) -> JsonValue:
        return {
            "status": status,
            "findings": [_finding_shape(row.finding) | {"repair": row.repair} for row in self._rows],
            "repairs": [
                {
                    "id": done.step.finding.id,
                    "subject": done.step.finding.subject,
                    "act": done.step.text,
                    "failure": done.failure,
                }
                for done in self._done
            ],
            "left": [_finding_shape(finding) for finding in left],
        }


def _line(finding: Finding) -> str:
    detail = f": {printable(finding.detail)}" if finding.detail else ""
    return f"{finding.kind.severity.value} {finding.id}: {escape(finding.subject)}{detail}"


def _meanings(findings: Iterable[Finding]) -> Iterator[str]:
    kinds = {finding.id: finding.kind for finding in findings}
    for name, kind in kinds.items():
        yield f"{name}: {kind.meaning}. Repair: {kind.repair}."


def _finding_shape(finding: Finding) -> dict[str, JsonValue]:
    return {
        "id": finding.id,
        "severity": finding.kind.severity.value,
        "subject": finding.subject,
        "detail": finding.detail,
        "meaning": finding.kind.meaning,
    }
