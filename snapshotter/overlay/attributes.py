"""The extended attributes that overlayfs reads and writes (Documentation/filesystems/overlayfs.rst)."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

_DEAD = ("origin", "impure", "nlink", "uuid", "upper", "protattr")
_UNPACKED = ("opaque", "whiteout")
_LIVING = ("opaque", "whiteout", "redirect", "metacopy")


@dataclass(frozen=True, slots=True)
class Names:
    """overlay's attributes, under the prefix that its mounts use. Under the other one they are anybody's data."""

    prefix: str
    dead: frozenset[str]
    """What the kernel writes into an upper for the mount that it is used by: once that is gone for good, these
    speak of nothing."""
    living: frozenset[str]
    """What a layer is read by."""

    def of_the_lowest_layer(self) -> Names:
        """There `opaque` hides nothing, and only shows to who reads the layer without an overlay."""
        return replace(self, dead=self.dead | {self.prefix + "opaque"})

    def of_an_unpacked_layer(self) -> Names:
        """There nobody but the kernel could have meant the others, and it never mounted the layer's upper."""
        return replace(self, living=frozenset(self.prefix + name for name in _UNPACKED))

    @property
    def metacopy(self) -> str:
        return self.prefix + "metacopy"

    @property
    def redirect(self) -> str:
        return self.prefix + "redirect"

    def is_unknown(self, name: str) -> bool:
        """Whether it is overlay's, and not one whose meaning we know; escaped ones (a nested overlay's) are data."""
        ours = name.startswith(self.prefix) and not name.startswith(self.prefix + "overlay.")
        return ours and name not in self.dead and name not in self.living


def _names(prefix: str) -> Names:
    dead, living = (frozenset(prefix + name for name in names) for names in (_DEAD, _LIVING))
    return Names(prefix, dead, living)


TRUSTED = _names("trusted.overlay.")
USER = _names("user.overlay.")
"""Of mounts with the option userxattr."""

_UNSUPPORTED = {errno.ENOTSUP, errno.ENODATA, errno.EPERM, errno.EINVAL}


def by_name(directory_fd: int, name: bytes) -> bytes:
    """A path for the xattr calls, which take no directory descriptor, whatever the entry's type and depth."""
    return b"/proc/self/fd/%d/%s" % (directory_fd, name)


def strip_dead(path: bytes, names: Names) -> bool:
    """Removes the dead attributes from a path, not following it; True if there were any."""
    found = names.dead.intersection(os.listxattr(path, follow_symlinks=False))
    for name in found:
        os.removexattr(path, name, follow_symlinks=False)
    return bool(found)


def living_attributes(path: bytes, names: Names) -> dict[str, bytes]:
    """All extended attributes of a path but overlay's dead ones, not following it. Raises OSError."""
    found = os.listxattr(path, follow_symlinks=False)
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in found if name not in names.dead}


def set_attributes(path: bytes, attributes: Mapping[str, bytes]) -> None:
    """Sets extended attributes of a path, not following it. Raises OSError."""
    for name, value in attributes.items():
        os.setxattr(path, name, value, follow_symlinks=False)


def copy_attributes(source_fd: int, target_fd: int, names: Names) -> None:
    """Copies all extended attributes but overlay's own, ACLs (system.posix_acl_*) among them.

    Left out without an error is what the target's filesystem or security module does not take.
    """
    for name in os.listxattr(source_fd):
        if name.startswith(names.prefix):
            continue
        try:
            os.setxattr(target_fd, name, os.getxattr(source_fd, name))
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
