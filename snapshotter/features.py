"""What this kernel, this filesystem and this configuration allow, held against what the root needs."""

from __future__ import annotations

import dataclasses
import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from snapshotter import linux, mountinfo
from snapshotter.config import MountConfig, OverlayConfig
from snapshotter.errors import FailedPrecondition, quote
from snapshotter.meta.schema import Record
from snapshotter.model import Kind
from snapshotter.overlay.features import (
    INCOMPATIBLE,
    KNOWN_BITS,
    NO_FEATURES,
    READ_ONLY_COMPATIBLE,
    Feature,
    option_names,
)
from snapshotter.overlay.kernel_log import overlay_messages
from snapshotter.overlay.probe import Probe, probe, try_switches
from snapshotter.overlay.switches import Switches, choose

log = structlog.get_logger()

_TRIAL_BYTES = 256 * 1024
"""What the directories and files of one round of trials take at most."""


def settle(scratch: Path, mount: MountConfig, overlay: OverlayConfig) -> tuple[Probe, Switches]:
    """Probes in `scratch`, a directory of the root's filesystem, and decides what to mount with.

    Raises FailedPrecondition when the kernel is too old, that filesystem cannot be overlaid, or the configuration asks
    for what does not work.
    """
    _check_kernel(scratch)
    with _space_to_try(scratch):
        try:
            found = probe(scratch)
        except OSError as error:
            filesystem = mountinfo.filesystem_of(scratch)
            raise FailedPrecondition(
                f"no overlay can be mounted on the {filesystem} that holds {scratch.parent}: {error}"
            ) from error
        switches = choose(dataclasses.asdict(overlay), found, _in_user_namespace())
        _try_together(scratch, switches)
    if mount.mode == "daemon" and Path("/sys/fs/selinux/enforce").exists():
        raise FailedPrecondition(
            "this host runs SELinux, whose labels (containerd's context=) cannot reach a bind mount: "
            'set mount.mode = "client"'
        )
    _report(found, switches, mount)
    return found, switches


def _check_kernel(directory: Path) -> None:
    """What no tree is walked or deleted without."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(linux.open_beneath(fd, ".", os.O_PATH | os.O_CLOEXEC))
    except OSError as error:
        raise FailedPrecondition(
            f"this kernel has no openat2(2), or a filter forbids it ({error.strerror}): Linux 5.6 is needed"
        ) from error
    finally:
        os.close(fd)


def _try_together(scratch: Path, switches: Switches) -> None:
    with overlay_messages() as said:
        try:
            try_switches(scratch, switches.for_upper())
        except OSError as error:
            options = ",".join(k if v is None else f"{k}={v}" for k, v in switches.for_upper().items())
            reason = "; ".join([str(error.strerror), *said()])
            raise FailedPrecondition(f"the kernel refuses an overlay with {options}: {reason}") from error


@contextmanager
def _space_to_try(scratch: Path) -> Iterator[None]:
    """A full filesystem must not keep the daemon from starting, since only it can free space: then the trials are
    made on a tmpfs that covers `scratch` meanwhile."""
    if not _is_full(scratch):
        yield
        return
    log.warning("probe.on_tmpfs", reason=f"no space left in {scratch}")
    linux.mount("tmpfs", str(scratch), "tmpfs", 0, "size=4m")
    try:
        yield
    finally:
        linux.umount2(str(scratch), linux.MNT_DETACH)


def _is_full(directory: Path) -> bool:
    try:
        with tempfile.TemporaryDirectory(prefix="space.", dir=directory) as place:
            (Path(place) / "data").write_bytes(bytes(_TRIAL_BYTES))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        raise
    return False


def _in_user_namespace() -> bool:
    """user_namespaces(7): only the first one maps every id to itself."""
    return Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]


def strategy(setting: str, mount_mode: str, switches: Switches) -> str:
    """How files are shared: "stub", "hardlink" or "off".

    Raises FailedPrecondition for stubs where they cannot be mounted.
    """
    can_stub = mount_mode == "daemon" and switches.has_stubs()
    if setting == "auto":
        return "stub" if can_stub else "hardlink"
    if setting == "stub" and not can_stub:
        raise FailedPrecondition(
            'dedup.strategy is "stub", which needs mount.mode = "daemon" and the overlay features metacopy, '
            'redirect_dir and data_only, one of which is off or does not work here: set it to "auto"'
        )
    return setting


def check_store(records: Iterable[Record], switches: Switches) -> Feature:
    """The read-only compatible features that are off and that some active snapshot needs: the store serves views only.

    Raises FailedPrecondition, naming it, when a layer needs a feature that is off or unknown.
    """
    needs = NO_FEATURES
    uppers_need = NO_FEATURES
    for record in records:
        if int(record.features) & ~KNOWN_BITS:
            raise FailedPrecondition(
                f"the store needs a feature that this version does not know (bits {int(record.features):#x}); "
                "it was used by a newer dedup-snapshotter; run that one"
            )
        if record.kind is Kind.COMMITTED:
            needs |= record.features
        uppers_need |= record.features
    if lacking := needs & INCOMPATIBLE & ~switches.features():
        raise FailedPrecondition(
            f"layers in the store need overlay feature {', '.join(option_names(lacking))}, which is off or does not "
            "work here; turn it on, or run on a kernel that has it"
        )
    lacking = uppers_need & READ_ONLY_COMPATIBLE & ~switches.features()
    if lacking:
        log.warning("store.views_only", missing=",".join(option_names(lacking)))
    return lacking


def refuse_unless_writable(lacking: Feature, key: str) -> None:
    """Raises FailedPrecondition if the store serves views only (`check_store`)."""
    if lacking:
        raise FailedPrecondition(
            f"snapshot {quote(key)} cannot be prepared: active snapshots in the store need overlay feature "
            f"{', '.join(option_names(lacking))}, which is off or does not work here, so it serves views only; "
            "turn it on, or remove them and restart"
        )


def _report(found: Probe, switches: Switches, mount: MountConfig) -> None:
    reach = mountinfo.namespace_reach()
    log.info(
        "overlay.features",
        on=",".join(sorted(switches.on)),
        works=",".join(name for name in found.missing if found.has(name)),
        missing=",".join(name for name in found.missing if not found.has(name)),
    )
    if mount.mode == "daemon" and reach == "private":
        log.warning(
            "mounts.private",
            reason="the daemon's mount namespace is not that of PID 1 and its mounts do not propagate there, so "
            "containerd may not see them",
            help='give the daemon no mount namespace of its own, or set mount.mode = "client"',
        )
