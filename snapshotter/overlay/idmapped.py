"""Whether overlayfs takes ID-mapped mounts as layers here (Linux 5.19; mount_setattr(2), "ID-mapped mounts")."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from snapshotter import linux
from snapshotter.overlay.mounting import Overlay, mount


def try_idmapped_layer(place: Path) -> None:
    """Overlays an ID-mapped copy of the mount of `place`/l. Raises OSError."""
    lower, upper, work, merged = (place / name for name in ("l", "u", "w", "m"))
    for made in (lower, upper, work, merged):
        made.mkdir()
    tree_fd = linux.open_tree_clone(str(lower))
    try:
        # The kernel takes a mapping from a user namespace only: one that a process without privileges sits in.
        with subprocess.Popen(
            ["unshare", "--user", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as holder:
            _wait_until_it_runs(holder)
            _map_ids(holder.pid)
            namespace_fd = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            try:
                linux.mount_setattr_idmap(tree_fd, namespace_fd)
            finally:
                os.close(namespace_fd)
                assert holder.stdin
                holder.stdin.close()
        mount(Overlay((Path(f"/proc/self/fd/{tree_fd}"),), upper, work), merged, "probe")
        linux.umount2(str(merged))
    finally:
        os.close(tree_fd)


def _wait_until_it_runs(holder: subprocess.Popen[bytes]) -> None:
    """It is in its namespace once cat answers. Raises OSError if user namespaces are forbidden."""
    assert holder.stdin and holder.stdout
    holder.stdin.write(b"\n")
    holder.stdin.flush()
    if holder.stdout.read(1) != b"\n":
        raise OSError(0, "user namespaces are forbidden")


def _map_ids(pid: int) -> None:
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{pid}/{name}").write_text("0 100000 65536")
