"""System calls that Python's library lacks, under their kernel names.

Each function is one call: it raises OSError with the path, and decides nothing.
Sources: mount(2), umount2(2), ioctl_iflags(2), and the kernel headers named beside the constants.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [
    ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p,
]  # fmt: skip
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.renameat2.argtypes = [
    ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint,
]  # fmt: skip
_libc.syscall.restype = ctypes.c_long
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_libc.opendir.restype = ctypes.c_void_p
_libc.readdir.argtypes = _libc.closedir.argtypes = [ctypes.c_void_p]

# <sys/mount.h>
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

SYNC_FILE_RANGE_WRITE = 2
RENAME_EXCHANGE = 2
_FALLOC_FL_KEEP_SIZE = 1
FICLONE = 0x40049409
FIDEDUPERANGE = 0xC0189436

MOUNT_DATA_BYTES = 4096
"""mount(2) takes one page of options, the final NUL included, and silently cuts what is longer."""

MS_PRIVATE = 1 << 18
CLONE_NEWNS = 0x20000  # <linux/sched.h>
_FILE_HANDLE = struct.Struct("=Ii")  # struct file_handle: handle_bytes, handle_type; then the bytes
_HANDLE_BYTES = 128  # MAX_HANDLE_SZ, <linux/exportfs.h>
_FS_IOC_GETFSUUID = 0x80111500  # <linux/fs.h>

# What is newer than Linux 5.1 has the same numbers on all architectures (asm-generic/unistd.h).
_OPEN_TREE = 428
_MOVE_MOUNT = 429
_FSOPEN = 430
_FSCONFIG = 431
_FSMOUNT = 432
_OPENAT2 = 437
_MOUNT_SETATTR = 442

# <linux/mount.h>
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
FSCONFIG_STRING_BYTES = 255
"""Longest string that fsconfig(2) takes (EINVAL)."""
_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_AT_FDCWD = -100
MOUNT_ATTR_RDONLY = 1
_MOUNT_ATTR_IDMAP = 0x00100000
_OPEN_TREE_CLONE = 1
_AT_EMPTY_PATH = 0x1000

# <linux/openat2.h>
_RESOLVE_NO_XDEV = 1
_RESOLVE_NO_SYMLINKS = 4
_RESOLVE_BENEATH = 8

_M_MMAP_THRESHOLD = -3  # <malloc.h>

# <linux/fs.h>
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IMMUTABLE_FL = 0x10
FS_APPEND_FL = 0x20


def mount(source: str, target: str, fstype: str | None, flags: int, data: str | None) -> None:
    """mount(2). Raises ValueError for options that the kernel would cut instead of refusing."""
    raw = None if data is None else os.fsencode(data)
    if raw is not None and len(raw) >= MOUNT_DATA_BYTES:
        raise ValueError(f"{len(raw)} bytes of mount options; mount(2) takes {MOUNT_DATA_BYTES - 1}")
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            None if fstype is None else fstype.encode(),
            flags,
            raw,
        ),
        target,
    )


def umount2(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def fsopen(fstype: str) -> int:
    """fsopen(2): a descriptor that collects the options of a new superblock."""
    return _syscall(_FSOPEN, fstype, fstype.encode(), _FSOPEN_CLOEXEC)


def fsconfig(fs_fd: int, command: int, key: str | None = None, value: str | None = None) -> None:
    """fsconfig(2)."""
    raw_key = None if key is None else key.encode()
    raw_value = None if value is None else os.fsencode(value)
    _syscall(_FSCONFIG, f"{key}={value}", fs_fd, command, raw_key, raw_value, 0)


def fsmount(fs_fd: int, attributes: int) -> int:
    """fsmount(2): a descriptor of the new mount, attached nowhere yet."""
    return _syscall(_FSMOUNT, "", fs_fd, _FSMOUNT_CLOEXEC, attributes)


def move_mount(mount_fd: int, target: str) -> None:
    """move_mount(2): attaches a mount at a path."""
    raw = os.fsencode(target)
    _syscall(_MOVE_MOUNT, target, mount_fd, b"", _AT_FDCWD, raw, _MOVE_MOUNT_F_EMPTY_PATH)


def open_tree_clone(path: str) -> int:
    """open_tree(2): a descriptor of a copy of the mount at `path`, attached nowhere."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    return _syscall(_OPEN_TREE, path, _AT_FDCWD, os.fsencode(path), flags)


def mount_setattr_idmap(mount_fd: int, namespace_fd: int) -> None:
    """mount_setattr(2): maps the owners that a detached mount shows as a user namespace says."""
    attributes = struct.pack("QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, namespace_fd)
    _syscall(_MOUNT_SETATTR, "", mount_fd, b"", _AT_EMPTY_PATH, attributes, len(attributes))


def filesystem_messages(fs_fd: int) -> list[str]:
    """What the kernel has to say of a failed fsconfig or fsmount, one message a read (fsopen(2))."""
    messages = []
    while True:
        try:
            messages.append(os.read(fs_fd, 4096).decode(errors="replace").strip())
        except OSError:
            return messages


def sync_file_range_start(fd: int) -> None:
    """sync_file_range(2) over the whole file: starts writing dirty pages, promises nothing.

    Errors are left to the fsync that has to follow; directories and some filesystems refuse it.
    """
    _libc.sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE)


def fallocate_keep_size(fd: int, offset: int, length: int) -> None:
    """fallocate(2) with FALLOC_FL_KEEP_SIZE: blocks, wherever there are none yet, for a range that may lie behind the
    file's end."""
    if _libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def syncfs(fd: int) -> None:
    """syncfs(2): writes all that is dirty in the filesystem of an open file."""
    if _libc.syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def open_by_handle_at(mount_fd: int, handle_type: int, handle: bytes, flags: int) -> int:
    """open_by_handle_at(2): a descriptor of the inode behind a file handle, in the filesystem of `mount_fd`."""
    argument = ctypes.create_string_buffer(_FILE_HANDLE.pack(len(handle), handle_type) + handle)
    fd = int(_libc.open_by_handle_at(mount_fd, argument, flags))
    _check(min(fd, 0), handle.hex())
    return fd


def name_to_handle_at(fd: int) -> tuple[int, bytes]:
    """name_to_handle_at(2): type and bytes of the handle of an open file (O_PATH will do)."""
    answer = ctypes.create_string_buffer(_FILE_HANDLE.pack(_HANDLE_BYTES, 0) + bytes(_HANDLE_BYTES))
    mount_id = ctypes.c_int()
    result = _libc.name_to_handle_at(fd, b"", answer, ctypes.byref(mount_id), _AT_EMPTY_PATH)
    _check(result, "name_to_handle_at")
    length, handle_type = _FILE_HANDLE.unpack_from(answer)
    return handle_type, answer.raw[_FILE_HANDLE.size : _FILE_HANDLE.size + length]


def filesystem_uuid(fd: int) -> bytes | None:
    """FS_IOC_GETFSUUID: the UUID of a file's filesystem; None where there is none, or before Linux 6.9."""
    try:
        length, *uuid = fcntl.ioctl(fd, _FS_IOC_GETFSUUID, bytes(17))
    except OSError:
        return None
    return bytes(uuid) if length == 16 else None


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(flags), "unshare")


def open_beneath(directory_fd: int, path: str | bytes, flags: int) -> int:
    """openat2(2), which Linux has since 5.6. Raises OSError: ELOOP where any part of the path is a symlink, EXDEV where
    it leaves the directory or meets a mount, be it of the same filesystem."""
    resolve = _RESOLVE_NO_XDEV | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH
    how = struct.pack("QQQ", flags, 0, resolve)
    fd = int(_libc.syscall(ctypes.c_long(_OPENAT2), directory_fd, os.fsencode(path), how, ctypes.c_size_t(len(how))))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(path))
    return fd


def renameat2(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int) -> None:
    """renameat2(2)."""
    if _libc.renameat2(old_fd, old, new_fd, new, flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(old))


def dedupe_range(source_fd: int, target_fd: int, size_bytes: int) -> None:
    """ioctl_fideduperange(2): shares the extents of equal files. Raises OSError where the filesystem cannot."""
    at = 0
    while at < size_bytes:
        # struct file_dedupe_range with one struct file_dedupe_range_info
        request = struct.pack("QQHHI", at, size_bytes - at, 1, 0, 0) + struct.pack("qQQiI", target_fd, at, 0, 0, 0)
        answer = fcntl.ioctl(source_fd, FIDEDUPERANGE, request)
        _, _, deduped_bytes, status, _ = struct.unpack_from("qQQiI", answer, 24)
        if status != 0 or not deduped_bytes:
            raise OSError(-status if status < 0 else errno.EINVAL, "files differ or cannot share extents")
        at += deduped_bytes


class _Dirent(ctypes.Structure):
    """struct dirent of readdir(3), where off_t and ino_t have 64 bits."""

    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
    )


_libc.readdir.restype = ctypes.POINTER(_Dirent)


def type_of_first_entry(directory: str) -> int:
    """readdir(3): d_type of an entry, "." at least. os.scandir asks stat(2) where the filesystem does not know."""
    stream = _libc.opendir(os.fsencode(directory))
    _check(0 if stream else -1, directory)
    try:
        entry = _libc.readdir(stream)
        _check(0 if entry else -1, directory)
        return int(entry.contents.d_type)
    finally:
        _libc.closedir(stream)


def get_inode_flags(fd: int) -> int:
    """The inode flags (chattr(1)) of an open file or directory: FS_IOC_GETFLAGS."""
    return int(struct.unpack("l", fcntl.ioctl(fd, FS_IOC_GETFLAGS, struct.pack("l", 0)))[0])


def set_inode_flags(fd: int, flags: int) -> None:
    """FS_IOC_SETFLAGS."""
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", flags))


def give_back_large_blocks() -> None:
    """mallopt(3): memory blocks of 128 KiB and more go back to the system when they are freed, always.

    By default glibc raises that limit to what was freed last, up to 32 MiB: a few large requests, and 100 MB are kept.
    """
    if hasattr(_libc, "mallopt"):  # musl has none, and needs none
        _libc.mallopt(_M_MMAP_THRESHOLD, 128 * 1024)


def _check(result: int, path: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def _syscall(number: int, what: str, *arguments: int | bytes | None) -> int:
    converted = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *converted))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), what)
    return result
