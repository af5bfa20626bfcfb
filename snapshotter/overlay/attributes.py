"""The extended attributes that overlayfs reads and writes (Documentation/filesystems/overlayfs.rst)."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from snapshotter.overlay.features import Feature

_DEAD = ("origin", "impure", "nlink", "uuid", "upper", "protattr")
_UNPACKED = ("opaque", "whiteout")
_LIVING = ("opaque", "whiteout", "redirect", "metacopy")
_ESCAPED = "overlay."

OURS = "trusted.dedup."
"""What the daemon marks files with that are about to be objects (content.stubs)."""


@dataclass(frozen=True, slots=True)
class Names:
    """overlay's attributes, under the prefix that its mounts use, and what a tree may have of them."""

    prefix: str
    dead: frozenset[str]
    """What the kernel writes into an upper for the mount that it is used by: once that is gone for good, these
    speak of nothing."""
    living: frozenset[str]
    """What a layer is read by."""
    foreign: tuple[str, ...] = ()
    """Other prefixes under which it may have nothing."""
    is_stripped: bool = False
    """Whether what it may not have is taken off. Otherwise it is refused."""

    def of_the_lowest_layer(self) -> Names:
        """There `opaque` hides nothing, and only shows to who reads the layer without an overlay."""
        return replace(self, dead=self.dead | {self.prefix + "opaque"})

    def of_an_image(self, is_stripped: bool) -> Names:
        """A stranger made it, and no kernel wrote it: it may hide what is below it, and nothing else. Whoever mounts
        its files under the other prefix must not be misled either."""
        living = frozenset(self.prefix + name for name in _UNPACKED)
        foreign = tuple({TRUSTED.prefix, USER.prefix, OURS} - {self.prefix})
        return replace(self, living=living, foreign=foreign, is_stripped=is_stripped)

    def of_a_mount(self, features: Feature) -> Names:
        """Of one with some features the kernel wrote it. What it does not write there is not stripped: were it the
        kernel's after all, files would be left without their data."""
        lacking = set()
        if Feature.METACOPY not in features:
            lacking.add(self.metacopy)
        if not features & (Feature.METACOPY | Feature.REDIRECT_DIR):
            lacking.add(self.redirect)
        return replace(self, living=self.living - lacking)

    @property
    def metacopy(self) -> str:
        return self.prefix + "metacopy"

    @property
    def redirect(self) -> str:
        return self.prefix + "redirect"

    def is_untrusted(self, name: str) -> bool:
        """Whether overlay, or we, would obey it, and a tree like this one cannot have it. Escaped ones, a nested
        overlay's, are data; so are those under a prefix that is not foreign."""
        prefix = next((prefix for prefix in (self.prefix, *self.foreign) if name.startswith(prefix)), None)
        if prefix is None or name.startswith(prefix + _ESCAPED):
            return False
        return name not in self.dead and name not in self.living


def _names(prefix: str) -> Names:
    dead, living = (frozenset(prefix + name for name in names) for names in (_DEAD, _LIVING))
    return Names(prefix, dead, living)


TRUSTED = _names("trusted.overlay.")
USER = _names("user.overlay.")
"""Of mounts with the option userxattr."""

_OBEYED = {*TRUSTED.dead, *TRUSTED.living, *USER.dead, *USER.living, OURS + "blake3"}

_UNSUPPORTED = {errno.ENOTSUP, errno.ENODATA, errno.EPERM, errno.EINVAL}


def by_name(directory_fd: int, name: bytes) -> bytes:
    """A path for the xattr calls, which take no directory descriptor, whatever the entry's type and depth."""
    return b"/proc/self/fd/%d/%s" % (directory_fd, name)


def list_attributes(place: int | bytes) -> list[str]:
    """The names of the attributes of an open file, or of a path, not following it. Raises OSError.

    On XFS and btrfs there can be more than the kernel lists (E2BIG: 64 KiB, listxattr(2)); then those that overlay or
    we would obey.
    """
    try:
        return os.listxattr(place) if isinstance(place, int) else os.listxattr(place, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.E2BIG:
            raise
    return [name for name in sorted(_OBEYED) if _has(place, name)]


def _has(place: int | bytes, name: str) -> bool:
    try:
        os.getxattr(place, name) if isinstance(place, int) else os.getxattr(place, name, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return False
    return True


def remove_attribute(place: int | bytes, name: str) -> None:
    """From an open file, or a path, not following it. Raises OSError."""
    if isinstance(place, int):
        os.removexattr(place, name)
    else:
        os.removexattr(place, name, follow_symlinks=False)


def strip_dead(path: bytes, names: Names) -> bool:
    """Removes the dead attributes from a path, not following it; True if there were any."""
    found = names.dead.intersection(list_attributes(path))
    for name in found:
        os.removexattr(path, name, follow_symlinks=False)
    return bool(found)


def living_attributes(path: bytes, names: Names) -> dict[str, bytes]:
    """All extended attributes of a path but overlay's dead ones, not following it. Raises OSError."""
    found = {}
    for name in os.listxattr(path, follow_symlinks=False):
        if name not in names.dead:
            try:
                found[name] = os.getxattr(path, name, follow_symlinks=False)
            except OSError as error:
                if error.errno != errno.ENODATA:  # gone meanwhile
                    raise
    return found


def set_attributes(path: bytes, attributes: Mapping[str, bytes]) -> None:
    """Sets extended attributes of a path, not following it. Raises OSError."""
    for name, value in attributes.items():
        os.setxattr(path, name, value, follow_symlinks=False)


def copy_attributes(source_fd: int, target_fd: int, names: Names) -> None:
    """Copies all extended attributes but overlay's own, ACLs (system.posix_acl_*) and escaped ones among them.

    Left out without an error is what the target's filesystem or security module does not take.
    """
    for name in os.listxattr(source_fd):
        if name.startswith(names.prefix) and not name.startswith(names.prefix + _ESCAPED):
            continue
        try:
            os.setxattr(target_fd, name, os.getxattr(source_fd, name))
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
