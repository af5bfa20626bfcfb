"""The root directory: who owns it, and where each thing in it is.

    <root>/                 0700
      lock                  flock'ed by the daemon; holds its pid
      metadata/             the LMDB environment
      snapshots/<id>/fs     upper of an active snapshot, tree of a layer
      snapshots/<id>/work   overlay work directory, gone once committed
      snapshots/<id>/refs   hard links to the objects that the layer uses
      snapshots/<id>/seal   what sealing the layer has to know, and works in; gone once sealed
      objects/xx/NAME       the object store (content.objects)
      mounts/<id>           where the daemon mounts an active snapshot or a view
      busy/<id>.*           trees that left the metadata while an overlay somewhere still used them
      empty/                the lower of active snapshots without a parent; never made anew, since an
                            upper with an index mounts only on the very lower that it was made on
      trash/                renamed here, deleted in the background
      spool/                unnamed temporary files (answers on their way to slow clients) and trial mounts:
                            nothing that outlives the process
      lost+found/           what a repair took out of its place (fsck.lost)
      memory/               where a tmpfs is mounted for trials while the disk is full

A view that has a parent owns nothing here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from pathlib import Path

import structlog

from snapshotter import linux, mountinfo, place
from snapshotter.durable import remove_tree, sync_directory
from snapshotter.errors import NO_SPACE, FailedPrecondition, InvalidArgument, PermissionDenied, from_os_error, quote
from snapshotter.model import SnapshotId

log = structlog.get_logger()

_DIRECTORIES = ("metadata", "snapshots", "objects", "mounts", "busy", "empty", "trash", "spool", "memory")
_WORKERS_END_S = 1.0
_FOREIGN = "lost+found"
SHARDS_OF_OBJECTS = frozenset(f"{number:02x}" for number in range(256))
"""Directories of the object store, by the first byte of a hash."""
_UNSAFE = ":,\\\n\r\t \"'"


class Root:
    """Paths below an existing root."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = path / "metadata"
        self.snapshots = path / "snapshots"
        self.objects = path / "objects"
        self.mounts = path / "mounts"
        self.busy = path / "busy"
        self.empty = path / "empty"
        self.trash = path / "trash"
        self.spool = path / "spool"
        self.memory = path / "memory"

    def directory(self, snapshot_id: SnapshotId) -> Path:
        return self.snapshots / str(snapshot_id)

    def fs(self, snapshot_id: SnapshotId) -> Path:
        return self.snapshots / str(snapshot_id) / "fs"

    def refs(self, snapshot_id: SnapshotId) -> Path:
        return self.snapshots / str(snapshot_id) / "refs"

    def seal(self, snapshot_id: SnapshotId) -> Path:
        return self.snapshots / str(snapshot_id) / "seal"

    def mountpoint(self, snapshot_id: SnapshotId) -> Path:
        return self.mounts / str(snapshot_id)

    def work(self, snapshot_id: SnapshotId) -> Path:
        return self.snapshots / str(snapshot_id) / "work"


class RootLock:
    """Holds a root for this process: one daemon, or one offline tool, owns it. `release` it."""

    def __init__(self, path: Path) -> None:
        """Raises FailedPrecondition, naming the owner, when another process holds the lock."""
        self._fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _lock(self._fd)
        except BlockingIOError as error:
            owner = os.pread(self._fd, 64, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise FailedPrecondition(
                f"root {path} is in use by the containerd-dedup-grpc with pid {owner}; stop that one first"
            ) from error
        os.ftruncate(self._fd, 0)
        try:
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            if error.errno not in NO_SPACE:  # the lock holds, and only a message wants the number
                raise

    def fileno(self) -> int:
        """The lock lasts as long as any process has this open."""
        return self._fd

    def release(self) -> None:
        os.close(self._fd)


def _lock(fd: int) -> None:
    """Waits a moment for the worker processes of a daemon that was killed. Raises BlockingIOError."""
    deadline_s = time.monotonic() + _WORKERS_END_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)


def claim(path: Path) -> tuple[Root, RootLock]:
    """Makes or adopts the root at an absolute path and locks it; symbolic links on the way are followed.

    Raises InvalidArgument for a path that overlay options cannot hold, FailedPrecondition for a
    directory that is somebody else's, damaged or locked, or on a filesystem that cannot hold it, PermissionDenied
    unless it is ours and nobody else can replace it; then nothing has changed.
    """
    _check_absolute(path)
    path = Path(os.path.realpath(path))  # by which the kernel shows mounts
    _check_characters(path)
    try:
        if path.exists():
            _check_ours(path)
        place.check_ancestors(path)
        place.check_filesystem(path)
        above = _missing_parents(path)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = RootLock(path)
        made = [path / name for name in _DIRECTORIES if not (path / name).exists()]
        for directory in made:
            directory.mkdir(mode=0o700)
        for directory in (path, *(path / name for name in _DIRECTORIES if name != "empty")):
            _make_private(directory)
        for directory in (path, *(path / name for name in _DIRECTORIES)):
            _forget_default_acl(directory)
        _make_shards(path / "objects")
        # The merged root of a snapshot without a parent looks like this one.
        (path / "empty").chmod(0o755)
        for name in ("spool", "memory"):
            _clear_spool(path / name)
        for directory in {*made, path / "objects", path}:
            sync_directory(directory, "sync.root")
        for directory in (path.parent, *above):
            sync_directory(directory, "sync.root-parents")
    except OSError as error:
        raise from_os_error(f"preparing root {path}", error) from error
    return Root(path), lock


def _missing_parents(path: Path) -> list[Path]:
    """The parents of those directories above the root that are still to be made."""
    return [parent.parent for parent in path.parents if not parent.exists()]


def _make_private(directory: Path) -> None:
    """Mended and not refused: all containers of the host need the daemon, and nothing was lost."""
    mode = stat.S_IMODE(directory.stat().st_mode)
    if mode != 0o700:
        log.warning("root.made_private", directory=str(directory), mode_before=f"{mode:04o}")
        directory.chmod(0o700)


def _forget_default_acl(directory: Path) -> None:
    """A default ACL above us would reach into layers: all that is made below inherits it."""
    try:
        os.removexattr(directory, "system.posix_acl_default")
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.ENOTSUP):
            raise


def _make_shards(objects: Path) -> None:
    """Each is durable itself with the first object in it."""
    for name in SHARDS_OF_OBJECTS.difference(os.listdir(objects)):
        (objects / name).mkdir(mode=0o700)


def _clear_spool(spool: Path) -> None:
    """Takes away what a kill left, trial mounts first."""
    place = spool.resolve()
    for mount in reversed(list(mountinfo.read())):
        if Path(mount.path).is_relative_to(place):
            linux.umount2(mount.path, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
    for entry in spool.iterdir():
        remove_tree(spool, entry.name, lambda: False)


def _check_absolute(path: Path) -> None:
    if not path.is_absolute():
        raise InvalidArgument(f"root {path} is not an absolute path")


def _check_characters(path: Path) -> None:
    if unsafe := sorted(set(str(path)) & set(_UNSAFE)):
        raise InvalidArgument(
            f"root {quote(str(path))} contains {quote(''.join(unsafe))}, which mount options cannot hold"
        )


def _check_ours(path: Path) -> None:
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise FailedPrecondition(f"root {path} is not a directory")
    if status.st_uid != os.geteuid():
        raise PermissionDenied(f"root {path} belongs to uid {status.st_uid}, not to uid {os.geteuid()}")
    found = {entry.name for entry in path.iterdir()} - {_FOREIGN}
    if found and "lock" not in found:
        raise FailedPrecondition(
            f"root {path} is not empty and was not made by dedup-snapshotter; name an empty directory"
        )
    snapshots, metadata = path / "snapshots", path / "metadata"
    # They would be taken for leftovers.
    if snapshots.is_dir() and any(snapshots.iterdir()) and _is_missing(metadata / "data.mdb"):
        raise metadata_is_lost(metadata)


def _is_missing(file: Path) -> bool:
    return not file.exists() or (file.is_file() and not file.stat().st_size)


def metadata_is_lost(metadata: Path) -> FailedPrecondition:
    """The error to raise where there are snapshots without metadata."""
    return FailedPrecondition(
        f"the metadata in {metadata} is lost, but there are snapshots beside it: restore it, or empty the root to "
        "begin anew"
    )
