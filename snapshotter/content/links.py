"""Strategy "hardlink": the file in the tree is the object itself.

Only files with equal content and metadata can be one inode, and a chain may use an inode once: with index=on
the kernel keeps hard links together across copy-up, so two paths that dedup made one inode would become one file
with the first write. Where a chain needs the same file again, it gets another instance of the object, with
shared extents where the filesystem can.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from blake3 import blake3

from snapshotter import failpoint, linux
from snapshotter.content.files import File, HalfSwapped, Private, Stage
from snapshotter.content.objects import Adopted, Locator, Objects, Wanted

_TEXT = struct.Struct("<I")


class Links:
    """Makes hard links in one layer."""

    def __init__(
        self,
        objects: Objects,
        refs_fd: int,
        stage: Stage,
        used: frozenset[str],
        never: Sequence[str],
        reflink: bool,
    ) -> None:
        """`used`: the refs of the layers below. `never`: globs of paths that are not shared, nor what is below them."""
        self._objects = objects
        self._refs_fd = refs_fd
        self._stage = stage
        self._used = used
        self._never = [glob.strip("/").split("/") for glob in never]
        # What each begins with before its first wildcard: for most paths this is all that there is to look at.
        self._never_begin = tuple(os.fsencode(re.split(r"[*?[]", glob.strip("/"))[0]) for glob in never)
        self._reflink = reflink

    def locate(self, file: File) -> Locator:
        """Where its object would be."""
        return locator_of_file(file)

    def share(self, file: File) -> Adopted:
        """Raises Private, OSError, objects.TooManyLinks; the file is as it was then."""
        if any(place.path.startswith(self._never_begin) and self._is_never_shared(place.path) for place in file.places):
            raise Private("listed in never_link")
        wanted = Wanted(
            locator_of_file(file), _has_metadata_of(file), lambda _fd: None, may_repeat=False, spared=self._used
        )
        while True:
            with self._objects.locked(wanted.locator.shard):
                adopted = self._objects.adopt(wanted, file.fd, self._refs_fd)
                try:
                    self._replace(file, adopted)
                    return adopted
                except HalfSwapped:
                    raise  # there are names of the object
                except OSError as error:
                    self._objects.forget(adopted, self._refs_fd, len(file.places))
                    if error.errno != errno.EMLINK:
                        raise
            wanted = wanted._replace(spared=wanted.spared | {adopted.ref})

    def _replace(self, file: File, adopted: Adopted) -> None:
        failpoint.hit("share.before-swap")
        if not adopted.is_new:
            self._stage.put(self._refs_fd, adopted.ref, file, keep_old=True)
        elif adopted.instance and self._reflink:
            self._share_extents(file, adopted)

    def _is_never_shared(self, path: bytes) -> bool:
        parts = os.fsdecode(path).split("/")
        return any(_matches(parts, glob) for glob in self._never)

    def _share_extents(self, file: File, adopted: Adopted) -> None:
        """With the first instance, if it is there; nothing is lost where the kernel will not."""
        first = adopted.name.partition(".")[0]
        try:
            source = os.open(
                first, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._objects.shard_fd(adopted.shard)
            )
        except OSError:
            return
        try:
            linux.dedupe_range(source, file.fd, file.status.st_size)
        except OSError:
            return
        finally:
            os.close(source)


def _matches(path: list[str], glob: list[str]) -> bool:
    """Whether the glob names the path or a directory above it; its wildcards match no slash."""
    return len(glob) <= len(path) and all(map(fnmatchcase, path, glob))


def locator_of_file(file: File) -> Locator:
    """The whole hash of all that has to be equal."""
    status = file.status
    numbers = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns, status.st_size
    return locator_of(file.digest, numbers, file.attributes)


def locator_of(digest: bytes, numbers: Iterable[int], attributes: Mapping[str, bytes]) -> Locator:
    """Of a file that may be elsewhere. `numbers`: mode without the type, owner, group, mtime in ns, size in bytes."""
    hashed = blake3(digest)
    hashed.update(" ".join(map(str, numbers)).encode() + b"\0")
    for key, value in sorted(attributes.items()):
        for part in (key.encode(errors="surrogateescape"), value):
            hashed.update(_TEXT.pack(len(part)))
            hashed.update(part)
    whole = hashed.digest()
    return Locator(f"{whole[0]:02x}", urlsafe_b64encode(whole[1:]).decode().rstrip("="))


def _has_metadata_of(file: File) -> Callable[[int, str], bool]:
    ours = _metadata(file.status)
    return lambda directory_fd, name: _metadata(os.stat(name, dir_fd=directory_fd, follow_symlinks=False)) == ours


def _metadata(status: os.stat_result) -> tuple[int, ...]:
    """What is cheap to compare, lest somebody changed an object by hand."""
    return status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_size
