"""What is damaged in the layers of images comes back out of containerd's content store, without pulling anything.

Proves, for layers that are plain tar, gzip and zstd, with stubs and with hard links: while a container runs, what it
stands on is only reported; after that, however much is damaged, one repair puts it right, and a container reads what
its image says.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from snapshotter.cli.fsck import CORRECTED, LEFT
from tests.e2e.conftest import errors_found, missing, skip
from tests.e2e.test_containerd import import_image, remove, snapshots
from tests.rig.containerd import Rig
from tests.rig.image import Entry, EntryKind, Image, Layer, Packing, build_packed

pytestmark = [pytest.mark.root, pytest.mark.containerd]

CONTENT = "content/io.containerd.content.v1.content"
PACKINGS = (Packing.PLAIN, Packing.GZIP, Packing.ZSTD, Packing.PLAIN)


def content(seed: int, size_bytes: int) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


CONTENTS = [
    Layer(f"layer {number}", (
        Entry(b"opt/%d/big" % number, content=content(number, 3_000_000)),
        Entry(b"opt/%d/small" % number, content=content(number + 10, 9_000), mode=0o640, uid=7),
        Entry(b"opt/%d/same" % number, content=content(99, 70_000), mtime_ns=1_600_000_000_123_456_789 + number),
        Entry(b"opt/%d/first" % number, content=content(number + 20, 70_000), xattrs={"user.place": b"\xff\n"}),
        Entry(b"opt/%d/second" % number, EntryKind.HARD_LINK, target=b"opt/%d/first" % number),
    ))
    for number in range(3)
]  # fmt: skip
READ = [entry for layer in CONTENTS for entry in layer.entries if entry.content]


def programs() -> Layer:
    """This host's, with the libraries that they need."""
    paths = ["/usr/bin/cat", "/usr/bin/sleep"]
    listed = subprocess.run(["ldd", *paths], capture_output=True, text=True, check=True).stdout
    paths += sorted(set(re.findall(r"(/\S+) \(0x", listed)))
    made = [Entry(name.encode(), EntryKind.DIRECTORY, 0o755) for name in ("dev", "proc", "sys", "run", "tmp")]
    return Layer("programs", (
        *made,
        *(Entry(os.fsencode(path.lstrip("/")), mode=0o755, content=Path(path).read_bytes()) for path in paths),
    ))  # fmt: skip


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    if reason := missing():
        skip(reason)
    archive = tmp_path_factory.mktemp("image") / "image.tar"
    return build_packed("example.test/packed:latest", [programs(), *CONTENTS], PACKINGS, archive)


@pytest.fixture
def rig(mode: str) -> Iterator[Rig]:
    with Rig(daemon_arguments=["--mount-mode", mode]) as running:
        yield running
        print(running.logs(100))
        assert errors_found(running) == []


def fsck(rig: Rig, *arguments: str) -> tuple[int, str]:
    """Of the root of the stopped daemon, contents included: the exit status, and what it says."""
    done = rig.snapctl("fsck", "--root", str(rig.daemon_root), "--verify-content", *arguments, check=False)
    return done.returncode, (done.stdout + done.stderr).decode()


def objects(rig: Rig) -> list[Path]:
    return sorted((rig.daemon_root / "objects").glob("*/*"), key=lambda path: (path.stat().st_size, path.name))


def damage(paths: Sequence[Path]) -> None:
    """In turn: zeros, nothing left of it, other bytes in the middle."""
    for number, path in enumerate(paths):
        status = path.stat()
        if number % 3 == 1:
            os.truncate(path, 0)
        else:
            with path.open("r+b") as stream:
                stream.seek(5000)
                stream.write(b"damage" if number % 3 else bytes(4000))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def read_all(rig: Rig, image: Image, name: str) -> bytes:
    """What a new container reads; it goes on running."""
    rig.ctr_run("--detach", image=image.reference, name=name, argv=("/usr/bin/sleep", "1000"))
    paths = ["/" + os.fsdecode(entry.path) for entry in READ]
    return rig.ctr("task", "exec", "--exec-id", "read", name, "/usr/bin/cat", *paths).stdout


def test_all_that_is_damaged_comes_back_once_nothing_runs_on_it(rig: Rig, image: Image) -> None:
    wanted = b"".join(entry.content for entry in READ)
    import_image(rig, image)
    rig.collect_garbage()
    assert read_all(rig, image, "one") == wanted

    rig.daemon.stop()
    damage([objects(rig)[-1]])
    repair = ("--repair", "--from-content", str(rig.base / CONTENT))
    status, said = fsck(rig, *repair)
    assert status == LEFT, said
    assert "repair object-content" not in said
    rig.start_daemon()
    remove(rig, "one")
    rig.collect_garbage()
    assert len(snapshots(rig)) == len(image.layers)

    rig.daemon.stop()
    damage(objects(rig))
    status, said = fsck(rig, *repair)
    assert status == CORRECTED, said
    assert said.count("anew from an equal file: done") == len(objects(rig))
    rig.start_daemon()
    assert read_all(rig, image, "two") == wanted
