"""A repair takes contents out of the archives of images.

Every test begins with a copy of one store of two layers, and the image that they were unpacked from as a content store
(an OCI image layout is one). Proves: what is damaged, cut or gone comes back, also when the repair is killed meanwhile;
an archive that is damaged gives what is whole in it; where nothing is found, the layers, the paths and the archive are
named; no image can make the repair read what is not its own, or take all memory.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from blake3 import blake3

from snapshotter.cli.fsck import CORRECTED, LEFT, USAGE
from snapshotter.content.stubs import locator_of_digest
from snapshotter.errors import InvalidArgument
from snapshotter.fsck import archives
from snapshotter.fsck.contentstore import ContentStore, chain_ids
from snapshotter.meta.schema import Record
from snapshotter.model import Kind, SnapshotId
from tests.kernel.test_fsck import Store, comparable, damage_file, snapctl
from tests.rig.host import Host, upper_of
from tests.rig.image import Entry, EntryKind, Image, Layer, Packing, build_packed, pack
from tests.rig.namespace import CHECKOUT
from tests.rig.random_tree import data
from tests.rig.roots import tear_down, unmount_below
from tests.rig.seen import Seen, seen

pytestmark = pytest.mark.root

STRIPPED = "trusted.overlay.origin"
"""What an image may have, and a layer not."""

LOWER = Layer("lower", (
    Entry(b"dir/one", content=data(1, 9_000), mode=0o4755, uid=7, mtime_ns=1_600_000_000_123_456_789),
    Entry(b"dir/two", content=data(2, 3_000_000), xattrs={"user.place": b"\xff\n"}, mtime_ns=1_600_000_000_000_000_001),
    Entry(b"dir/also two", EntryKind.HARD_LINK, target=b"dir/two"),
    Entry(b"same", content=data(3, 9_000)),
    Entry(b"stripped", content=data(7, 9_000), xattrs={STRIPPED: b"x"}),
))  # fmt: skip
UPPER = Layer("upper", (
    Entry(b"own", content=data(4, 20_000)),
    Entry(b"same", content=data(3, 9_000)),
    Entry(b"dir/one", EntryKind.WHITEOUT),
))  # fmt: skip
UPPER_PACKED = "packed as containerd says"
"""The name of a snapshot with the content of UPPER, of which only a label tells the archive."""
LABEL = "containerd.io/snapshot/cri.layer-digest"


def name_of(image: Image, number: int) -> str:
    return f"k8s.io/{number}/{list(chain_ids(image.diff_ids))[number]}"


def unpack(image: Image, number: int, tree: Path) -> None:
    """As containerd does. Whiteouts change nothing here."""
    for entry in image.layers[number].entries:
        path = tree / os.fsdecode(entry.path)
        if entry.kind is EntryKind.DIRECTORY:
            path.mkdir()
        elif entry.kind is EntryKind.HARD_LINK:
            os.link(tree / os.fsdecode(entry.target), path)
        elif entry.kind is EntryKind.FILE:
            path.write_bytes(entry.content)
            os.chown(path, entry.uid, entry.gid)
            path.chmod(entry.mode)
            for key, value in entry.xattrs.items():
                os.setxattr(path, key, value)
            os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns))


class Prepared:
    """Stores that are made once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._wanted: dict[str, Mapping[str, Mapping[str, Seen]]] = {}
        archive = directory / "image.tar"
        self.image = build_packed("example.test/packed:latest", [LOWER, UPPER], [Packing.PLAIN, Packing.GZIP], archive)

    def copy(self, base: Path, strategy: str) -> Store:
        home = self._directory / strategy
        if not home.exists():
            home.mkdir()
            self._wanted[strategy] = self._make(home, strategy)
        subprocess.run(["cp", "--archive", home / "root", base / "root"], check=True)
        (base / "content").mkdir()
        subprocess.run(["tar", "--extract", "--file", self.image.archive], check=True, cwd=base / "content")
        return Store(base, strategy, self._wanted[strategy])

    def _make(self, home: Path, strategy: str) -> Mapping[str, Mapping[str, Seen]]:
        lower, upper = (name_of(self.image, number) for number in (0, 1))
        label = sha256(pack_upper(self.image))
        with Host(home, dedup={"strategy": strategy}) as host:
            layers = [(lower, "", 0, {}), (upper, lower, 1, {}), (UPPER_PACKED, lower, 1, {LABEL: label})]
            for name, parent, number, labels in layers:
                unpack(self.image, number, upper_of(host.client.prepare("k8s.io/9/extract-1", parent)))
                host.client.commit(name, "k8s.io/9/extract-1", labels=labels)
            wanted = {}
            for name in (lower, upper, UPPER_PACKED):
                with host.viewed(name) as merged:
                    wanted[name] = comparable(seen(merged), strategy)
            host.client.cleanup()
            host.stop()
            unmount_below(host.root)
        return wanted


def pack_upper(image: Image) -> bytes:
    """The blob of the upper layer in the image."""
    archive = image.archive
    with tarfile.open(archive) as opened:
        for member in opened:
            stream = opened.extractfile(member)
            if stream and (raw := stream.read()).startswith(b"\x1f\x8b"):
                return raw
    raise AssertionError(archive)


def sha256(blob: bytes) -> str:
    return "sha256:" + hashlib.sha256(blob).hexdigest()


@pytest.fixture(scope="module")
def prepared() -> Iterator[Prepared]:
    directory = Path(tempfile.mkdtemp(prefix="dds-", dir="/var/tmp"))
    yield Prepared(directory)
    tear_down(directory)


@pytest.fixture(params=["stub", "hardlink"])
def store(request: pytest.FixtureRequest, base: Path, prepared: Prepared) -> Store:
    return prepared.copy(base, request.param)


@pytest.fixture
def stubs(base: Path, prepared: Prepared) -> Store:
    return prepared.copy(base, "stub")


def repair(store: Store, failpoints: str = "") -> tuple[int, str]:
    """The exit status, and what it says."""
    arguments = ("--repair", "--verify-content", "--from-content", os.fspath(store.base / "content"))
    done = snapctl(store, *arguments, failpoints=failpoints)
    return done.returncode, done.stdout + done.stderr


def blob(store: Store, *, is_gzip: bool) -> Path:
    """Of the upper layer, or of the lower one."""
    for path in (store.base / "content/blobs/sha256").iterdir():
        head = path.read_bytes()[:2]
        if head[:1] != b"{" and is_gzip == (head == b"\x1f\x8b"):
            return path
    raise AssertionError


def cut(path: Path) -> None:
    status = path.stat()
    os.truncate(path, 0)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def assert_whole(store: Store) -> None:
    assert store.check(verify_content=True) == []
    assert not list((store.root / "spool").iterdir())
    store.check_content()


def test_what_is_damaged_cut_or_gone_comes_back(store: Store, prepared: Prepared) -> None:
    lower, upper = (name_of(prepared.image, number) for number in (0, 1))
    for name, path in ((lower, "dir/one"), (lower, "stripped"), (lower, "same")):
        damage_file(store.object_of(name, path))
    cut(store.object_of(lower, "dir/two"))
    (store.root / "spool/fsck.0123").touch()  # of a repair that was killed at its end
    lost = store.object_of(upper, "own")
    if store.strategy == "stub":
        store.ref_of(upper, "own").unlink()
        store.ref_of(UPPER_PACKED, "own").unlink()
        lost.unlink()
    else:
        cut(lost)
    status, said = repair(store)
    assert status == CORRECTED, said
    assert_whole(store)


def test_an_object_whose_name_does_not_say_its_hash_is_found_by_its_mark(base: Path, prepared: Prepared) -> None:
    """As where layers are not synced."""
    image, name = prepared.image, name_of(prepared.image, 0)
    with Host(base, dedup={"strategy": "stub"}, durability="none") as host:
        unpack(image, 0, upper_of(host.client.prepare("k8s.io/9/extract-1")))
        host.client.commit(name, "k8s.io/9/extract-1")
        host.client.cleanup()
        host.stop()
        store = Store(base, "stub", {})
        (base / "content").mkdir()
        subprocess.run(["tar", "--extract", "--file", image.archive], check=True, cwd=base / "content")
        damaged = store.object_of(name, "dir/two")
        assert "~" in damaged.name
        cut(damaged)
        status, said = repair(store)
        assert status == CORRECTED, said
        assert damaged.read_bytes() == data(2, 3_000_000)


def test_a_label_leads_to_the_archive_of_a_snapshot_of_another_name(stubs: Store, prepared: Prepared) -> None:
    for path in (stubs.base / "content/blobs/sha256").iterdir():
        if path.read_bytes()[:1] == b"{":  # no manifest, no configuration
            path.unlink()
    damage_file(stubs.object_of(name_of(prepared.image, 1), "own"))
    status, said = repair(stubs)
    assert status == CORRECTED, said
    assert_whole(stubs)


@pytest.mark.parametrize(("strategy", "step"), [("stub", 1), ("hardlink", 7)])
def test_a_repair_that_is_killed_is_finished_by_the_next(
    base: Path, prepared: Prepared, strategy: str, step: int
) -> None:
    """When it has read the archives; and when one of two names of a file is replaced."""
    store = prepared.copy(base, strategy)
    lower = name_of(prepared.image, 0)
    damage_file(store.object_of(lower, "dir/two"))
    assert repair(store, failpoints=f"fsck.step=kill@{step}")[0] == -signal.SIGKILL
    assert list((store.root / "spool/fsck.blobs").glob("*/*"))
    if strategy == "hardlink":
        assert not (store.tree(lower) / "dir/two").samefile(store.tree(lower) / "dir/also two")
    status, said = repair(store)
    assert status == CORRECTED, said
    assert_whole(store)


@pytest.mark.nightly
def test_a_repair_that_is_killed_anywhere_is_finished_by_the_next(store: Store, prepared: Prepared) -> None:
    """At each of its steps, one after the other on the same store. A kill right after a name was replaced leaves its
    directory another time."""
    directory = store.tree(name_of(prepared.image, 0)) / "dir"
    status_before = directory.stat()
    damage_file(store.object_of(name_of(prepared.image, 0), "dir/two"))
    for step in itertools.count(1):
        status, said = repair(store, failpoints=f"fsck.step=kill@{step}")
        if status != -signal.SIGKILL:
            break
    assert step > 2
    assert status in (0, CORRECTED), said
    assert (directory / "two").samefile(directory / "also two")
    os.utime(directory, ns=(status_before.st_atime_ns, status_before.st_mtime_ns))
    assert_whole(store)


@pytest.mark.parametrize("strategy", ["stub", "hardlink"])
def test_a_damaged_archive_gives_what_is_whole_in_it(base: Path, prepared: Prepared, strategy: str) -> None:
    store, lower = prepared.copy(base, strategy), name_of(prepared.image, 0)
    archive = blob(store, is_gzip=False)
    raw = archive.read_bytes()
    at = raw.index(data(2, 3_000_000)[:100])
    archive.write_bytes(raw[:at] + b"damage" + raw[at + 6 :])
    damage_file(store.object_of(lower, "dir/two"))
    damage_file(store.object_of(lower, "same"))
    status, said = repair(store)
    assert status == CORRECTED | LEFT, said
    assert f"layer blob sha256:{archive.name} is damaged" in said
    (left,) = store.check(verify_content=True)
    found = store.object_of(lower, "dir/two")
    assert left.subject == f"objects/{found.parent.name}/{found.name}"


@pytest.mark.parametrize("trouble", ["is not in the content store", "cannot be read", "does not hold it", "no image"])
def test_what_is_not_found_is_named_with_all_that_use_it(stubs: Store, prepared: Prepared, trouble: str) -> None:
    lower, archive = name_of(prepared.image, 0), blob(stubs, is_gzip=False)
    other = "sha256:" + archive.name
    if trouble == "is not in the content store":
        archive.unlink()
    elif trouble == "cannot be read":
        archive.write_bytes(b"\x1f\x8b\x08 no gzip")
        trouble = "is damaged"
    elif trouble == "does not hold it":
        raw = pack(b"\0" * 10240, Packing.ZSTD)
        other = sha256(raw)
        replace_in_manifest(stubs, "sha256:" + archive.name, raw)
    else:
        shutil.rmtree(archive.parent)
        archive.parent.mkdir()
        trouble = "no image in the content store has the layer that snapshot 1 is"
    damage_file(stubs.object_of(lower, "dir/two"))
    status, said = repair(stubs)
    assert status == LEFT, said
    assert trouble in said
    assert other in said or "no image" in trouble
    assert f'"{lower}" for dir/two' in said or f'"{lower}" for dir/also two' in said
    assert stubs.lost() == []
    assert not list((stubs.root / "spool").iterdir())


def replace_in_manifest(store: Store, old: str, new: bytes) -> None:
    """Gives a layer of the image another blob."""
    (store.base / "content/blobs" / old.replace(":", "/")).unlink()
    for path in (store.base / "content/blobs/sha256").iterdir():
        raw = path.read_bytes()
        if raw[:1] == b"{" and old.encode() in raw and b"mediaType" in raw:
            path.unlink()
            put(store.base / "content", raw.replace(old.encode(), sha256(new).encode()))
            put(store.base / "content", new)
            return
    raise AssertionError(old)


def test_a_layer_that_is_in_use_is_only_reported(stubs: Store, prepared: Prepared) -> None:
    """It stays so when the daemon is stopped: what it has mounted stays mounted."""
    lower = name_of(prepared.image, 0)
    with stubs.host() as host, host.running("container", lower) as merged:
        host.stop()
        damage_file(stubs.object_of(lower, "same"))
        before = stubs.object_of(lower, "same").stat().st_ino
        status, said = repair(stubs)
        assert status == LEFT, said
        assert stubs.object_of(lower, "same").stat().st_ino == before
        assert (merged / "same").stat().st_size == 9_000


def test_a_directory_that_is_no_content_store_is_refused(stubs: Store) -> None:
    none = snapctl(stubs, "--repair", "--from-content", os.fspath(stubs.base))
    assert none.returncode == USAGE
    assert "/var/lib/containerd" in none.stderr


def test_contents_are_only_for_a_repair(stubs: Store) -> None:
    assert snapctl(stubs, "--from-content", os.fspath(stubs.base / "content")).returncode == USAGE


# -- what images may hold


def put(directory: Path, value: object) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    place = directory / "blobs/sha256" / hashlib.sha256(raw).hexdigest()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(raw)
    return sha256(raw)


def record(name: str, label: str = "") -> Record:
    return Record(SnapshotId(1), name, Kind.COMMITTED, None, 0, 0, {LABEL: label} if label else {})


HOSTILE: list[object] = [
    [], {}, {"layers": None}, {"layers": [1, None, {}]}, {"layers": [{"digest": 5}], "config": "x"},
    {"rootfs": []}, {"rootfs": {"diff_ids": {}}}, {"rootfs": {"diff_ids": [1]}}, {"rootfs": {"diff_ids": ["../../x"]}},
    b"{", b"{\xff", b'{"a":' * 100_000,
]  # fmt: skip


def test_no_image_leads_out_of_the_store_or_ends_the_search(tmp_path: Path) -> None:
    for value in HOSTILE:
        put(tmp_path, value)
    diff_id = "sha256:" + "5" * 64
    config = put(tmp_path, {"rootfs": {"type": "layers", "diff_ids": [diff_id]}})
    put(tmp_path, {"config": {"digest": config}, "layers": [{"digest": "sha256:../../../../etc/passwd"}]})
    put(tmp_path, {"config": {"digest": config}, "layers": [{"digest": diff_id}, {"digest": diff_id}]})
    right = sha256(b"archive")
    put(tmp_path, {"config": {"digest": config}, "layers": [{"digest": right}]})
    spoilt = put(tmp_path, {"config": {"digest": config}, "layers": [{"digest": sha256(b"other")}]})
    with (tmp_path / "blobs" / spoilt.replace(":", "/")).open("ab") as stream:
        stream.write(b" ")
    store = ContentStore(tmp_path)
    assert store.archives(record(f"k8s.io/7/{diff_id}")) == [right, diff_id]
    assert store.archives(record("k8s.io/7/other", "sha256:../../etc/passwd")) == []
    assert store.archives(record("other", right)) == [right]
    assert store.path(right) is None
    assert store.path(config)


def test_a_content_store_is_found_in_all_that_it_may_be_called_by(tmp_path: Path) -> None:
    store = tmp_path / "io.containerd.content.v1.content"
    digest = put(store, b"blob")
    for directory in (tmp_path, store, store / "blobs"):
        assert ContentStore(directory).path(digest)
    for directory in (store / "blobs/sha256", tmp_path / "none"):
        with pytest.raises(InvalidArgument):
            ContentStore(directory)


SEARCH = """
import sys; from pathlib import Path; from snapshotter.fsck import archives
archives._MAX_MEMORY_BYTES = 150 << 20
print(archives.search(Path(sys.argv[1]), sys.argv[2], frozenset(["0" * 20]), Path("/"), Path("/")).trouble)
"""


def test_an_archive_cannot_take_all_memory(tmp_path: Path) -> None:
    """By attributes that are longer than memory: in a process that may not have much."""
    header, size_bytes = tarfile.TarInfo("long"), 300 << 20
    header.type, header.size = tarfile.XHDTYPE, size_bytes
    record = b"%d comment=" % size_bytes
    path = tmp_path / "blob"
    with gzip.open(path, "wb", 1) as stream:
        stream.write(header.tobuf() + record)
        for _ in range(299):
            stream.write(b"x" * (1 << 20))
        stream.write(b"x" * ((1 << 20) - len(record) - 1) + b"\n")
        stream.write(tarfile.TarInfo("file").tobuf() + bytes(1024))
    digest = sha256(path.read_bytes())
    command = [sys.executable, "-c", SEARCH, os.fspath(path), digest]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert done.stdout.startswith("cannot be read (")


def test_a_hole_that_would_take_for_ever_to_read_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    os.truncate(tmp_path / "a", 8 << 40)
    (tmp_path / "b").write_bytes(data(6, 5_000))
    archive, place = tmp_path / "tar", tmp_path / "out"
    place.mkdir()
    subprocess.run(["tar", "--create", "--sparse", "--file", archive, "a", "b"], check=True, cwd=tmp_path)
    ref = "".join(locator_of_digest(blake3(data(6, 5_000)).digest()))
    assert archives.search(archive, sha256(archive.read_bytes()), frozenset([ref]), tmp_path, place) == ({ref}, "")


def test_members_of_any_kind_are_read(tmp_path: Path) -> None:
    """Sparse files, by GNU tar, among links and devices, of all formats."""
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as stream:
        stream.seek(1_000_000)
        stream.write(data(5, 5_000))
        stream.truncate(2_000_000)
    (tmp_path / ("long" * 50)).write_bytes(data(6, 5_000))
    os.link(sparse, tmp_path / "second")
    (tmp_path / "symlink").symlink_to("sparse")
    os.mkfifo(tmp_path / "fifo")
    contents = [sparse.read_bytes(), data(6, 5_000)]
    refs = {"".join(locator_of_digest(blake3(content).digest())): content for content in contents}
    for form in ("gnu", "posix"):
        archive, place = tmp_path / f"{form}.tar", tmp_path / f"out {form}"
        place.mkdir()
        command = ["tar", "--create", "--sparse", f"--format={form}", "--file", archive, "--exclude=*.tar", "."]
        subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
        digest = sha256(archive.read_bytes())
        searched = archives.search(archive, digest, frozenset(refs), tmp_path, place)
        assert searched == (refs.keys(), "")
        for ref, content in refs.items():
            assert (place / ref).read_bytes() == content
