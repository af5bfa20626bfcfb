"""Strategy "stub": the tree keeps the metadata, an object the content.

A stub is a sparse file of the true size with the file's own mode, owner, times, attributes and hard links. Two
attributes make overlay read the content elsewhere: metacopy, and redirect with a path in the data-only layer of
the mount, which is the object store (Documentation/filesystems/overlayfs.rst, "Data-only lower layers").
The path has at most 24 bytes: with more, the attributes would leave a 256-byte inode of ext4 and take a block.

The kernel follows that path through the layers below the stub's own first, and gives up (EIO) on a directory that it
meets in one. So a file whose object is in /xx is left alone where a layer below has an /xx of its own.

An object carries its whole hash in an attribute, since its name holds only the first 80 bits.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Mapping

from snapshotter import failpoint
from snapshotter.content.files import File, HalfSwapped, Private, Stage
from snapshotter.content.objects import Adopted, Locator, Objects, Wanted
from snapshotter.overlay.attributes import OURS, TRUSTED, by_name

DIGEST = OURS + "blake3"
_STEM_CHARS = 18
_REF = re.compile(r"[0-9a-f]{2}([0-9a-f]|~)[0-9a-f]{17}(\.[0-9a-f]+)?")


class Stubs:
    """Makes stubs in one layer."""

    def __init__(
        self, objects: Objects, refs_fd: int, stage: Stage, tops_below: frozenset[str], is_resumed: bool
    ) -> None:
        """`tops_below`: what the root directories of the layers below hold. `is_resumed`: a run that was killed may
        have left its mark on files."""
        self._objects = objects
        self._refs_fd = refs_fd
        self._stage = stage
        self._tops_below = tops_below
        self._is_resumed = is_resumed

    def locate(self, file: File) -> Locator:
        """Where its object would be."""
        return locator_of_digest(file.digest)

    def share(self, file: File) -> Adopted:
        """Raises Private, OSError, objects.TooManyLinks: the file is as it was then; and HalfSwapped."""
        attributes = dict(file.attributes)
        if DIGEST in attributes and not (self._is_resumed and attributes.pop(DIGEST) == file.digest):
            raise Private(f"has an attribute {DIGEST} of its own")
        locator = locator_of_digest(file.digest)
        if locator.shard in self._tops_below:
            raise Private("a lower layer has the name of its object's directory")
        name = self._stage.new_name()
        # Before the object: what may want space comes first.
        self._make(name, file, attributes, _path(locator.shard, locator.stem))
        try:
            with self._objects.locked(locator.shard):
                return self._replace(file, name, locator)
        except HalfSwapped:
            raise  # there are names of the stub
        except BaseException:
            os.unlink(name, dir_fd=self._stage.fd)
            self._clean(file)
            raise

    def _replace(self, file: File, stub: bytes, locator: Locator) -> Adopted:
        adopted = self._objects.adopt(self._wanted(file, locator), file.fd, self._refs_fd)
        try:
            if adopted.name != locator.stem:
                os.setxattr(by_name(self._stage.fd, stub), TRUSTED.redirect, _path(adopted.shard, adopted.name))
            failpoint.hit("share.before-swap")
            if len(file.places) == 1:
                self._stage.move(stub, file.places[0], keep_old=not adopted.is_new)
                return adopted
            self._stage.put(self._stage.fd, stub, file, keep_old=not adopted.is_new)
        except HalfSwapped:
            raise  # there are stubs that need the object
        except BaseException:
            self._objects.forget(adopted, self._refs_fd, len(file.places))
            raise
        os.unlink(stub, dir_fd=self._stage.fd)
        return adopted

    def _wanted(self, file: File, locator: Locator) -> Wanted:
        def is_wanted(directory_fd: int, name: str) -> bool:
            return os.getxattr(by_name(directory_fd, name.encode()), DIGEST) == file.digest

        def mark(fd: int) -> None:
            os.setxattr(fd, DIGEST, file.digest)

        return Wanted(locator, is_wanted, mark, may_repeat=True)

    def _clean(self, file: File) -> None:
        """Takes off the mark of an object that the file did not become."""
        if os.fstat(file.fd).st_nlink == len(file.places):
            remove_mark(file.fd)

    def _make(self, name: bytes, file: File, attributes: dict[str, bytes], path: bytes) -> None:
        """Owner before mode and attributes, since chown takes some of both away; times last."""
        status = file.status
        mode = stat.S_IMODE(status.st_mode)
        fd = os.open(
            name,
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC,
            mode,
            dir_fd=self._stage.fd,
        )
        try:
            os.truncate(fd, status.st_size)
            # The directory may have given it another group (mount(8), grpid).
            os.fchown(fd, status.st_uid, status.st_gid)
            os.fchmod(fd, mode)
            for key, value in attributes.items():
                os.setxattr(fd, key, value)
            # Behind the file's own, whose order shows where they do not fit into the inode.
            os.setxattr(fd, TRUSTED.metacopy, b"")
            os.setxattr(fd, TRUSTED.redirect, path)
            os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
        except BaseException:
            os.unlink(name, dir_fd=self._stage.fd)
            raise
        finally:
            os.close(fd)


def remove_mark(fd: int) -> None:
    """That a file was about to become an object. Raises OSError."""
    try:
        os.removexattr(fd, DIGEST)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise


def ref_of(attributes: Mapping[str, bytes]) -> str | None:
    """The ref of the object of a stub; None of what is no stub."""
    parts = attributes.get(TRUSTED.redirect, b"").split(b"/")
    if TRUSTED.metacopy not in attributes or len(parts) != 3 or parts[0]:
        return None
    return os.fsdecode(parts[1] + parts[2])


def is_stub_ref(ref: str) -> bool:
    """Whether a ref names a content, and not a whole file (links.py)."""
    return _REF.fullmatch(ref) is not None


def locator_of_digest(digest: bytes) -> Locator:
    """Where the object with this content would be."""
    text = digest.hex()
    return Locator(text[:2], text[2 : 2 + _STEM_CHARS])


def _path(shard: str, name: str) -> bytes:
    return f"/{shard}/{name}".encode()
