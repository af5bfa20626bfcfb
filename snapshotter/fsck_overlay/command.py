"""The command line, with the interface of overlayfs-progs and the exit status of fsck(8)."""

from __future__ import annotations

import argparse
import enum
import os
import select
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from snapshotter import __version__
from snapshotter.errors import FailedPrecondition, InvalidArgument, SnapshotterError
from snapshotter.fsck_overlay import options as mount_options
from snapshotter.fsck_overlay.check import Result, check
from snapshotter.fsck_overlay.findings import Consent, Finding
from snapshotter.fsck_overlay.in_use import refuse_if_mounted
from snapshotter.fsck_overlay.layers import Layers, Place, opened
from snapshotter.fsck_overlay.repair import can_mend, mend
from snapshotter.overlay.attributes import TRUSTED, USER, Names

CLEAN, MENDED, LEFT, FAILED, USAGE, CANCELLED = 0, 1, 4, 8, 16, 32
_ROUNDS = 20
"""A repair can bring to light what it hid; more rounds than this would mean that two repairs undo each other."""
_NAME = "fsck.overlay"


class Mode(enum.Enum):
    ASK = ""
    SAFE = "p"
    NOTHING = "n"
    ALL = "y"


class Cancelled(BaseException):
    """By a signal."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{_NAME}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_NAME,
        description="Checks and repairs the directories of an overlay that is not mounted.",
        epilog="Exit status: 0 clean, 1 repaired, 4 something is left, 8 cannot be checked, 16 usage, 32 cancelled.",
    )
    parser.add_argument(
        "-o", dest="options", action="append", default=[], metavar="lowerdir=A:B,upperdir=U,workdir=W",
        help="the directories, as mount takes them; may be repeated",
    )  # fmt: skip
    modes = parser.add_mutually_exclusive_group()
    for letters, mode, text in (
        (("-p", "-a"), Mode.SAFE, "repair what is safe, without questions"),
        (("-n",), Mode.NOTHING, "change nothing"),
        (("-y",), Mode.ALL, "repair all that can be repaired"),
    ):
        modes.add_argument(*letters, dest="mode", action="store_const", const=mode, default=Mode.ASK, help=text)
    parser.add_argument("-v", "--verbose", action="store_true", help="say more")
    parser.add_argument("-V", "--version", action="version", version=f"{_NAME} {__version__}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _cancel)
    try:
        parsed = _parser().parse_args(arguments)
        return _run(parsed.options, parsed.mode, parsed.verbose)
    except InvalidArgument as error:
        print(f"{_NAME}: {error}", file=sys.stderr)
        return USAGE
    except SnapshotterError as error:
        print(f"{_NAME}: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"{_NAME}: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        return FAILED
    except Cancelled:
        print(f"{_NAME}: cancelled", file=sys.stderr)
        return CANCELLED


def _cancel(_number: int, _frame: FrameType | None) -> None:
    raise Cancelled


def _run(texts: Sequence[str], mode: Mode, verbose: bool) -> int:
    wanted = mount_options.parse(texts)
    names = USER if wanted.userxattr or _is_made_with_userxattr(wanted.upper or wanted.lowers[0]) else TRUSTED
    with opened(wanted.lowers, wanted.data, wanted.upper, wanted.work, names) as layers:
        locked = refuse_if_mounted(layers)
        if verbose:
            _describe(layers, locked)
        return _Session(layers, locked, mode, verbose).run()


class _Session:
    """Checks and repairs in turn until nothing more is to be done."""

    def __init__(self, layers: Layers, locked: frozenset[int], mode: Mode, verbose: bool) -> None:
        self._layers = layers
        self._locked = locked
        self._mode = mode
        self._verbose = verbose
        self._answers: dict[tuple[str, Place], bool] = {}
        self._mended = 0

    def run(self) -> int:
        for _ in range(_ROUNDS):
            result = check(self._layers)
            plan = [finding for finding in result.findings if self._is_to_be_mended(finding)]
            if not plan:
                return self._end(result)
            mend(self._layers, plan)
            self._mended += len(plan)
        raise FailedPrecondition(f"after {_ROUNDS} rounds of repairs there is still something to be repaired")

    def _is_to_be_mended(self, finding: Finding) -> bool:
        key = (finding.kind.id, finding.place)
        if key not in self._answers:
            self._answers[key] = self._decide(finding)
        return self._answers[key]

    def _decide(self, finding: Finding) -> bool:
        """Says what was found, and asks where that is wanted."""
        detail = f" ({finding.detail})" if finding.detail else ""
        text = f"[{finding.kind.id}] {self._layers.show(finding.place)}: {finding.kind.means}{detail}"
        if not can_mend(self._layers, finding, self._locked):
            print(f"{text}. No repair from here.", flush=True)
            return False
        if self._mode is Mode.ASK and sys.stdin.isatty():
            return _ask(f"{text}. Repair: {finding.kind.mends}?")
        will = self._mode is Mode.ALL or (self._mode is Mode.SAFE and finding.kind.consent is Consent.SAFE)
        print(f"{text}. Repair{'ing' if will else ''}: {finding.kind.mends}.", flush=True)
        return will

    def _end(self, result: Result) -> int:
        if self._verbose:
            print(f"features in use: {', '.join(sorted(result.features)) or 'none'}")
            for note in result.notes:
                print(f"note: {note}")
        if result.findings:
            print(f"{self._mended} repaired, {len(result.findings)} left")
            return LEFT
        print(f"{self._mended} repaired, now clean" if self._mended else "clean")
        return MENDED if self._mended else CLEAN


def _ask(question: str) -> bool:
    while True:
        print(f"{question} (y/n) ", end="", flush=True)
        answer = _read_line().strip().lower()
        if answer in ("y", "yes", "n", "no", ""):
            return answer.startswith("y")


def _read_line() -> str:
    """From the terminal. A signal that comes just before a read would leave it waiting: so signals are waited for, too,
    and their handler runs before anything is read (signal.set_wakeup_fd)."""
    woken_fd, wake_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_fd)
    try:
        select.select([sys.stdin, woken_fd], [], [])
        return sys.stdin.readline()
    finally:
        signal.set_wakeup_fd(-1)
        os.close(woken_fd)
        os.close(wake_fd)


def _describe(layers: Layers, locked: frozenset[int]) -> None:
    for layer in (layers.upper, layers.work, *layers.lowers, *layers.data):
        if layer:
            role = {0: "upper", -1: "work"}.get(layer.number, "data-only" if layer.is_data_only else "lower")
            why = "" if layer.is_writable else " (read-only)"
            why = " (a mounted overlay has it, so it is not changed)" if layer.number in locked else why
            print(f"{role}: {layer.path}{why}")


def _is_made_with_userxattr(directory: str) -> bool:
    """By the attributes of the directory and of what is in it: some of user.overlay, and none of trusted.overlay."""
    try:
        paths = [directory, *(entry.path for entry in os.scandir(directory))]
        found = {name for path in paths for name in os.listxattr(path, follow_symlinks=False)}
    except OSError:
        return False
    return _has(found, USER) and not _has(found, TRUSTED)


def _has(attributes: set[str], names: Names) -> bool:
    return any(name in names.dead or name in names.living for name in attributes)
