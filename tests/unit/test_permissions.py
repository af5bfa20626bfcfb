"""Another user can neither connect nor reach anything in the root, whatever umask the daemon was started with.

A layer may hold setuid files: reaching one is being root.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.rig.daemon import Daemon
from tests.rig.host import Host

pytestmark = pytest.mark.root

_TRY = """
import os, socket, sys
root, address, pid = sys.argv[1:4]
def connect():
    socket.socket(socket.AF_UNIX).connect(address)
acts = [connect, lambda: os.rename(address, address + "2"), lambda: os.unlink(address)]
acts += [lambda: os.listdir(root), lambda: os.rename(root, root + "2")]
acts += [lambda path=path: os.stat(path) for path in sys.argv[4:]]
acts += [lambda path=path: os.open(path, os.O_PATH) for path in sys.argv[4:]]
acts += [lambda name=name: os.listdir(f"/proc/{pid}/{name}") for name in ("fd", "cwd", "root", "map_files")]
acts += [lambda name=name: open(f"/proc/{pid}/{name}").read() for name in ("environ", "maps", "io")]
for number, act in enumerate(acts):
    try:
        act()
    except PermissionError:
        continue
    sys.exit(f"act {number} of {len(acts)} was allowed")
"""


def assert_out_of_reach(daemon: Daemon, paths: list[Path]) -> None:
    """For a user who may enter the directory that holds root and socket."""
    for directory in (daemon.root.parent, daemon.address.parent):
        directory.chmod(0o755)
    subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", _TRY,
         daemon.root, daemon.address, str(daemon.pid), *paths],
        check=True,
    )  # fmt: skip


def below(root: Path) -> list[Path]:
    """All there is, but the names in the object store."""
    found = [Path(top, name) for top, names, files in os.walk(root) for name in (*names, *files)]
    return [path for path in found if path.parent.name != "objects"]


def setuid(tree: Path) -> None:
    (tree / "su").write_bytes(b"#!/bin/sh\n" * 1000)
    (tree / "su").chmod(0o4755)


@pytest.mark.parametrize("umask", [0o000, 0o777], ids=lambda umask: f"{umask:04o}")
def test_nothing_is_within_reach_whatever_the_umask(base: Path, umask: int) -> None:
    """A layer and a container with a setuid file, an object, the metadata."""
    with ExitStack() as stack:
        before = os.umask(umask)
        try:
            host = stack.enter_context(Host(base, root=base / "new" / "root"))
        finally:
            os.umask(before)
        assert mode(host.root.parent) == 0o755, "made on the way to the root"
        host.unpack("layer", fill=setuid)
        with host.running("key", "layer") as merged:
            (merged / "su2").write_text("x")
            paths = below(host.root)
            assert any(path.name == "su" for path in paths) and any(path.suffix == ".mdb" for path in paths)
            assert_out_of_reach(host.daemon, paths)
            assert mode(host.root) == 0o700 and mode(host.daemon.address) == 0o600
            assert mode(merged / "su") == 0o4755 and mode(merged) == 0o755


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_root_that_was_opened_is_closed_again_with_a_warning(base: Path) -> None:
    """By an administrator in a hurry, say; its layers are untouched."""
    with Host(base) as host:
        host.unpack("layer", fill=setuid)
        host.stop()
        opened = [host.root, *(host.root / name for name in ("snapshots", "objects", "metadata", "mounts", "trash"))]
        for directory in opened:
            directory.chmod(0o755)
        host.start()
        assert {mode(directory) for directory in opened} == {0o700}
        assert host.daemon.log_text().count("root.made_private") == len(opened)
        assert_out_of_reach(host.daemon, below(host.root))
