"""What the daemon does not start on: one line that says why, and nothing changed.

Nothing: no name, type, mode, owner, link count, size, time or content of anything in the root. But for what is nobody's
data: who has the lock (`lock`, LMDB's lock.mdb), and the time of `spool/`, where overlays are tried.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest

from snapshotter import linux, place
from snapshotter.meta import schema
from tests.rig.daemon import Daemon
from tests.rig.filesystem import MAKE, filesystem
from tests.rig.host import Host
from tests.rig.namespace import RigError
from tests.rig.roots import tear_down

pytestmark = pytest.mark.root

PAGE = 4096


def refusal(daemon: Daemon) -> str:
    """Starts a daemon that must not come up; all that it says."""
    done = subprocess.run(daemon.command(), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode > 0, done
    lines = [line for line in done.stderr.splitlines() if line.startswith("containerd-dedup-grpc: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def state(top: Path) -> dict[str, tuple[object, ...]]:
    """All there is of a tree."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, names, files in os.walk(top):
        for name in (".", *names, *files):
            path = Path(directory, name)
            relative = str(path.relative_to(top))
            if relative in ("lock", "metadata/lock.mdb"):
                continue
            status = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            mtime_ns = 0 if relative == "spool" else status.st_mtime_ns
            found[relative] = (
                status.st_ino, status.st_mode, status.st_uid, status.st_nlink, status.st_size, mtime_ns,
                tuple(sorted(os.listxattr(path, follow_symlinks=False))), content,
            )  # fmt: skip
    return found


def assert_refused(daemon: Daemon, *words: str) -> None:
    before = state(daemon.root) if daemon.root.is_dir() else None
    line = refusal(daemon)
    for word in words:
        assert word in line
    assert (state(daemon.root) if daemon.root.is_dir() else None) == before
    assert not daemon.address.exists()


def other(base: Path, root: Path | None = None, address: Path | None = None) -> Daemon:
    return Daemon(root or base / "other", address or base / "other.sock", log=base / "other.log")


@pytest.fixture(scope="module")
def original() -> Iterator[Path]:
    """A root with layers, an active snapshot, something in the trash and a directory that nobody knows."""
    base = Path(tempfile.mkdtemp(prefix="dds-", dir="/var/tmp"))
    with Host(base, mode="client") as host:
        for number in range(40):
            host.unpack(f"layer {number}", fill=lambda tree: (tree / "file").write_bytes(b"x" * 5000))
            host.client.update_labels(f"layer {number}", {"label": "v" * 3000})
        host.client.prepare("active", "layer 1")
    (host.root / "trash" / "7.1").mkdir()
    (host.root / "snapshots" / "999").mkdir()
    yield host.root
    tear_down(base)


@pytest.fixture
def daemon(base: Path, original: Path) -> Daemon:
    """Not running, on a copy of the root."""
    subprocess.run(["cp", "-a", original, base / "root"], check=True)
    return Daemon(base / "root", base / "s.sock", log=base / "log")


# -- the metadata -----------------------------------------------------------------------------------


def noise(size_bytes: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def patched(data: bytes, page: int, with_: bytes) -> bytes:
    return data[: page * PAGE] + with_ + data[page * PAGE + len(with_) :]


NIGHTLY = pytest.mark.nightly
OFTEN = ("cut in half", "noise in both meta pages", "zeros in all data pages", "noise in all data pages")
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut to a byte": lambda data: data[:1],
    "cut to a page": lambda data: data[:PAGE],
    "cut to the meta pages": lambda data: data[: 2 * PAGE],
    "cut in half": lambda data: data[: len(data) // 2],
    "noise in the first meta page": lambda data: patched(data, 0, noise(PAGE)),
    "noise in both meta pages": lambda data: patched(data, 0, noise(2 * PAGE)),
    "zeros in both meta pages": lambda data: patched(data, 0, bytes(2 * PAGE)),
    "zeros in all data pages": lambda data: patched(data, 2, bytes(len(data) - 2 * PAGE)),
    "noise in all data pages": lambda data: patched(data, 2, noise(len(data) - 2 * PAGE)),
    "noise everywhere": lambda data: noise(len(data)),
    "text": lambda _: b"not a database\n" * 1000,
}


@pytest.mark.parametrize("name", [name if name in OFTEN else pytest.param(name, marks=NIGHTLY) for name in DAMAGES])
def test_damaged_metadata(daemon: Daemon, name: str) -> None:
    data = daemon.root / "metadata/data.mdb"
    data.write_bytes(DAMAGES[name](data.read_bytes()))
    assert_refused(daemon, str(daemon.root / "metadata"), "restore it")


@pytest.mark.nightly
@pytest.mark.parametrize("what", ["zeros", "noise"])
def test_each_page_damaged_in_turn(daemon: Daemon, what: str) -> None:
    """Either the page is not in use, or the metadata is refused; the daemon never just dies."""
    data = daemon.root / "metadata/data.mdb"
    good = data.read_bytes()
    refused = 0
    for page in range(2, len(good) // PAGE):
        data.write_bytes(patched(good, page, bytes(PAGE) if what == "zeros" else noise(PAGE, page)))
        before = data.read_bytes()
        with contextlib.suppress(RigError), daemon:
            daemon.stop()
            continue
        daemon.process = None
        assert "is damaged" in daemon.log_text().splitlines()[-1], page
        assert data.read_bytes() == before, page
        refused += 1
    assert refused > 10


def test_a_directory_in_place_of_the_metadata_file(daemon: Daemon) -> None:
    data = daemon.root / "metadata/data.mdb"
    data.unlink()
    data.mkdir()
    assert_refused(daemon, str(daemon.root / "metadata"), "Is a directory")


@pytest.mark.parametrize("lost", ["metadata/data.mdb", "metadata"])
def test_lost_metadata(daemon: Daemon, lost: str) -> None:
    path = daemon.root / lost
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert_refused(daemon, "lost", "snapshots beside it")


def change(root: Path, database: str, act: Callable[[dict[bytes, bytes]], dict[bytes, bytes | None]]) -> None:
    """Writes what `act` makes of the entries of a database; None deletes."""
    with lmdb.open(str(root / "metadata"), max_dbs=16, lib_version=0) as environment:
        handle = environment.open_db(database.encode())
        with environment.begin(write=True, db=handle) as txn:
            for key, value in act(dict(txn.cursor())).items():
                if value is None:
                    txn.delete(key)
                else:
                    txn.put(key, value)


@pytest.mark.parametrize(
    ("database", "act"),
    [
        pytest.param("snapshots", lambda all_: {max(all_): all_[max(all_)][:20]}, id="a record cut short"),
        pytest.param("snapshots", lambda all_: {max(all_): bytes(200)}, id="a record of zeros", marks=NIGHTLY),
        pytest.param("snapshots", lambda all_: {max(all_): None}, id="a record lost", marks=NIGHTLY),
        pytest.param("keys", lambda all_: {max(all_): None}, id="a key lost", marks=NIGHTLY),
        pytest.param("keys", lambda all_: {bytes(32): max(all_.values())}, id="a key too many"),
        pytest.param("chains", lambda all_: dict.fromkeys(all_), id="chains lost"),
        pytest.param("layers", lambda all_: {max(all_): b"{"}, id="facts cut short"),
    ],
)
def test_metadata_that_contradicts_itself(
    daemon: Daemon, database: str, act: Callable[[dict[bytes, bytes]], dict[bytes, bytes | None]]
) -> None:
    change(daemon.root, database, act)
    assert_refused(daemon, str(daemon.root / "metadata"), "is damaged")


def test_a_newer_root(daemon: Daemon) -> None:
    change(daemon.root, "store", lambda _: {b"version": schema.encode_u32(99)})
    assert_refused(daemon, "version 99", "newer dedup-snapshotter")


def test_a_root_with_features_that_only_a_newer_one_knows(daemon: Daemon) -> None:
    """What is in the trash stays there, and so does a directory that no snapshot has."""
    change(daemon.root, "snapshots", lambda all_: {key: raw[:5] + b"\x80" + raw[6:] for key, raw in all_.items()})
    assert_refused(daemon, "newer dedup-snapshotter")


@pytest.mark.parametrize("setting", ['[dedup]\nstrategy = "stub"', '[overlay]\nmetacopy = "on"\nredirect_dir = "off"'])
def test_a_configuration_that_cannot_be_served(base: Path, daemon: Daemon, setting: str) -> None:
    (base / "config.toml").write_text(setting)
    daemon.arguments = ["--config", str(base / "config.toml"), "--mount-mode", "client"]
    assert_refused(daemon)


def test_what_was_refused_is_served_once_it_is_mended(daemon: Daemon) -> None:
    """The comparison can fail: a start that goes well empties the trash."""
    data = daemon.root / "metadata/data.mdb"
    good = data.read_bytes()
    data.write_bytes(noise(len(good)))
    assert_refused(daemon)
    data.write_bytes(good)
    before = state(daemon.root)
    with daemon:
        pass
    assert state(daemon.root) != before


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000], ids=["empty", "garbage"])
def test_lmdbs_lock_file_does_not_matter(daemon: Daemon, content: bytes) -> None:
    """No data is in there; LMDB begins it anew."""
    (daemon.root / "metadata/lock.mdb").write_bytes(content)
    with daemon:
        pass


# -- the place --------------------------------------------------------------------------------------


@contextmanager
def mounted(target: Path, *options: str) -> Iterator[Path]:
    target.mkdir()
    subprocess.run(["mount", *options, target], check=True)
    try:
        yield target
    finally:
        linux.umount2(str(target), linux.MNT_DETACH)


def test_a_tmpfs(base: Path) -> None:
    with mounted(base / "m", "-t", "tmpfs", "tmpfs") as place_:
        assert_refused(other(base, place_), "tmpfs", "in memory")
        assert_refused(other(base, place_ / "below"), "tmpfs", "in memory")
        assert not list(place_.iterdir())


def test_an_overlay(base: Path) -> None:
    for name in ("lower", "upper", "work"):
        (base / name).mkdir()
    options = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
    with mounted(base / "m", "-t", "overlay", "-o", options, "overlay") as place_:
        assert_refused(other(base, place_ / "root"), "is an overlay itself")
        assert not list(place_.iterdir())


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "ceph", "9p"])
def test_a_network_filesystem(base: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(place.mountinfo, "filesystem_of", lambda _path: kind)
    with pytest.raises(place.FailedPrecondition, match=f"the {kind} is a network filesystem"):
        place.check_filesystem(base / "root")


def test_a_filesystem_without_attributes(base: Path) -> None:
    with mounted(base / "m", "-t", "ramfs", "ramfs") as place_:
        assert_refused(other(base, place_ / "root"), "no trusted.* extended attributes")
        assert not list(place_.iterdir())


def test_a_filesystem_without_types_of_entries(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAKE, "ext4", ("mkfs.ext4", "-q", "-O", "^filetype"))
    with filesystem("ext4", base, 16 << 20) as place_:
        assert_refused(other(base, place_ / "root"), "d_type")
        assert [path.name for path in place_.iterdir()] == ["lost+found"]


def test_a_read_only_filesystem(base: Path, daemon: Daemon) -> None:
    with mounted(base / "m", "--bind", "-o", "ro", daemon.root) as place_:
        assert_refused(other(base, place_), "read-only")
        assert_refused(other(base, place_ / "new"), "read-only")


def test_a_file(base: Path) -> None:
    (base / "other").write_text("mine")
    assert "not a directory" in refusal(other(base))
    assert (base / "other").read_text() == "mine"


def test_a_root_of_another_user(daemon: Daemon) -> None:
    os.chown(daemon.root, 65534, 65534)
    assert_refused(daemon, "belongs to uid 65534")


@pytest.mark.parametrize(("uid", "mode"), [(65534, 0o755), pytest.param(0, 0o775, marks=NIGHTLY), (0, 0o757)])
@pytest.mark.parametrize("what", ["root", "socket"])
def test_a_place_in_which_others_can_rename(base: Path, daemon: Daemon, uid: int, mode: int, what: str) -> None:
    """They would put a root, or a socket, of their own there."""
    (base / "theirs").mkdir()
    (base / "theirs/ours").mkdir()
    os.chown(base / "theirs", uid, -1)
    (base / "theirs").chmod(mode)
    if what == "root":
        daemon.root.rename(base / "theirs/ours/root")
        daemon.root = base / "theirs/ours/root"
    else:
        daemon.address = base / "theirs/ours/s.sock"
    assert_refused(daemon, "not safe", str(base / "theirs"))


def test_a_directory_with_the_sticky_bit_is_safe(base: Path, daemon: Daemon) -> None:
    (base / "tmp").mkdir()
    (base / "tmp").chmod(0o1777)
    daemon.address = base / "tmp/s.sock"
    with daemon:
        pass


@pytest.mark.parametrize("kind", ["file", "in use"])
def test_a_socket_that_cannot_be_had(base: Path, daemon: Daemon, kind: str) -> None:
    """The root is not touched for it either."""
    with contextlib.ExitStack() as stack:
        if kind == "file":
            daemon.address.write_text("mine")
        else:
            daemon.address = stack.enter_context(other(base)).address
        before = state(daemon.root)
        assert {"file": "not a socket", "in use": "another"}[kind] in refusal(daemon)
        assert state(daemon.root) == before
