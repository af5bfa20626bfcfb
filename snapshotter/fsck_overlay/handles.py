"""The file handles that overlayfs stores in attributes and in names of index entries.

    struct ovl_fb      version, magic 0xfb, length, flags, type (a byte each), UUID of the filesystem (16), the handle

Source: fs/overlayfs/overlayfs.h, and ovl_check_fb_len, ovl_decode_real_fh in namei.c.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from snapshotter import linux
from snapshotter.fsck_overlay.layers import Layer

_MAGIC = 0xFB
_HEADER = struct.Struct("BBBBB16s")
_BIG_ENDIAN, _ANY_ENDIAN, _PATH_UPPER = 1, 2, 4
_CPU_ENDIAN = _BIG_ENDIAN if sys.byteorder == "big" else 0
_NO_UUID = bytes(16)
_STALE = {errno.ESTALE, errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP, errno.ENODATA, errno.EOVERFLOW}


class Malformed(Exception):
    """Not a handle of overlayfs."""


class FromTheFuture(Exception):
    """A handle of a later version than we know, or with flags that we do not know."""


class CannotDecode(Exception):
    """We may not open files by handle (no CAP_DAC_READ_SEARCH)."""


@dataclass(frozen=True, slots=True)
class Handle:
    raw: bytes
    flags: int
    type: int
    uuid: bytes
    """All zero where unknown."""
    fid: bytes

    @property
    def is_of_upper(self) -> bool:
        return bool(self.flags & _PATH_UPPER)

    @property
    def is_readable(self) -> bool:
        """Whether it was written in this machine's byte order."""
        return bool(self.flags & _ANY_ENDIAN) or self.flags & _BIG_ENDIAN == _CPU_ENDIAN

    def leads_to(self, layer: Layer, directory_fd: int) -> bool:
        """Whether it is the handle of an open directory of `layer`."""
        return self._may_be_on(layer) and _encode(directory_fd) == (self.type, self.fid)

    def status(self, layers: Sequence[Layer]) -> os.stat_result | None:
        """The inode behind it, on the filesystem of any of the layers, as the kernel looks for it; None if none has it.

        Raises CannotDecode.
        """
        for layer in layers:
            if not self._may_be_on(layer):
                continue
            try:
                fd = linux.open_by_handle_at(layer.fd, self.type, self.fid, os.O_PATH | os.O_CLOEXEC)
            except PermissionError:
                raise CannotDecode from None
            except OSError as error:
                if error.errno in _STALE:
                    continue
                raise
            try:
                return os.fstat(fd)
            finally:
                os.close(fd)
        return None

    def _may_be_on(self, layer: Layer) -> bool:
        return self.uuid == _NO_UUID or layer.uuid in (None, self.uuid)


def parse(raw: bytes) -> Handle:
    """Raises Malformed or FromTheFuture."""
    if len(raw) <= _HEADER.size:
        raise Malformed
    version, magic, length, flags, type_, uuid = _HEADER.unpack_from(raw)
    if magic != _MAGIC or length > len(raw) or length <= _HEADER.size:
        raise Malformed
    if version or flags & ~(_BIG_ENDIAN | _ANY_ENDIAN | _PATH_UPPER):
        raise FromTheFuture
    return Handle(raw[:length], flags, type_, uuid, raw[_HEADER.size : length])


def of_directory(layer: Layer, directory_fd: int, of_upper: bool) -> bytes | None:
    """What overlayfs would store for an open directory; None where its filesystem has no handles."""
    encoded = _encode(directory_fd)
    if encoded is None:
        return None
    type_, fid = encoded
    flags = _CPU_ENDIAN | (_PATH_UPPER if of_upper else 0)
    length = _HEADER.size + len(fid)
    return _HEADER.pack(0, _MAGIC, length, flags, type_, layer.uuid or _NO_UUID) + fid


def _encode(fd: int) -> tuple[int, bytes] | None:
    try:
        return linux.name_to_handle_at(fd)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EOVERFLOW):
            return None
        raise
