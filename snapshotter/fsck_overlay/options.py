"""What -o says, as mount(8) takes it for an overlay (Documentation/filesystems/overlayfs.rst)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from snapshotter.errors import InvalidArgument, quote

_KNOWN = frozenset(
    [
        *(
            "index",
            "metacopy",
            "redirect_dir",
            "nfs_export",
            "xino",
            "uuid",
            "verity",
            "volatile",
            "fsync",
            "userxattr",
        ),
        *(
            "override_creds",
            "default_permissions",
            "defaults",
            "ro",
            "rw",
            "noatime",
            "relatime",
            "nodev",
            "nosuid",
            "noexec",
        ),
    ]
)
"""Options of a mount. Only userxattr says something about what is on disk."""


@dataclass(slots=True)
class Options:
    lowers: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    upper: str | None = None
    work: str | None = None
    userxattr: bool = False


def parse(texts: Sequence[str]) -> Options:
    """Each text is the argument of one -o; later ones add to, or replace, earlier ones. A backslash takes its meaning
    from a comma, a colon, or a backslash. Raises InvalidArgument."""
    options = Options()
    for text in texts:
        for option in _split(text, ","):
            name, _, value = option.partition("=")
            _set(options, name, value)
    _check(options)
    return options


def _set(options: Options, name: str, value: str) -> None:
    match name:
        case "lowerdir":
            options.lowers, options.data = _lowers(value)
        case "lowerdir+":
            options.lowers.append(_unescape(value))
        case "datadir+":
            options.data.append(_unescape(value))
        case "upperdir":
            options.upper = _unescape(value)
        case "workdir":
            options.work = _unescape(value)
        case "userxattr":
            options.userxattr = True
        case "":
            pass
        case _ if name not in _KNOWN:
            raise InvalidArgument(f"-o {quote(name)}: overlayfs has no such option")


def _lowers(value: str) -> tuple[list[str], list[str]]:
    """ "a:b::c::d": b is below a, c and d are data-only."""
    parts = [_unescape(part) for part in _split(value, ":")]
    lowers: list[str] = []
    data: list[str] = []
    into = lowers
    for number, part in enumerate(parts):
        if part:
            into.append(part)
            continue
        into = data
        if number in (0, len(parts) - 1) or not parts[number - 1]:
            raise InvalidArgument(f"-o lowerdir={quote(value)}: an empty path")
    if data and len(parts) != parts.index("") + 2 * len(data):
        raise InvalidArgument(f"-o lowerdir={quote(value)}: each data-only layer needs two colons")
    return lowers, data


def _check(options: Options) -> None:
    if not options.lowers:
        raise InvalidArgument("say what to check: -o lowerdir=A:B,upperdir=U,workdir=W")
    if options.upper and not options.work:
        raise InvalidArgument("an upperdir needs its workdir: -o workdir=W")
    if options.work and not options.upper:
        raise InvalidArgument("a workdir needs its upperdir: -o upperdir=U")
    if not options.upper and len(options.lowers) + len(options.data) == 1:
        raise InvalidArgument("one lowerdir by itself is no overlay")


def _split(text: str, separator: str) -> list[str]:
    return re.findall(rf"((?:\\.|[^\\{separator}]|\\$)*)(?:{separator}|$)", text)[: _count(text, separator)]


def _count(text: str, separator: str) -> int:
    return len(re.sub(r"\\.", "", text).split(separator))


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)
