"""Layers by chance, and changes by chance: each is made in two places, in a snapshot and in a plain directory that is
the model of it.

Names, contents and attributes come from small pools, so that the same file is often there twice, and often nearly.
Times are set, never taken from the clock, so that both places read the same to the nanosecond.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import mmap
import os
import random
import shutil
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path, PurePath

from blake3 import blake3
from hypothesis import strategies as st

EPOCH_NS = 1_500_000_000_000_000_000
_NOBODY = 2**32 - 1
"""The id in an ACL's entries that are for no user or group in particular (<linux/posix_acl.h>)."""
_ACL_TAGS = {"owner": 0x01, "user": 0x02, "group": 0x04, "mask": 0x10, "other": 0x20}
_OWN_ATTRIBUTES = ("user.", "trusted.", "security.capability", "system.posix_acl_")
"""What `Attributes.apply` takes away before it sets others; security modules have more, which are theirs."""

TWINS = "trusted.SGI_ACL_"
"""Under this name XFS shows ACLs a second time."""


def acl(*entries: tuple[str, int, int]) -> bytes:
    """The value of system.posix_acl_access: tags with their permissions and, for "user", an id."""
    packed = (
        struct.pack("<HHI", _ACL_TAGS[tag], permissions, who if tag == "user" else _NOBODY)
        for tag, permissions, who in entries
    )
    return struct.pack("<I", 2) + b"".join(packed)


# struct vfs_cap_data: revision 2, effective; cap_net_raw (<linux/capability.h>)
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
ACL = acl(("owner", 6, 0), ("user", 4, 1234), ("group", 4, 0), ("mask", 4, 0), ("other", 0, 0))


@dataclass(frozen=True, slots=True)
class Content:
    """Of a file. Bytes that do not repeat, or zeros; with `hole_bytes`, a hole of as many in front of them."""

    seed: int
    size_bytes: int
    hole_bytes: int = 0

    def write(self, path: Path) -> None:
        with path.open("xb") as stream:
            stream.seek(self.hole_bytes)
            stream.write(self.data())
            if not self.size_bytes:  # else it changes nothing, but XFS writes out the file
                stream.truncate(self.hole_bytes)

    def data(self) -> bytes:
        return data(self.seed, self.size_bytes)


@cache
def data(seed: int, size_bytes: int) -> bytes:
    """Zeros for seed 0."""
    return hashlib.shake_128(b"%d" % seed).digest(size_bytes) if seed else bytes(size_bytes)


@dataclass(frozen=True, slots=True)
class Attributes:
    """All but the content. A file type that cannot have some of it, has the rest."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = EPOCH_NS
    xattrs: tuple[tuple[str, bytes], ...] = ()

    def apply(self, path: Path) -> None:
        status = path.lstat()
        os.chown(path, self.uid, self.gid, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(path, self.mode)
        for name in os.listxattr(path, follow_symlinks=False):
            if name.startswith(_OWN_ATTRIBUTES) and not name.startswith(("trusted.overlay.", TWINS)):
                os.removexattr(path, name, follow_symlinks=False)
        for name, value in self.xattrs:
            if _can_have(status.st_mode, name):
                os.setxattr(path, name, value, follow_symlinks=False)
        os.utime(path, ns=(self.mtime_ns, self.mtime_ns), follow_symlinks=False)

    @classmethod
    def of(cls, path: Path) -> Attributes:
        status = path.lstat()
        xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path)}
        own = tuple(
            (name, value)
            for name, value in sorted(xattrs.items())
            if name.startswith(_OWN_ATTRIBUTES) and not name.startswith(TWINS)
        )
        return cls(stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns, own)


def _can_have(mode: int, xattr: str) -> bool:
    """xattr(7)"""
    if xattr == "system.posix_acl_default":
        return stat.S_ISDIR(mode)
    if xattr == "security.capability":
        return stat.S_ISREG(mode)
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode) or xattr.startswith("trusted.")


class What(Enum):
    FILE = "file"
    LINK = "another name of a file of the same layer"
    SYMLINK = "symlink"
    FIFO = "fifo"
    DEVICE = "device"
    DIRECTORY = "directory"
    WHITEOUT = "whiteout"
    OPAQUE = "opaque directory"


_DIRECTORIES = (What.DIRECTORY, What.OPAQUE)


@dataclass(frozen=True, slots=True)
class Node:
    """One entry of a layer. What does not fit to the others, or hides nothing, is left out when it is made."""

    path: str
    what: What
    attributes: Attributes
    content: Content = Content(0, 0)
    target: int = 0
    """Of a LINK: which of the layer's files."""


# -- the pools

SIZES = (0, 1, 4095, 4096, 4097, 70_000)
_NAMES = ("a", "b", "c", "d", "-rf *", "new\nline", "größe", "not-utf8-\udcff\udcfe", "long" * 60)
_SHARD = blake3(data(1, 4096)).hexdigest()[:2]
"""Of the object store: a directory of an image may have that name, too."""
_PLACES = ("", "d", "d/inner", "e", "etc/cron.d", "var/spool/cron", _SHARD)
_MODES = (0o644, 0o644, 0o644, 0o755, 0o000, 0o600, 0o4755, 0o2755, 0o1644)
_OWNERS = ((0, 0), (0, 0), (1000, 100), (3_000_000_000, 2_999_999_999))
_TIMES_NS = (EPOCH_NS, EPOCH_NS, EPOCH_NS + 1, 1_234_567_890_123_456_789)
_XATTRS: tuple[tuple[tuple[str, bytes], ...], ...] = (
    (),
    (),
    (),
    (("user.note", b"x"),),
    (("trusted.note", b"\0\xff"),),
    (("security.capability", CAPABILITY),),
    (("system.posix_acl_access", ACL),),
    (("system.posix_acl_access", ACL), ("system.posix_acl_default", ACL)),
    (("user.large", b"v" * 300), ("user.note", b"x")),
)

paths = st.builds(os.path.join, st.sampled_from(_PLACES), st.sampled_from(_NAMES))
contents = st.builds(
    Content, st.sampled_from((0, 1, 1, 2)), st.sampled_from(SIZES), st.sampled_from((0, 0, 0, 0, 300_000))
)
attributes = st.builds(
    lambda mode, owner, mtime_ns, xattrs: Attributes(mode, owner[0], owner[1], mtime_ns, xattrs),
    st.sampled_from(_MODES),
    st.sampled_from(_OWNERS),
    st.sampled_from(_TIMES_NS),
    st.sampled_from(_XATTRS),
)
nodes = st.builds(
    Node,
    path=paths,
    what=st.sampled_from([What.FILE] * 8 + [What.LINK] * 2 + [what for what in What if what is not What.FILE]),
    attributes=attributes,
    content=contents,
    target=st.integers(0, 7),
)
layers = st.lists(nodes, min_size=1, max_size=16, unique_by=lambda node: node.path).map(tuple)


# -- a layer of an image


def unpack(layer: Sequence[Node], upper: Path, plain: Path) -> None:
    """Writes a layer into the upper of an extraction snapshot, as containerd's applier does, and makes the same of
    `plain`, a copy of all below the layer."""
    made: dict[str, What] = {".": What.DIRECTORY}
    set_last: dict[str, Attributes] = {}
    files: list[str] = []
    for node in layer:
        if node.path in made or not _make_parents(node.path, upper, plain, made, set_last):
            continue
        if node.what in (What.WHITEOUT, What.OPAQUE) and not os.path.lexists(plain / node.path):
            continue
        if node.what is What.LINK and not files:
            continue
        made[node.path] = node.what
        if node.what in _DIRECTORIES:
            set_last[node.path] = node.attributes
        _make_room(node, plain)
        target = files[node.target % len(files)] if files else ""
        _make(node, upper, target, is_layer=True)
        _make(node, plain, target, is_layer=False)
        if node.what is What.FILE:
            files.append(node.path)
    # In both alike: entries were made in them meanwhile.
    set_last["."] = Attributes.of(plain)
    for path in sorted(set_last, key=lambda path: path.count("/") if path != "." else -1, reverse=True):
        for top in (upper, plain):
            set_last[path].apply(top / path)


def _make_parents(path: str, upper: Path, plain: Path, made: dict[str, What], set_last: dict[str, Attributes]) -> bool:
    """False if the layer itself has something else there."""
    for parent in reversed([str(parent) for parent in PurePath(path).parents]):
        if parent in made:
            if made[parent] not in _DIRECTORIES:
                return False
            continue
        made[parent] = What.DIRECTORY
        (upper / parent).mkdir()
        if _is_directory(plain / parent):
            set_last[parent] = Attributes.of(plain / parent)
        else:
            remove(plain / parent)
            (plain / parent).mkdir()
            set_last[parent] = Attributes(0o755)
    return True


def _make_room(node: Node, plain: Path) -> None:
    """Takes away what the node hides of the layers below."""
    path = plain / node.path
    if node.what is What.OPAQUE and _is_directory(path):
        for inner in path.iterdir():
            remove(inner)
    elif not (node.what is What.DIRECTORY and _is_directory(path)):
        remove(path)


def _make(node: Node, top: Path, target: str, is_layer: bool) -> None:
    path = top / node.path
    match node.what:
        case What.FILE:
            node.content.write(path)
            node.attributes.apply(path)
        case What.LINK:
            os.link(top / target, path)
        case What.SYMLINK:
            path.symlink_to("../a")
            node.attributes.apply(path)
        case What.FIFO:
            os.mkfifo(path)
            node.attributes.apply(path)
        case What.DEVICE:
            os.mknod(path, stat.S_IFCHR, os.makedev(1, 3))
            node.attributes.apply(path)
        case What.DIRECTORY | What.OPAQUE:
            path.mkdir(exist_ok=True)
            if is_layer and node.what is What.OPAQUE:
                os.setxattr(path, "trusted.overlay.opaque", b"y")
        case What.WHITEOUT:
            if is_layer:
                os.mknod(path, stat.S_IFCHR, 0)


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def remove(path: Path) -> None:
    """Whatever is there, if anything."""
    if _is_directory(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- what a container does


@dataclass(frozen=True, slots=True)
class Act:
    """One change to a tree, whatever tree it is: paths are counted among those that there are."""

    what: str
    which: int
    other: int
    content: Content
    attributes: Attributes
    name: str


Change = Callable[[Path], object]
Planned = tuple[Change, tuple[str, ...]]
"""What to do to a tree, and the paths whose times it changes."""


class NothingThere(Exception):
    """No path to which the act could be done."""


def perform(acts: Sequence[Act], merged: Path, plain: Path, clock: Iterator[int]) -> None:
    """Does the same to a mounted snapshot and to its model, which must answer alike."""
    for act in acts:
        try:
            change, touched = _PLANS[act.what](act, _Listing(plain))
        except NothingThere:
            continue
        result = _attempt(change, merged)
        if result == errno.EXDEV:  # overlay may say so of any rename or link
            continue
        expected = _attempt(change, plain)
        assert result == expected, f"{act} answers {_name(result)}, not {_name(expected)}"
        if result == 0:
            now_ns = next(clock)
            for top, path in itertools.product((merged, plain), touched):
                os.utime(top / path, ns=(now_ns, now_ns), follow_symlinks=False)


def clock() -> Iterator[int]:
    """Times that `perform` sets."""
    return itertools.count(EPOCH_NS + 10**12 + 7, 1_000_000_007)


def _attempt(change: Change, top: Path) -> int:
    try:
        change(top)
    except OSError as error:
        return error.errno or -1
    return 0


def _name(number: int) -> str:
    return errno.errorcode.get(number, "success")


class _Listing:
    """The paths of a tree by type, in an order that does not depend on the filesystem. They are asked for by any
    number, and raise NothingThere."""

    def __init__(self, top: Path) -> None:
        self._files: list[str] = []
        self._directories: list[str] = []
        self._others: list[str] = []
        for path in sorted(top.rglob("*")):
            mode = path.lstat().st_mode
            kind = self._files if stat.S_ISREG(mode) else self._directories if stat.S_ISDIR(mode) else self._others
            kind.append(str(path.relative_to(top)))

    def file(self, number: int) -> str:
        return _pick(self._files, number)

    def no_directory(self, number: int) -> str:
        return _pick([*self._files, *self._others], number)

    def no_symlink(self, number: int) -> str:
        return _pick([*self._files, *self._directories], number)

    def directory(self, number: int) -> str:
        """Perhaps the top."""
        return _pick([*self._directories, "."], number)

    def lower_directory(self, number: int) -> str:
        return _pick(self._directories, number)

    def any(self, number: int) -> str:
        return _pick([*self._files, *self._directories, *self._others], number)


def _pick(paths: Sequence[str], number: int) -> str:
    if not paths:
        raise NothingThere
    return paths[number % len(paths)]


def _parent(path: str) -> str:
    return str(PurePath(path).parent)


def _on_a_file(change: Callable[[Act, Path], object], touches: bool) -> Callable[[Act, _Listing], Planned]:
    def plan(act: Act, listing: _Listing) -> Planned:
        path = listing.file(act.which)
        return lambda top: change(act, top / path), (path,) if touches else ()

    return plan


def _write(act: Act, path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(act.other)
        stream.write(act.content.data())


def _append(act: Act, path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(act.content.data())


def _rewrite(act: Act, path: Path) -> None:
    with path.open("wb") as stream:
        stream.write(act.content.data())


def _truncate(act: Act, path: Path) -> None:
    os.truncate(path, act.content.size_bytes)


def _write_mapped(act: Act, path: Path) -> None:
    if path.stat().st_size:
        with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as memory:
            memory[act.other % len(memory)] = act.other & 0xFF
            memory.flush()


def _remove_xattrs(_act: Act, path: Path) -> None:
    for name in os.listxattr(path):
        if name.startswith(_OWN_ATTRIBUTES) and not name.startswith(TWINS):
            os.removexattr(path, name)


def _chmod(act: Act, listing: _Listing) -> Planned:
    path = listing.no_symlink(act.which)
    return lambda top: os.chmod(top / path, act.attributes.mode), ()


def _chown(act: Act, listing: _Listing) -> Planned:
    path, uid, gid = listing.any(act.which), act.attributes.uid, act.attributes.gid
    return lambda top: os.chown(top / path, uid, gid, follow_symlinks=False), ()


def _set_all(act: Act, listing: _Listing) -> Planned:
    path = listing.any(act.which)
    return lambda top: act.attributes.apply(top / path), ()


def _create(act: Act, listing: _Listing) -> Planned:
    directory = listing.directory(act.other)
    path = f"{directory}/{act.name}"
    return lambda top: act.content.write(top / path), (path, directory)


def _make_directory(act: Act, listing: _Listing) -> Planned:
    directory = listing.directory(act.other)
    path = f"{directory}/{act.name}"
    return lambda top: (top / path).mkdir(), (path, directory)


def _make_symlink(act: Act, listing: _Listing) -> Planned:
    directory = listing.directory(act.other)
    path = f"{directory}/{act.name}"
    return lambda top: (top / path).symlink_to("a"), (path, directory)


def _link(act: Act, listing: _Listing) -> Planned:
    path, directory = listing.no_directory(act.which), listing.directory(act.other)
    name = f"{directory}/{act.name}"
    return lambda top: os.link(top / path, top / name, follow_symlinks=False), (directory,)


def _rename(act: Act, listing: _Listing) -> Planned:
    path, directory = listing.any(act.which), listing.directory(act.other)
    name = f"{directory}/{act.name}"
    return lambda top: os.rename(top / path, top / name), (_parent(path), directory)


def _rename_over(act: Act, listing: _Listing) -> Planned:
    """As editors and package managers do."""
    path, other = listing.file(act.which), listing.file(act.other)
    return lambda top: os.rename(top / path, top / other), (_parent(path), _parent(other))


def _unlink(act: Act, listing: _Listing) -> Planned:
    path = listing.no_directory(act.which)
    return lambda top: (top / path).unlink(), (_parent(path),)


def _remove_directory(act: Act, listing: _Listing) -> Planned:
    path = listing.lower_directory(act.which)
    return lambda top: shutil.rmtree(top / path), (_parent(path),)


_PLANS: dict[str, Callable[[Act, _Listing], Planned]] = {
    "write": _on_a_file(_write, touches=True),
    "append": _on_a_file(_append, touches=True),
    "rewrite": _on_a_file(_rewrite, touches=True),
    "truncate": _on_a_file(_truncate, touches=True),
    "write mapped": _on_a_file(_write_mapped, touches=True),
    "remove xattrs": _on_a_file(_remove_xattrs, touches=False),
    "chmod": _chmod,
    "chown": _chown,
    "set all": _set_all,
    "create": _create,
    "mkdir": _make_directory,
    "symlink": _make_symlink,
    "link": _link,
    "rename": _rename,
    "rename over": _rename_over,
    "unlink": _unlink,
    "rmtree": _remove_directory,
}

acts = st.lists(
    st.builds(
        Act,
        what=st.sampled_from(list(_PLANS)),
        which=st.integers(0, 30),
        other=st.integers(0, 30) | st.sampled_from((4095, 4096, 69_999)),
        content=contents,
        attributes=attributes,
        name=st.sampled_from(_NAMES),
    ),
    min_size=1,
    max_size=8,
).map(tuple)


# -- the same by a plain random generator, for loads that go on for as long as somebody wants


def some_layer(choose: random.Random, seeds: int) -> tuple[Node, ...]:
    """Up to 16 entries. Half of the contents are among three that all have, the others have one of so many seeds."""
    paths = {os.path.join(choose.choice(_PLACES), choose.choice(_NAMES)) for _ in range(choose.randint(1, 16))}
    kinds = [What.FILE] * 10 + [What.LINK] * 2 + [what for what in What if what is not What.FILE]
    return tuple(
        Node(path, choose.choice(kinds), _some_attributes(choose), _some_content(choose, seeds), choose.randrange(8))
        for path in sorted(paths)
    )


def some_acts(choose: random.Random, seeds: int) -> tuple[Act, ...]:
    return tuple(
        Act(
            choose.choice(list(_PLANS)),
            choose.randrange(31),
            choose.choice((choose.randrange(31), 4095, 4096, 69_999)),
            _some_content(choose, seeds),
            _some_attributes(choose),
            choose.choice(_NAMES),
        )
        for _ in range(choose.randint(1, 8))
    )


def _some_content(choose: random.Random, seeds: int) -> Content:
    seed = choose.choice((choose.choice((0, 1, 1, 2)), choose.randrange(seeds)))
    return Content(seed, choose.choice(SIZES), choose.choice((0, 0, 0, 0, 300_000)))


def _some_attributes(choose: random.Random) -> Attributes:
    uid, gid = choose.choice(_OWNERS)
    return Attributes(choose.choice(_MODES), uid, gid, choose.choice(_TIMES_NS), choose.choice(_XATTRS))
