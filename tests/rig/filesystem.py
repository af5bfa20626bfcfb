"""A filesystem in a sparse image file, mounted through a loop device that goes with its mount."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.rig.namespace import RigError
from tests.rig.roots import unmount_below

MAKE = {
    "xfs": ("mkfs.xfs", "-q", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q"),
    "ext4": ("mkfs.ext4", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1"),
}


@contextmanager
def filesystem(kind: str, directory: Path, size_bytes: int, *options: str) -> Iterator[Path]:
    """Where a fresh one is mounted, below `directory`; `options` are more of its mkfs. At the end it is unmounted, with
    all that is mounted on it, and the image removed. Raises RigError when it cannot be made, or is still in use."""
    image, mountpoint = directory / f"{kind}.img", directory / kind
    image.touch()
    os.truncate(image, size_bytes)
    mountpoint.mkdir()
    try:
        make(kind, image, *options)
        attach(kind, image, mountpoint)
        yield mountpoint
    finally:
        detach(kind, image, mountpoint)
        mountpoint.rmdir()
        image.unlink()


def make(kind: str, image: Path, *options: str) -> None:
    """A fresh one in an image that has its size. `options` are those of its mkfs."""
    _run(*MAKE[kind], *options, image)


def attach(kind: str, image: Path, mountpoint: Path, *options: str) -> None:
    """Mounts an image."""
    # losetup's autoclear, which mount sets: the last umount detaches the device.
    _run("mount", "-t", kind, "-o", ",".join(("loop", *options)), image, mountpoint)


def detach(kind: str, image: Path, mountpoint: Path) -> None:
    """Unmounts an image, with all that is mounted on it. Raises RigError when it is still in use."""
    device = _loop_device(image)
    unmount_below(mountpoint)
    if device:
        _wait_until_detached(device)
        if kind == "btrfs":  # which else would take an older image of the same filesystem for an outdated member
            _run("btrfs", "device", "scan", "--forget", device)


@contextmanager
def frozen(mountpoint: Path) -> Iterator[None]:
    """fsfreeze(8): whoever writes there waits in the kernel until the block ends, or the test run does: a helper that
    holds a pipe of ours thaws it."""
    script = 'fsfreeze -f "$0" && echo frozen && cat >/dev/null; fsfreeze -u "$0"'
    helper = subprocess.Popen(
        ["sh", "-c", script, mountpoint], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert helper.stdin and helper.stdout
    try:
        if helper.stdout.readline() != "frozen\n":
            raise RigError(f"{mountpoint} cannot be frozen")
        yield
    finally:
        helper.stdin.close()
        status = helper.wait()
        helper.stdout.close()
    if status != 0:
        raise RigError(f"{mountpoint} cannot be thawed")


def allocated_bytes(mountpoint: Path) -> int:
    """What the whole filesystem has in use once all is written."""
    _run("sync", "--file-system", mountpoint)
    found = os.statvfs(mountpoint)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def fill_up(disk: Path, left_bytes: int) -> None:
    """With a file `filler`, until so much is free for whoever may use everything."""
    with (disk / "filler").open("wb") as stream:
        os.sync()
        for _ in range(20):
            found = os.statvfs(disk)
            more = found.f_bfree * found.f_frsize
            if not more:
                break
            size = stream.seek(0, os.SEEK_END)
            while more:
                try:
                    os.posix_fallocate(stream.fileno(), size, more)
                    break
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    more //= 2
        size = stream.seek(0, os.SEEK_END)
        os.truncate(stream.fileno(), max(0, size - left_bytes))
        os.fsync(stream.fileno())


def _loop_device(image: Path) -> str:
    return _run("losetup", "--noheadings", "--output", "NAME", "--associated", image).strip()


def _wait_until_detached(device: str) -> None:
    """A detached mount, and the device with it, goes when its last user does."""
    backing = Path("/sys/block", Path(device).name, "loop/backing_file")
    deadline = time.monotonic() + 10
    while backing.exists():
        if time.monotonic() > deadline:
            raise RigError(f"{device} is still in use")
        time.sleep(0.02)


def _run(*argv: str | Path) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RigError(f"`{' '.join(map(str, argv))}` exited with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
