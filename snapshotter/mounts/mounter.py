"""Mounts that the daemon makes, one overlay a snapshot, at <root>/mounts/<id>.

One superblock serves every user of a snapshot: clients bind it. So st_dev and st_ino agree everywhere,
and `index=on` never meets a second mount of the same upper. Stopping the daemon unmounts nothing.

Callers hold the claim on a snapshot where they change its mount (claims.py).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import structlog

from snapshotter import failpoint, linux, mountinfo
from snapshotter.errors import NO_SPACE, FailedPrecondition, Unavailable, from_os_error, quote
from snapshotter.model import Kind, Mount, SnapshotId
from snapshotter.mounts import Target
from snapshotter.mounts.client import ClientMounts, bind
from snapshotter.mounts.detacher import Detacher
from snapshotter.overlay.features import NO_FEATURES, OF_UPPERS, Feature, option_names
from snapshotter.overlay.mounting import Overlay, mount
from snapshotter.overlay.switches import Switches
from snapshotter.root import Root

log = structlog.get_logger()


class Mounter:
    """Materializes snapshots, and describes to clients what they mount. `close` it."""

    def __init__(self, root: Root, mode: str, switches: Switches, layer_by_layer: bool) -> None:
        """`layer_by_layer`: the kernel has "lowerdir+", which chains with long options need."""
        self.mode = mode
        self._layer_by_layer = layer_by_layer
        self._root = root
        self._switches = switches
        self._client = ClientMounts(root)
        self._detacher = Detacher()

    def close(self, deadline_s: float) -> None:
        self._detacher.close(deadline_s)

    def switched_on(self) -> frozenset[str]:
        """The overlay features that new mounts have."""
        return self._switches.on

    def plan(self, target: Target) -> Target:
        """Decides for a new snapshot whether the daemon mounts it, and what its upper will then need."""
        overlaid = target.writable or len(target.chain.ids) > 1 or bool(target.chain.features)
        if self.mode == "client" or target.is_extraction or not overlaid:
            return target
        features = self._switches.features() & OF_UPPERS if target.writable else NO_FEATURES
        return replace(target, materialized=True, features=features)

    def describe(self, target: Target) -> tuple[Mount, ...]:
        """What the client has to mount; mounts nothing. Raises FailedPrecondition."""
        if not target.materialized:
            return self._client.describe(target)
        self._check_features(target)
        return (bind(str(self._root.mountpoint(target.id)), target.writable),)

    def provide(self, target: Target) -> tuple[Mount, ...]:
        """What the client has to mount, after mounting what it rests on. Idempotent; call it under the claim.

        Raises FailedPrecondition, Unavailable (the upper is in use elsewhere), ResourceExhausted, Internal.
        """
        mounts = self.describe(target)
        if target.materialized and not self.is_mounted(target.id):
            self._materialize(target)
        return mounts

    def is_mounted(self, snapshot_id: SnapshotId) -> bool:
        """One stat: an overlay has a device of its own, whatever else is mounted in the namespace."""
        try:
            device = os.lstat(self._root.mountpoint(snapshot_id)).st_dev
        except FileNotFoundError:
            return False
        return device != os.lstat(self._root.mounts).st_dev

    def freeze(self, snapshot_id: SnapshotId) -> bool:
        """Makes the superblock, and with it every bind of it, read-only; False if something is open for writing.

        Syncs the filesystem, as the kernel does on the way to read-only.
        """
        try:
            linux.mount("", str(self._root.mountpoint(snapshot_id)), None, linux.MS_REMOUNT | linux.MS_RDONLY, None)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise
        return True

    def thaw(self, snapshot_id: SnapshotId) -> None:
        """Undoes `freeze`."""
        linux.mount("", str(self._root.mountpoint(snapshot_id)), None, linux.MS_REMOUNT, None)

    def release(self, snapshot_id: SnapshotId, wait: bool = False) -> None:
        """Detaches the mount now, whoever still uses it, and leaves what the kernel has to write to a thread, unless it
        is to `wait`."""
        path = self._root.mountpoint(snapshot_id)
        if wait:
            self.unmount(snapshot_id)
        while self.is_mounted(snapshot_id):
            self._detacher.detach(path)
        try:
            failpoint.hit("mount.detached")
            _remove_mountpoint(path)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            # Nobody needs it to be gone; the next start takes it away.
            log.warning("mount.mountpoint_left", id=snapshot_id, reason=str(error))

    def unmount(self, snapshot_id: SnapshotId) -> None:
        """Detaches the mount, and leaves the mountpoint: to make it again takes space. Who asks the kernel afterwards
        whether the upper is in use gets the others' answer, not ours."""
        while self.is_mounted(snapshot_id):
            linux.umount2(str(self._root.mountpoint(snapshot_id)), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)

    def adopt(self, known: Mapping[SnapshotId, Kind]) -> None:
        """At a start: keeps the mounts of snapshots that exist, thaws those of active ones, drops all others."""
        for name in os.listdir(self._root.mounts):
            snapshot_id = SnapshotId(int(name)) if name.isdecimal() else None
            if snapshot_id is None:
                continue
            kind = known.get(snapshot_id)
            if kind is None or kind is Kind.COMMITTED:
                log.info("mount.dropped", id=snapshot_id)
                self.release(snapshot_id, wait=True)
            elif kind is Kind.ACTIVE and self.is_mounted(snapshot_id) and self._is_frozen(snapshot_id):
                log.info("mount.thawed", id=snapshot_id)
                self.thaw(snapshot_id)
        self._thaw_through_binds(known)

    def _thaw_through_binds(self, known: Mapping[SnapshotId, Kind]) -> None:
        """A kill in a Commit can leave an active snapshot frozen that only its clients' binds still show."""
        uppers = {str(self._root.fs(snapshot_id)) for snapshot_id, kind in known.items() if kind is Kind.ACTIVE}
        for path, upper in list(mountinfo.read_only_uppers()):
            if upper in uppers:
                log.info("mount.thawed", path=path, upper=upper)
                linux.mount("", path, None, linux.MS_REMOUNT, None)

    def _is_frozen(self, snapshot_id: SnapshotId) -> bool:
        return bool(os.statvfs(self._root.mountpoint(snapshot_id)).f_flag & os.ST_RDONLY)

    def _materialize(self, target: Target) -> None:
        path, overlay = self._root.mountpoint(target.id), self._overlay(target)
        self._check_fits(overlay, target)
        try:
            _make_mountpoint(path)
            failpoint.hit("mount.before-mount")
            mount(overlay, path, f"dedup:{target.id}")
            failpoint.hit("mount.mounted")
        except OSError as error:
            if error.errno == errno.EBUSY:
                if self._put_back(target):
                    return
                raise Unavailable(self._busy_message(target)) from error
            if error.errno == errno.ESTALE:
                raise FailedPrecondition(
                    f"snapshot {quote(target.key)} cannot be mounted: its upper was made on other layers than those "
                    "it has now"
                ) from error
            raise from_os_error(f"mounting snapshot {quote(target.key)}", error) from error

    def _put_back(self, target: Target) -> bool:
        """Where only our own mount is gone and somebody's bind of it is not: binds that, whatever it is frozen to."""
        path = str(self._root.mountpoint(target.id))
        for place in mountinfo.places_of_upper(self._root.fs(target.id)):
            linux.mount(place, path, None, linux.MS_BIND, None)
            linux.mount("", path, None, linux.MS_REMOUNT | linux.MS_BIND, None)  # with none of its restrictions
            log.info("mount.put_back", id=target.id, bind=place)
            return True
        return False

    def _check_fits(self, overlay: Overlay, target: Target) -> None:
        """Raises FailedPrecondition for a chain that this kernel, or a root with so long a path, cannot mount."""
        if overlay.fits_page():
            return
        what = f"snapshot {quote(target.key)} cannot be mounted: the options for its {len(overlay.lowers)} layers take"
        if not self._layer_by_layer:
            raise FailedPrecondition(
                f"{what} more than the {linux.MOUNT_DATA_BYTES - 1} bytes of mount(2), and this kernel has no other "
                "way (lowerdir+, Linux 6.7): flatten the image"
            )
        if not overlay.fits_strings():
            raise FailedPrecondition(
                f"{what} more than the {linux.MOUNT_DATA_BYTES - 1} bytes of mount(2), and the path {self._root.path} "
                f"is too long for the mount API, which takes {linux.FSCONFIG_STRING_BYTES} bytes a layer"
            )

    def _overlay(self, target: Target) -> Overlay:
        root = self._root
        lowers = tuple(root.fs(layer) for layer in target.chain.ids)
        data = root.objects if Feature.DATA_ONLY in target.chain.features else None
        if target.writable:
            upper, work = root.fs(target.id), root.work(target.id)
            switches = self._switches.narrowed(target.features).for_upper()
            return Overlay(lowers or (root.empty,), upper, work, data, switches)
        # The kernel wants two layers where there is no upper.
        lowers = lowers if len(lowers) > 1 else (*lowers, root.empty)
        return Overlay(lowers, data=data, switches=self._switches.for_view())

    def _check_features(self, target: Target) -> None:
        """Raises FailedPrecondition for an upper that may hold what is not understood without a feature that is off."""
        if lacking := target.features & ~self._switches.features():
            raise FailedPrecondition(
                f"snapshot {quote(target.key)} was made with overlay feature {', '.join(option_names(lacking))}, which "
                "is off or does not work here; turn it on, or remove the snapshot"
            )

    def _busy_message(self, target: Target) -> str:
        holders = mountinfo.processes_with_upper(self._root.fs(target.id))
        who = f"the mount namespace of pid {holders[0]}" if holders else "another mount namespace or a lost bind"
        return f"snapshot {quote(target.key)} cannot be mounted: an overlay in {who} uses its upper; unmount that first"


def _make_mountpoint(path: Path) -> None:
    """An immutable directory: a mount on it works, a stray write into it while bare fails."""
    path.mkdir(mode=0o700, exist_ok=True)
    failpoint.hit("mount.made-mountpoint")
    _set_immutable(path, True)


def _remove_mountpoint(path: Path) -> None:
    try:
        _set_immutable(path, False)
        path.rmdir()
    except FileNotFoundError:
        return


def _set_immutable(path: Path, immutable: bool) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = linux.get_inode_flags(fd) & ~linux.FS_IMMUTABLE_FL
        linux.set_inode_flags(fd, flags | (linux.FS_IMMUTABLE_FL if immutable else 0))
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)
