"""snapctl: the daemon's command line. Its reference is docs/snapctl.md."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from snapshotter import errors

_INTERRUPTED = 128 + signal.SIGINT
_BROKEN_PIPE = 128 + signal.SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    try:
        return _run(words)
    except KeyboardInterrupt:
        _abandon_output()
        return _status_of_fsck(words, None) or _INTERRUPTED
    except BrokenPipeError:
        _abandon_output()
        return _BROKEN_PIPE


def _run(argv: Sequence[str]) -> int:
    """One command with its output written, or the reason why not on stderr."""
    from snapshotter.cli.commands import report

    try:
        status = _dispatch(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except errors.SnapshotterError as error:
        report(error)
        return _status_of_fsck(argv, error) or error.exit_status
    except BrokenPipeError:
        raise
    except OSError as error:  # no room for stdout, no current directory, …
        report(errors.SnapshotterError(f"{error.filename or 'standard output'}: {error.strerror or error}"))
        _abandon_output()
        return _status_of_fsck(argv, error) or errors.SnapshotterError.exit_status


def _status_of_fsck(argv: Sequence[str], error: Exception | None) -> int:
    """What another command's failure is not: fsck has statuses of its own. 0 for other commands."""
    from snapshotter.cli import fsck
    from snapshotter.cli.arguments import is_fsck

    if not is_fsck(argv):
        return 0
    return fsck.status_of(error) if error else fsck.INTERRUPTED


def _dispatch(argv: Sequence[str]) -> int:
    from snapshotter.cli.arguments import parse
    from snapshotter.cli.commands import COMMANDS
    from snapshotter.cli.output import standard_output

    try:
        args = parse(argv)
    except SystemExit as asked:  # argparse has printed help or the version
        return int(asked.code or 0)
    return COMMANDS[args.command](args, standard_output(args.json))


def _abandon_output() -> None:
    """Lets the interpreter's last flush succeed: what is still buffered has nowhere to go."""
    if sys.stdout is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
