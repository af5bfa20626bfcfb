"""The command line of snapctl: commands, options, and what is wrong with them.

A mistake raises InvalidArgument instead of leaving the program.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from snapshotter import __version__, errors

DEFAULT_ADDRESS = "/run/dedup-snapshotter/dedup-snapshotter.sock"
ADDRESS_VARIABLE = "SNAPCTL_ADDRESS"

# How shells complete an argument (shtab): functions in completion.py and in shtab's own scripts.
_NAMES = {"bash": "_snapctl_names", "zsh": "_snapctl_names"}
_DIRECTORY = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/"}
_FILE = {"bash": "_shtab_compgen_files", "zsh": "_files"}

_EPILOG = """\
exit status:
  0 done   2 invalid argument   3 not found   4 already exists   5 failed precondition
  6 daemon unavailable   7 no space or other resource   8 permission denied   1 anything else

A key that begins with "-" goes after "--":  snapctl rm -- -key
"""


class Parser(argparse.ArgumentParser):
    """Raises on mistakes, and takes options anywhere among the arguments of a command.

    argparse by itself refuses `prepare KEY --label a=b PARENT`: it has used up the optional PARENT, as
    absent, when it meets the option.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._with_value: set[str] = set()
        self.options_anywhere = False
        kwargs["allow_abbrev"] = False  # `--lab` in a script would break when another `--lab…` comes
        super().__init__(*args, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        if action.nargs != 0:
            self._with_value.update(action.option_strings)
        return action

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.options_anywhere and args is not None:
            options, operands = self.separate(args)
            args = [*options, "--", *operands] if operands else options
        return super().parse_known_args(args, namespace)

    def separate(self, args: Sequence[str]) -> tuple[list[str], list[str]]:
        """The options with their values, and everything else; after `--` there are no options."""
        options: list[str] = []
        operands: list[str] = []
        waiting = iter(args)
        for arg in waiting:
            if arg == "--":
                operands.extend(waiting)
            elif arg.startswith("-") and arg != "-":
                options.append(arg)
                if arg in self._with_value:
                    options.extend(value for value in [next(waiting, None)] if value is not None)
            else:
                operands.append(arg)
        return options, operands

    def split_at_command(self, args: Sequence[str]) -> tuple[list[str], list[str]]:
        """The options before the first operand, and what begins with it."""
        for end in range(1, len(args) + 1):
            options, operands = self.separate(args[:end])
            if operands:
                return options, list(args[end - 1 :])
        return list(args), []

    def error(self, message: str) -> NoReturn:
        raise errors.InvalidArgument(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """`command`, `address` and `json` are always set; the rest depends on the command.

    Raises: InvalidArgument; SystemExit after `--help` and `--version`.
    """
    parser, commands = build()
    options, words = parser.split_at_command(argv)
    if words and words[0] not in commands:
        parser.error(_unknown_command(words[0], commands))
    args = parser.parse_args([*options, *words])
    if args.command is None:
        parser.error("which command? one of " + ", ".join(commands))
    args.address = getattr(args, "address", None) or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    args.json = getattr(args, "json", False)
    return args


def build() -> tuple[Parser, list[str]]:
    """The parser and the names of all commands."""
    parser = Parser(
        prog="snapctl",
        description="Inspect and change the snapshots of the dedup-snapshotter daemon.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"snapctl {__version__}")
    _add_common(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser, title="commands")
    _add_changing(commands)
    _add_showing(commands)
    _add_mounting(commands)
    _add_other(commands)
    return parser, list(commands.choices)


def is_fsck(argv: Sequence[str]) -> bool:
    """Whether the command is the one whose exit status is that of fsck(8)."""
    return build()[0].split_at_command(argv)[1][:1] == ["fsck"]


def parse_labels(labels: Sequence[str]) -> dict[str, str]:
    """`K=V` words. Raises InvalidArgument."""
    parsed = {}
    for label in labels:
        key, equals, value = label.partition("=")
        if not key or not equals:
            raise errors.InvalidArgument(f"a label is KEY=VALUE, not {errors.quote(label)}")
        parsed[key] = value
    return parsed


def parse_label_changes(changes: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """`K=V` words to set and `K-` words to remove. Raises InvalidArgument."""
    labels = {}
    removed = []
    for change in changes:
        if "=" not in change and change.endswith("-") and change != "-":
            removed.append(change[:-1])
        else:
            labels.update(parse_labels([change]))
    for key in removed:
        if key in labels:
            raise errors.InvalidArgument(f"the label {errors.quote(key)} is both set and removed")
    return labels, removed


def text(value: str) -> str:
    """What goes to the daemon has to be UTF-8; a file name need not be."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{errors.quote(value)} is not UTF-8") from None
    return value


def _unknown_command(word: str, commands: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, commands, n=1, cutoff=0.5)
    return f"no command {errors.quote(word)}" + (f'; did you mean "{near[0]}"?' if near else "")


def _add_common(parser: Parser) -> None:
    """Options that may stand before and after the command.

    They have no default: that of the command would undo what was given before it.
    """
    address = parser.add_argument(
        "--address", metavar="SOCKET", default=argparse.SUPPRESS,
        help=f"the daemon's socket (default: ${ADDRESS_VARIABLE} or {DEFAULT_ADDRESS})",
    )  # fmt: skip
    _complete(address, _FILE)
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON, for scripts")


def _add_command(commands: Any, name: str, summary: str, details: str = "") -> Parser:
    parser: Parser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {details}".strip()
    )
    parser.options_anywhere = True
    _add_common(parser)
    return parser


def _add_changing(commands: Any) -> None:
    for name, summary in (
        ("prepare", "create an active (writable) snapshot"),
        ("view", "create a read-only snapshot"),
    ):
        parser = _add_command(commands, name, summary, "Prints what to mount.")
        parser.add_argument("key", metavar="KEY", type=text, help="the new snapshot")
        _add_name(parser, "parent", "the committed snapshot below it", nargs="?", default="")
        _add_labels(parser)
    parser = _add_command(commands, "commit", "turn an active snapshot into a committed one")
    parser.add_argument("name", metavar="NAME", type=text, help="the new committed snapshot")
    _add_name(parser, "key", "the active snapshot, which ends")
    parent = parser.add_argument(
        "--parent", metavar="PARENT", type=text, default="", help="for a snapshot prepared without one"
    )
    _complete(parent, _NAMES)
    _add_labels(parser)
    parser = _add_command(
        commands, "rm", "remove snapshots", "Goes on after a failure; the exit status is that of the first."
    )
    _add_name(parser, "keys", "what to remove, children before their parents", nargs="+", metavar="KEY")
    parser = _add_command(commands, "label", "set or remove labels of a snapshot", "Prints the snapshot.")
    _add_name(parser, "key", "the snapshot")
    parser.add_argument(
        "changes", metavar="LABEL", nargs="+", type=text, help="KEY=VALUE sets a label, KEY- removes it"
    )


def _add_showing(commands: Any) -> None:
    parser = _add_command(
        commands, "ls", "list snapshots",
        "With several filters, those are listed that match any: kind==active, 'name~=^sha256:',"
        " parent==NAME, 'labels.\"a/b\"==c'; a comma is and.",
    )  # fmt: skip
    parser.add_argument("filters", metavar="FILTER", nargs="*", type=text, help="containerd's filter syntax")
    parser.add_argument("--size", action="store_true", help="ask also what each of them takes")
    parser.add_argument("--names", action="store_true", help="print only the names, one a line")
    parser.add_argument("--no-trunc", action="store_true", help="never shorten names to fit the terminal")
    parser = _add_command(commands, "stat", "show one snapshot")
    _add_name(parser, "key", "the snapshot")
    parser = _add_command(commands, "mounts", "show what to mount for an active snapshot or a view")
    _add_name(parser, "key", "the snapshot")
    parser = _add_command(
        commands, "usage", "show what snapshots take, their parents not included", "Without KEY: all."
    )
    _add_name(parser, "keys", "the snapshots", nargs="*", metavar="KEY")
    parser = _add_command(
        commands, "df", "show what the store and each snapshot take, share and would free",
        "As of the last time that the daemon looked. EXCLUSIVE is what removing a snapshot frees; parents are"
        " not included. With KEY, only these snapshots.",
    )  # fmt: skip
    _add_name(parser, "keys", "the snapshots", nargs="*", metavar="KEY")
    parser.add_argument("--now", action="store_true", help="look now; takes minutes where there is much to look at")
    parser.add_argument("--why", action="store_true", help="show also why files are not shared")
    parser.add_argument("--no-trunc", action="store_true", help="never shorten names to fit the terminal")
    parser = _add_command(commands, "tree", "show snapshots below their parents")
    parser.add_argument("--size", action="store_true", help="ask also what each of them takes")
    parser.add_argument("--no-trunc", action="store_true", help="never shorten lines to fit the terminal")


def _add_mounting(commands: Any) -> None:
    parser = _add_command(commands, "mount", "mount a snapshot", "In the caller's mount namespace; needs root.")
    _add_name(parser, "key", "an active snapshot or a view")
    _complete(parser.add_argument("target", metavar="TARGET", help="a directory that exists"), _DIRECTORY)
    parser = _add_command(commands, "umount", "undo a mount")
    _complete(parser.add_argument("target", metavar="TARGET", help="where it was mounted"), _DIRECTORY)
    parser.add_argument("--lazy", action="store_true", help="detach it now, even while it is in use")


def _add_other(commands: Any) -> None:
    _add_command(commands, "cleanup", "wait until all that was removed is deleted, and sweep leftovers")
    parser = _add_command(
        commands, "gc", "delete now what nothing uses any more",
        "The daemon does so by itself, in the background. Waits until what was removed before is deleted, too.",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="only say what would be freed")
    parser = _add_command(
        commands, "fsck", "check what the daemon keeps, and repair it",
        "The daemon checks its root, or this command does, if the daemon is stopped and --root given. Exit status as"
        " fsck(8), a sum: 0 no errors, 1 corrected, 4 errors left, 8 failed, 16 command line, 32 interrupted.",
    )  # fmt: skip
    root = parser.add_argument("--root", metavar="DIR", help="check this root of a daemon that is stopped")
    _complete(root, _DIRECTORY)
    parser.add_argument("--repair", action="store_true", help="repair what can be repaired safely; needs --root")
    parser.add_argument("--verify-content", action="store_true", help="read all objects, and compare their hashes")
    content = parser.add_argument(
        "--from-content", metavar="DIR",
        help="with --repair: take lost contents out of the layer blobs in containerd's content store, usually"
        " /var/lib/containerd/io.containerd.content.v1.content",
    )  # fmt: skip
    _complete(content, _DIRECTORY)
    parser.add_argument("--dry-run", action="store_true", help="only say what --repair would do")
    _add_command(commands, "info", "show what the daemon is and serves")
    parser = _add_command(
        commands, "completion", "print a completion script", 'For bash: eval "$(snapctl completion bash)"'
    )
    parser.add_argument("shell", choices=["bash", "zsh"])


def _add_name(parser: Parser, dest: str, summary: str, **options: Any) -> None:
    """An argument that is an existing snapshot."""
    options.setdefault("metavar", dest.upper())
    _complete(parser.add_argument(dest, type=text, help=summary, **options), _NAMES)


def _add_labels(parser: Parser) -> None:
    parser.add_argument(
        "--label", dest="labels", metavar="KEY=VALUE", type=text, action="append", default=[],
        help="a label for it; may be repeated",
    )  # fmt: skip


def _complete(action: argparse.Action, how: dict[str, str]) -> None:
    action.complete = how  # type: ignore[attr-defined]
