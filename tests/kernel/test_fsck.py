"""A check of a root finds each kind of damage, and repair puts it right.

Every test begins with a copy of one store, does one kind of damage to it with plain system calls, and holds what is
found against what was done. Then it repairs; after that

- another check finds nothing, and another repair does nothing;
- the daemon starts, and every layer that was not lost reads what it read before, through a mount;
- what was taken away is in lost+found.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from blake3 import blake3

from snapshotter import linux
from snapshotter.cli.fsck import CORRECTED, FAILED, LEFT, USAGE
from snapshotter.client import Client, Found
from snapshotter.fsck import database, offline
from snapshotter.fsck.findings import KINDS, Finding, Progress, Severity, table
from snapshotter.fsck.image import Image
from snapshotter.fsck.repair import Done
from snapshotter.fsck.runner import Check, Subject
from snapshotter.meta import schema
from snapshotter.meta.schema import Record
from snapshotter.model import Kind, SnapshotId
from snapshotter.overlay.features import NO_FEATURES
from tests.rig.filesystem import filesystem
from tests.rig.host import Host, upper_of
from tests.rig.namespace import CHECKOUT
from tests.rig.random_tree import data
from tests.rig.roots import tear_down, unmount_below
from tests.rig.seen import Seen, seen

pytestmark = pytest.mark.root

TIME_NS = 1_500_000_000_123_456_789
METACOPY, REDIRECT = "trusted.overlay.metacopy", "trusted.overlay.redirect"
DIGEST = "trusted.dedup.blake3"
PAGE_BYTES = 4096
LAST_PAGE_AT = 136
"""Of a meta page: mm_last_pg (struct MDB_meta of liblmdb's mdb.c, behind the page's header of 16 bytes)."""

WORKING = "extract-1 working"
"""An active snapshot: one that unpacks is only directories, and so can be copied."""

Contents = Mapping[str, Mapping[str, Seen]]


def write(path: Path, seed: int, size_bytes: int = 5000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data(seed, size_bytes))
    os.utime(path, ns=(TIME_NS, TIME_NS))


def fill_base(tree: Path) -> None:
    for number in range(1, 5):
        write(tree / f"dir/{number}", number)
    write(tree / "dir/linked", 5)
    os.link(tree / "dir/linked", tree / "link")
    write(tree / "dir/small", 6, 100)
    write(tree / "renamed/file", 7)


def fill_other(tree: Path) -> None:
    write(tree / "same", 1)
    write(tree / "own", 8)


def change(merged: Path) -> None:
    """What only a container does."""
    (merged / "renamed").rename(merged / "new name")
    (merged / "dir/2").chmod(0o600)
    (merged / "dir/3").unlink()
    write(merged / "more", 9)


def work_in(upper: Path) -> None:
    """Some of it is the content of a layer."""
    write(upper / "copy", 8)
    (upper / "note").write_text("unfinished")


@dataclass
class Store:
    """A root without its daemon."""

    base: Path
    strategy: str
    wanted: Contents

    @property
    def root(self) -> Path:
        return self.base / "root"

    def host(self) -> Host:
        return Host(self.base, dedup={"strategy": self.strategy})

    def image(self) -> Image:
        return Image(database.read(self.root / "metadata"))

    def record(self, name: str) -> Record:
        return next(record for record in self.image().records.values() if record.name == name)

    def directory(self, name: str) -> Path:
        return self.root / "snapshots" / str(self.record(name).id)

    def tree(self, name: str) -> Path:
        return self.directory(name) / "fs"

    def change(self, *changes: database.Change) -> None:
        database.apply(self.root / "metadata", list(changes))

    def put(self, record: Record) -> None:
        self.change(("snapshots", schema.encode_id(record.id), schema.encode_record(record)))

    def object_of(self, name: str, path: str) -> Path:
        """The object of a file of a layer."""
        place = self.tree(name) / path
        if self.strategy == "stub":
            return self.root / "objects" / os.fsdecode(os.getxattr(place, REDIRECT)).lstrip("/")
        return next(found for found in (self.root / "objects").glob("*/*") if found.samefile(place))

    def ref_of(self, name: str, path: str) -> Path:
        found = self.object_of(name, path)
        return self.directory(name) / "refs" / (found.parent.name + found.name)

    # -- what is tried

    def check(self, verify_content: bool = False) -> list[Finding]:
        with offline.opened(self.root) as subject:
            return [event for event in Check(subject, verify_content).events() if isinstance(event, Finding)]

    def repair(self, verify_content: bool = False) -> tuple[list[Finding], list[Done], list[Finding]]:
        with offline.opened(self.root) as subject:
            return repair(subject, verify_content)

    def check_content(self, *but: str, left: Collection[str] = ()) -> None:
        """Of all snapshots as they were, but these. `left`: errors that stay."""
        with self.host() as host:
            host.expected_errors.update(left)
            for name in self.wanted.keys() - set(but):
                with contextlib.nullcontext(self.tree(WORKING)) if name == WORKING else host.viewed(name) as merged:
                    assert comparable(seen(merged), self.strategy) == self.wanted[name], name

    def lost(self) -> list[Path]:
        place = self.root / "lost+found"
        return sorted(path for path in place.iterdir() if path.suffix != ".note") if place.exists() else []

    def notes(self) -> str:
        return "".join(path.read_text() for path in sorted((self.root / "lost+found").glob("*.note")))


def repair(subject: Subject, verify_content: bool) -> tuple[list[Finding], list[Done], list[Finding]]:
    """What was found, what was done, and what is left."""
    check = Check(subject, verify_content)
    found = [event for event in check.events() if isinstance(event, Finding)]
    events = list(offline.repair(check, offline.steps_for(check, found)))
    done = [event for event in events if isinstance(event, Done)]
    return found, done, [event for event in events if isinstance(event, Finding)]


@contextmanager
def one_cpu() -> Iterator[None]:
    """So that there is one worker process to start."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def comparable(tree: Mapping[str, Seen], strategy: str) -> dict[str, Seen]:
    return dict(tree) if strategy == "stub" else {path: replace(entry, links=0) for path, entry in tree.items()}


class Prepared:
    """Stores that are made once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._wanted: dict[str, Contents] = {}

    def copy(self, base: Path, strategy: str) -> Store:
        home = self._directory / strategy
        if not home.exists():
            home.mkdir()
            self._wanted[strategy] = self._make(home, strategy)
        subprocess.run(["cp", "--archive", home / "root", base / "root"], check=True)
        return Store(base, strategy, self._wanted[strategy])

    def _make(self, home: Path, strategy: str) -> Contents:
        wanted: dict[str, Mapping[str, Seen]] = {}
        with Host(home, dedup={"strategy": strategy}) as host:
            host.unpack("base", fill=fill_base)
            host.unpack("other", fill=fill_other)
            host.commit_changes("changed", "base", fill=change)
            host.unpack("last", fill=lambda tree: write(tree / "alone", 10))
            upper = upper_of(host.client.prepare(WORKING, "last"))
            work_in(upper)
            wanted[WORKING] = comparable(seen(upper), strategy)
            for name in ("base", "other", "changed", "last"):
                with host.viewed(name) as merged:
                    wanted[name] = comparable(seen(merged), strategy)
            host.client.cleanup()
            host.stop()
            unmount_below(host.root)
        return wanted


@pytest.fixture(scope="module")
def prepared() -> Iterator[Prepared]:
    directory = Path(tempfile.mkdtemp(prefix="dds-", dir="/var/tmp"))
    yield Prepared(directory)
    tear_down(directory)


@pytest.fixture
def stubs(base: Path, prepared: Prepared) -> Store:
    return prepared.copy(base, "stub")


@pytest.fixture
def links(base: Path, prepared: Prepared) -> Store:
    return prepared.copy(base, "hardlink")


def ids(findings: list[Finding]) -> set[str]:
    return {finding.id for finding in findings}


# -- kinds of damage


def damage_file(path: Path) -> None:
    """As a disk does: other bytes, and everything else as it was."""
    status = path.stat()
    with path.open("r+b") as stream:
        stream.seek(100)
        stream.write(b"damage")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def leak_a_page(store: Store) -> None:
    path = store.root / "metadata/data.mdb"
    with path.open("r+b") as stream:
        for page in (0, 1):
            stream.seek(page * PAGE_BYTES + LAST_PAGE_AT)
            last = int.from_bytes(stream.read(8), "little")
            stream.seek(page * PAGE_BYTES + LAST_PAGE_AT)
            stream.write((last + 1).to_bytes(8, "little"))
        stream.truncate(max(path.stat().st_size, (last + 2) * PAGE_BYTES))


def overwrite_metadata(store: Store) -> None:
    path = store.root / "metadata/data.mdb"
    path.write_bytes(b"\xff" * path.stat().st_size)


def spoil_record(store: Store) -> None:
    store.change(("snapshots", schema.encode_id(store.record("other").id), b"garbage"))


def lose_record(store: Store) -> None:
    store.change(("snapshots", schema.encode_id(store.record("other").id), None))


def name_twice(store: Store) -> None:
    last = store.record("last")
    store.put(replace(last, name="other"))
    store.change(("keys", schema.key_digest("last"), None))


def lose_name(store: Store) -> None:
    store.change(("keys", schema.key_digest("other"), None))


def swap_names(store: Store) -> None:
    store.change(("keys", schema.key_digest("other"), schema.encode_id(store.record("last").id)))


def lose_child(store: Store) -> None:
    store.change(("children", schema.encode_child(store.record("base").id, store.record("changed").id), None))


def add_child(store: Store) -> None:
    store.change(("children", schema.encode_child(store.record("other").id, store.record("changed").id), b""))


def spoil_chain(store: Store) -> None:
    changed, other = store.record("changed"), store.record("other")
    chain = schema.Chain((changed.id, other.id), changed.features)
    store.change(("chains", schema.encode_id(changed.id), schema.encode_chain(chain)))


def lose_parent(store: Store) -> None:
    store.put(replace(store.record("changed"), parent_id=SnapshotId(999)))


def take_active_parent(store: Store) -> None:
    store.put(replace(store.record("changed"), parent_id=store.record(WORKING).id))


def make_cycle(store: Store) -> None:
    store.put(replace(store.record("base"), parent_id=store.record("changed").id))


def lower_next_id(store: Store) -> None:
    store.change(("store", b"next_id", schema.encode_id(1)))


def forget_what_was_sealed(store: Store) -> None:
    store.put(replace(store.record("other"), sealing=True))


def interrupt_sealing(store: Store) -> None:
    record = store.record("other")
    store.put(replace(record, sealing=True))
    before = replace(record, name="was", kind=Kind.ACTIVE)
    raw_id = schema.encode_id(record.id)
    store.change(("sealing", raw_id, schema.encode_record(before)), ("keys", schema.key_digest("was"), raw_id))


def spoil_facts(store: Store) -> None:
    store.change(("layers", schema.encode_id(store.record("other").id), b"{"))


def forget_features(store: Store) -> None:
    record = replace(store.record("other"), features=NO_FEATURES)
    store.put(record)
    store.change(("chains", schema.encode_id(record.id), schema.encode_chain(schema.Chain((record.id,)))))


def lose_tree(store: Store) -> None:
    shutil.rmtree(store.tree("other"))


def lose_work(store: Store) -> None:
    shutil.rmtree(store.directory(WORKING) / "work")


def leave_directory(store: Store) -> None:
    (store.root / "snapshots/999/fs").mkdir(parents=True)


def leave_half_swapped(store: Store) -> None:
    tree, stage = store.tree("base"), store.directory("base") / "seal/0"
    stage.mkdir(parents=True)
    old = (tree / "link").stat().st_ino
    subprocess.run(["cp", "--archive", tree / "link", stage / f"swapping-{old}"], check=True)
    status = tree.stat()
    (tree / "link").unlink()
    os.link(stage / f"swapping-{old}", tree / "link")
    os.utime(tree, ns=(status.st_atime_ns, status.st_mtime_ns))


def mount_something(store: Store) -> None:
    (store.root / "mounts/999").mkdir()
    linux.mount("tmpfs", str(store.root / "mounts/999"), "tmpfs", 0, None)


def leave_stray(store: Store) -> None:
    (store.root / "notes.txt").write_text("whose?")


def spoil_object(store: Store) -> None:
    damage_file(store.object_of("other", "own"))


def cut_object(store: Store) -> None:
    os.truncate(store.object_of("other", "own"), 0)


def lose_mark(store: Store) -> None:
    os.removexattr(store.object_of("other", "own"), DIGEST)


def change_mark(store: Store) -> None:
    os.setxattr(store.object_of("other", "own"), DIGEST, bytes(32))


def lose_object(store: Store) -> None:
    ref, lost = store.ref_of("other", "own"), store.object_of("other", "own")
    ref.unlink()
    lost.unlink()


def lose_object_name(store: Store) -> None:
    store.object_of("other", "own").unlink()


def lose_reference(store: Store) -> None:
    store.ref_of("other", "own").unlink()


def replace_reference(store: Store) -> None:
    ref = store.ref_of("other", "own")
    ref.unlink()
    ref.write_bytes(data(8, 5000))


def add_reference(store: Store) -> None:
    found = store.object_of("other", "own")
    os.link(found, store.directory("base") / "refs" / (found.parent.name + found.name))


def leave_object(store: Store) -> None:
    """With the name and the mark that its content has."""
    content = b"nobody's"
    digest = blake3(content).digest()
    place = store.root / "objects" / digest.hex()[:2] / digest.hex()[2:20]
    place.write_bytes(content)
    os.setxattr(place, DIGEST, digest)


def resize_stub(store: Store) -> None:
    path = store.tree("other") / "own"
    os.truncate(path, 4000)
    os.utime(path, ns=(TIME_NS, TIME_NS))


def link_from_outside(store: Store) -> None:
    os.link(store.object_of("other", "own"), store.base / "outside")


def make_alias(store: Store) -> None:
    """The paths of one object in two layers of a chain."""
    tree = store.tree("changed")
    status = tree.stat()
    os.link(store.tree("base") / "dir/1", tree / "more.new")
    (tree / "more.new").rename(tree / "more")
    os.link(tree / "more", tree / "more of it")
    os.utime(tree, ns=(status.st_atime_ns, status.st_mtime_ns))


def make_alias_within(store: Store) -> None:
    tree = store.tree("other")
    status = tree.stat()
    os.link(tree / "own", tree / "again")
    os.utime(tree, ns=(status.st_atime_ns, status.st_mtime_ns))


def share_with_upper(store: Store) -> None:
    upper = store.tree(WORKING)
    status = upper.stat()
    (upper / "copy").unlink()
    os.link(store.object_of("other", "own"), upper / "copy")
    os.utime(upper, ns=(status.st_atime_ns, status.st_mtime_ns))


def set_attribute(name: str, value: bytes) -> Callable[[Store], None]:
    def seed(store: Store) -> None:
        os.setxattr(store.tree("other") / "own", name, value)

    return seed


def redirect(*names: str, to: bytes) -> Callable[[Store], None]:
    def seed(store: Store) -> None:
        tree = store.tree("changed")
        status = tree.stat()
        for name in names:
            (tree / name).mkdir()
            os.setxattr(tree / name, REDIRECT, to)
        os.utime(tree, ns=(status.st_atime_ns, status.st_mtime_ns))

    return seed


def lose_data(store: Store) -> None:
    """A file that says that its content is below, where nothing is."""
    path = store.tree("changed") / "none"
    path.touch()
    os.truncate(path, 5000)
    os.setxattr(path, METACOPY, b"")


@dataclass(frozen=True)
class Damage:
    """What is done, and what has to be said of it."""

    id: str
    seed: Callable[[Store], None]
    strategy: str = "stub"
    verify: bool = False
    also: tuple[str, ...] = ()
    """What else it leads to."""
    repaired: bool = True
    spoils: tuple[str, ...] = ()
    """Snapshots that are not as they were, even after a repair."""
    lost: int = 0
    """What is in lost+found afterwards."""
    starts: bool = True
    """Whether the daemon can start."""

    def __str__(self) -> str:
        return f"{self.id}-{self.seed.__name__}-{self.strategy}"


DAMAGES = [
    Damage("database-damaged", leak_a_page, lost=1),
    Damage("database-unreadable", overwrite_metadata, also=("database-damaged",), repaired=False, starts=False),
    Damage("record-damaged", spoil_record, spoils=("other",), lost=1),
    Damage("record-lost", lose_record, spoils=("other",), lost=1),
    Damage("name-twice", name_twice, repaired=False, starts=False),
    Damage("key-index", lose_name),
    Damage("key-index", swap_names),
    Damage("child-index", lose_child),
    Damage("child-index", add_child),
    Damage("chain-index", spoil_chain),
    Damage("parent-missing", lose_parent),
    Damage("parent-not-committed", take_active_parent),
    Damage("cycle", make_cycle),
    Damage("next-id", lower_next_id),
    Damage("sealing-lost", forget_what_was_sealed, also=("sealing",)),
    Damage("sealing", interrupt_sealing),
    Damage("facts-damaged", spoil_facts),
    Damage("features", forget_features),
    Damage("tree-missing", lose_tree, repaired=False, spoils=("other",)),
    Damage("work-missing", lose_work),
    Damage("left-behind", leave_directory),
    Damage("half-sealed", leave_half_swapped, lost=1),
    Damage("mount-unowned", mount_something),
    Damage("stray", leave_stray),
    Damage("object-content", spoil_object, verify=True, lost=1),
    Damage("object-content", spoil_object, verify=True, lost=1, strategy="hardlink"),
    Damage("object-content", cut_object, verify=True, lost=1),
    Damage("object-mark", lose_mark),
    Damage("object-mark", change_mark),
    Damage("object-missing", lose_object),
    Damage("object-unlinked", lose_object_name),
    Damage("object-unlinked", lose_object_name, strategy="hardlink"),
    Damage("reference-missing", lose_reference),
    Damage("reference-foreign", replace_reference, lost=1),
    Damage("reference-unused", add_reference),
    Damage("object-unused", leave_object),
    Damage("stub-size", resize_stub),
    Damage("link-count", link_from_outside, repaired=False),
    Damage("alias", make_alias, strategy="hardlink", also=("reference-unused",), spoils=("changed",)),
    Damage("alias", make_alias_within, strategy="hardlink", spoils=("other",)),
    Damage("upper-shared", share_with_upper),
    Damage("attribute-dead", set_attribute("trusted.overlay.origin", b"x"), strategy="hardlink"),
    Damage("attribute-unknown", set_attribute("trusted.overlay.new", b"x"), strategy="hardlink", repaired=False,
           spoils=("other",)),
    Damage("redirect-missing", redirect("ghost", to=b"/nowhere"), spoils=("changed",)),
    Damage("redirect-twice", redirect("one", "two", to=b"/dir"), repaired=False, spoils=("changed",)),
    Damage("metacopy-no-data", lose_data, repaired=False, spoils=("changed",)),
]  # fmt: skip


def test_every_kind_of_damage_is_tried() -> None:
    assert {damage.id for damage in DAMAGES} == KINDS.keys()


def test_a_whole_store_is_clean(stubs: Store, base: Path, prepared: Prepared) -> None:
    other = base / "other"
    other.mkdir()
    for store in (stubs, prepared.copy(other, "hardlink")):
        assert store.check(verify_content=True) == []
        assert store.repair() == ([], [], [])
        assert not (store.root / "lost+found").exists()


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_damage_is_found_and_repaired(base: Path, prepared: Prepared, damage: Damage) -> None:
    store = prepared.copy(base, damage.strategy)
    damage.seed(store)
    with one_cpu(), offline.opened(store.root) as subject:
        found, done, left = repair(subject, damage.verify)
        assert ids(found) == {damage.id, *damage.also}
        assert [each.failure for each in done if each.failure] == []
        is_error = KINDS[damage.id].severity is Severity.ERROR
        if damage.repaired and is_error:
            assert done
            assert not any(finding.is_error for finding in left)
        else:
            assert damage.id in ids(left)
        assert len(store.lost()) == damage.lost
        assert not damage.lost or "why:" in store.notes()
        again, done, _ = repair(subject, damage.verify)
        assert (set(again), done) == (set(left), [])
    if damage.starts and is_error:
        store.check_content(*damage.spoils, left=ids(left))


def test_a_store_of_the_schema_before_is_clean(stubs: Store) -> None:
    stubs.change(("store", b"version", schema.encode_u32(1)))
    assert stubs.repair() == ([], [], [])
    assert stubs.image().raw["store"][b"version"] == schema.encode_u32(1)


@pytest.mark.parametrize("strategy", ["stub", "hardlink"])
def test_objects_that_nobody_synced_are_no_finding_and_are_made_anew(base: Path, strategy: str) -> None:
    """Their names do not tell their contents; the mark of a stub's does."""
    with Host(base, dedup={"strategy": strategy}, durability="none") as host:
        host.unpack("base", fill=fill_base)
        host.unpack("other", fill=fill_other)
    store = Store(base, strategy, {})
    assert store.check(verify_content=True) == []
    if strategy == "stub":
        damage_file(store.object_of("other", "own"))
        write(base / "root/snapshots/999/fs/equal", 8)
        found, _, left = store.repair(verify_content=True)
        assert ids(found) == {"object-content", "left-behind"}
        assert ids(left) == {"left-behind"}
        assert store.object_of("other", "own").read_bytes() == data(8, 5000)


def test_a_store_of_a_newer_version_is_refused(stubs: Store) -> None:
    stubs.change(("store", b"version", schema.encode_u32(schema.SCHEMA_VERSION + 1)))
    result = snapctl(stubs, "--repair")
    assert result.returncode == FAILED
    assert "newer dedup-snapshotter" in result.stderr


# -- repair


def snapctl(store: Store, *arguments: str, failpoints: str = "") -> subprocess.CompletedProcess[str]:
    """`snapctl fsck` on the store's root."""
    command = [sys.executable, "-m", "snapshotter.cli", "fsck", "--root", os.fspath(store.root), *arguments]
    environment = os.environ | {"PYTHONPATH": os.fspath(CHECKOUT), "DEDUP_FAILPOINTS": failpoints}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


KILLED = [("stub", spoil_object), ("hardlink", make_alias)]
KILLED_AT_NIGHT = [
    ("hardlink", spoil_object),
    ("stub", spoil_record),
    ("stub", leak_a_page),
    ("stub", replace_reference),
]


@pytest.mark.parametrize(
    ("strategy", "seed"), [*KILLED, *(pytest.param(*each, marks=pytest.mark.nightly) for each in KILLED_AT_NIGHT)]
)
def test_a_repair_that_is_killed_is_finished_by_the_next(
    base: Path, prepared: Prepared, strategy: str, seed: Callable[[Store], None]
) -> None:
    """At each of its steps, one after the other on the same store: what a kill leaves is repaired, too."""
    store = prepared.copy(base, strategy)
    seed(store)
    for step in itertools.count(1):
        result = snapctl(store, "--repair", "--verify-content", failpoints=f"fsck.step=kill@{step}")
        if result.returncode != -signal.SIGKILL:
            break
    assert step > 1
    assert result.returncode in (0, CORRECTED), result.stdout + result.stderr
    assert snapctl(store, "--verify-content").returncode == 0
    if seed is make_alias:
        assert (store.tree("changed") / "more").samefile(store.tree("changed") / "more of it")
    store.check_content("changed" if seed is make_alias else "", "other" if seed is spoil_record else "")
    assert not list((store.root / "spool").iterdir())


def test_an_object_without_another_copy_is_reported_with_all_who_use_it(stubs: Store) -> None:
    (stubs.tree(WORKING) / "copy").unlink()
    spoil_object(stubs)
    result = snapctl(stubs, "--repair", "--verify-content")
    assert result.returncode == LEFT, result.stdout + result.stderr
    assert '"other" for own' in result.stdout
    assert "no file with the content" in result.stdout
    assert stubs.lost() == []
    assert ids(stubs.check(verify_content=True)) == {"object-content"}


@pytest.mark.parametrize("value", [b"/nowhere", b"not/valid"])
def test_a_directory_that_loses_its_redirection_shows_only_what_it_has(stubs: Store, value: bytes) -> None:
    """Not what was removed below: a layer below has a directory of its name."""
    place = stubs.tree("changed") / "dir"
    shutil.rmtree(place)
    write(place / "own", 11)
    os.setxattr(place, REDIRECT, value)
    found, _, left = stubs.repair()
    assert "redirect-missing" in ids(found)
    assert not any(finding.is_error for finding in left)
    with stubs.host() as host, host.viewed("changed") as merged:
        assert os.listdir(merged / "dir") == ["own"]


def test_redirections_are_read_as_the_kernel_reads_them(stubs: Store) -> None:
    """is_valid_redirect of fsck_overlay.lookup; up to a zero byte; what is longer than a name is no name."""
    place = stubs.tree("changed") / "new name"
    for value in (b"", b"/", b"//", b"/renamed/", b"dir/1", b"/" + b"long" * 100):
        os.setxattr(place, REDIRECT, value)
        assert "redirect-missing" in ids(stubs.check()), value
    os.setxattr(place, REDIRECT, b"renamed\0")
    assert stubs.check() == []


def test_a_redirection_stays_while_a_tree_below_is_missing(stubs: Store) -> None:
    """It may come back from a backup."""
    lost = stubs.base / "aside"
    stubs.tree("base").rename(lost)
    found, _, _ = stubs.repair()
    assert "tree-missing" in ids(found)
    lost.rename(stubs.tree("base"))
    assert stubs.repair() == ([], [], [])
    stubs.check_content()


def test_paths_longer_than_the_kernel_takes_are_followed(stubs: Store) -> None:
    for name, directory in (("base", "old"), ("changed", "new")):
        fd = os.open(stubs.tree(name), os.O_RDONLY)
        for part in [*[b"directory" * 20] * 30, directory.encode()]:
            os.mkdir(part, dir_fd=fd)
            above, fd = fd, os.open(part, os.O_RDONLY, dir_fd=fd)
            os.close(above)
        if name == "changed":
            os.setxattr(fd, REDIRECT, b"old")
        os.close(fd)
    assert stubs.check() == []


def symlink_elsewhere(path: Path) -> None:
    base = next(above for above in path.parents if above.name == "root").parent
    (base / "elsewhere").mkdir()
    path.symlink_to(base / "elsewhere")


@pytest.mark.parametrize(
    ("place", "make"),
    [
        ("snapshots/2", Path.touch),
        ("snapshots/2/fs", os.mkfifo),
        ("snapshots/2/fs", symlink_elsewhere),
        ("snapshots/2/refs", Path.touch),
        ("snapshots/2/refs", symlink_elsewhere),
        ("objects/e2", os.mkfifo),
        ("objects/e2", symlink_elsewhere),
    ],
)
def test_what_is_no_directory_is_found_as_missing(stubs: Store, place: str, make: Callable[[Path], object]) -> None:
    """And everything else is checked as ever."""
    assert stubs.record("other").id == 2
    (stubs.root / place).rename(stubs.base / "aside")
    make(stubs.root / place)
    lose_child(stubs)
    result = snapctl(stubs, "--repair", "--verify-content")
    assert result.returncode == LEFT | CORRECTED, result.stdout + result.stderr
    assert "child-index" in result.stdout
    assert not list(stubs.base.glob("elsewhere/*"))
    (stubs.root / place).unlink()
    (stubs.base / "aside").rename(stubs.root / place)
    assert not any(finding.is_error for finding in stubs.repair()[2])


def test_what_has_the_name_of_a_lost_object_is_no_repair(stubs: Store) -> None:
    place = stubs.object_of("other", "own")
    place.unlink()
    place.mkdir()
    found, done, left = stubs.repair()
    assert ids(found) == ids(left) == {"object-unlinked", "stray"}
    assert [each.failure for each in done] == ["something that is no file has its name: move that away"]


def test_a_version_that_cannot_be_read_is_a_finding(stubs: Store) -> None:
    stubs.change(("store", b"version", b"2"))
    assert ids(stubs.check()) == {"database-unreadable"}


def test_a_file_with_more_attributes_than_the_kernel_lists_is_checked(base: Path) -> None:
    """On XFS a container can make one (E2BIG, listxattr(2))."""

    def fill(tree: Path) -> None:
        write(tree / "many", 1)
        for number in range(300):
            os.setxattr(tree / "many", f"user.{number:0250}", b"x")

    with filesystem("xfs", base, 300 << 20) as top, Host(top) as host:
        host.commit_changes("many", fill=fill)
        host.client.prepare("working", "many")
        assert [event.finding for event in host.client.check(verify_content=True) if isinstance(event, Found)] == []


def test_a_layer_that_is_in_use_is_only_reported(stubs: Store) -> None:
    """Because an active snapshot stands on it, or because it is mounted, wherever that is."""
    damage_file(stubs.object_of("last", "alone"))
    write(stubs.tree("other") / "equal", 10)
    result = snapctl(stubs, "--repair", "--verify-content")
    assert result.returncode == LEFT
    assert "is active and stands on it" in snapctl(stubs, "--dry-run", "--verify-content").stdout

    resize_stub(stubs)
    merged = stubs.base / "merged"
    merged.mkdir()
    linux.mount("x", str(merged), "overlay", linux.MS_RDONLY, f"lowerdir={stubs.tree('other')}:{stubs.tree('last')}")
    result = snapctl(stubs, "--repair")
    assert result.returncode == LEFT, result.stdout
    assert (stubs.tree("other") / "own").stat().st_size == 4000
    linux.umount2(str(merged))
    assert snapctl(stubs, "--repair").returncode == CORRECTED


def test_a_dry_run_says_what_a_repair_would_do_and_does_nothing(stubs: Store) -> None:
    lose_reference(stubs)
    lose_child(stubs)
    before = state(stubs.root)
    for arguments in (("--dry-run",), ("--repair", "--dry-run")):
        result = snapctl(stubs, *arguments)
        assert result.returncode == LEFT
        assert "plan: link objects/" in result.stdout
        assert "plan: change the metadata" in result.stdout
    assert state(stubs.root) == before


def state(root: Path) -> dict[str, tuple[int, ...]]:
    """Everything but the lock, which has the pid of who had it last."""
    found = {}
    for path in root.rglob("*"):
        status = path.lstat()
        if path.name != "lock":
            found[str(path)] = (status.st_ino, status.st_nlink, status.st_size, status.st_ctime_ns)
    return found


def test_what_is_found_and_done_as_json(stubs: Store) -> None:
    lose_reference(stubs)
    result = snapctl(stubs, "--repair", "--json")
    shape = json.loads(result.stdout)
    assert shape["status"] == result.returncode == CORRECTED
    (found,) = shape["findings"]
    assert found["id"] == "reference-missing"
    assert found["severity"] == "error"
    assert found["meaning"] == KINDS["reference-missing"].meaning
    assert found["subject"].startswith("snapshots/")
    assert found["repair"].startswith("link objects/")
    (done,) = shape["repairs"]
    assert (done["id"], done["failure"]) == ("reference-missing", "")
    assert shape["left"] == []


def test_names_that_a_terminal_would_obey_are_escaped(stubs: Store) -> None:
    path = stubs.tree("other") / "\x1b[31mred\nline"
    path.touch()
    os.setxattr(path, "trusted.overlay.new", b"")
    result = snapctl(stubs)
    assert "\\x1b[31mred\\nline" in result.stdout
    assert "\x1b" not in result.stdout


# -- exit statuses, and who may check


def test_statuses_are_those_of_fsck(stubs: Store) -> None:
    def status(*arguments: str) -> int:
        command = [sys.executable, "-m", "snapshotter.cli", "--address", os.fspath(stubs.base / "none"), *arguments]
        return subprocess.run(command, capture_output=True, env=os.environ, check=False, cwd=CHECKOUT).returncode

    assert status("fsck", "--root", os.fspath(stubs.root)) == 0
    assert status("fsck", "--repair") == USAGE
    assert status("fsck", "--root", "") == USAGE
    assert status("fsck", "--no-such-option") == USAGE
    assert status("fsck") == FAILED
    assert status("fsck", "--root", os.fspath(stubs.base)) == FAILED
    assert status("ls") == 6, "other commands have their own"


def test_a_root_that_a_daemon_has_is_not_opened(stubs: Store) -> None:
    with stubs.host():
        result = snapctl(stubs, "--repair")
    assert result.returncode == FAILED
    assert "is in use by" in result.stderr


def test_without_a_daemon_it_says_how_to_go_on(stubs: Store) -> None:
    command = [sys.executable, "-m", "snapshotter.cli", "--address", os.fspath(stubs.base / "none"), "fsck"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CHECKOUT)
    assert "--root DIR" in result.stderr


# -- through the daemon


def test_the_daemon_finds_what_an_offline_check_finds(stubs: Store) -> None:
    lose_reference(stubs)
    spoil_object(stubs)
    name = os.fsencode(stubs.tree("last")) + b"/\xff"
    os.mknod(name)
    os.setxattr(name, "trusted.overlay.new", b"")
    with stubs.host() as host:
        host.expected_errors.update(("reference-missing", "object-content", "attribute-unknown"))
        events = list(host.client.check(verify_content=True))
        found = [event for event in events if isinstance(event, Found)]
        assert {each.finding.id for each in found} == {"reference-missing", "object-content", "attribute-unknown"}
        assert all(each.repair for each in found if each.finding.id != "attribute-unknown")
        assert any(isinstance(event, Progress) for event in events)


def test_the_daemon_goes_on_while_a_client_leaves_its_check(stubs: Store) -> None:
    with stubs.host() as host:
        for _ in range(3):
            stream = host.client.check()
            next(stream)
            stream.close()
        assert list(host.client.list())
        assert [event for event in host.client.check() if isinstance(event, Found)] == []


def test_what_calls_change_during_a_check_is_no_finding(stubs: Store) -> None:
    """Layers with shared files come and go."""
    with stubs.host() as host:
        ended = threading.Event()

        def commit_and_remove() -> None:
            with Client(str(host.daemon.address)) as client:
                for number in itertools.count():
                    name, key = f"busy {number}", f"extract-{number} busy"
                    fill_base(upper_of(client.prepare(key)))
                    client.commit(name, key)
                    client.remove(name)
                    if ended.is_set():
                        return

        with ThreadPoolExecutor() as pool:
            busy = [pool.submit(commit_and_remove)]
            try:
                for _ in range(4):
                    found = [event.finding for event in host.client.check() if isinstance(event, Found)]
                    assert [finding for finding in found if finding.is_error] == []
            finally:
                ended.set()
        for each in busy:
            each.result()


def test_the_table_in_the_documentation_is_that_of_the_code() -> None:
    text = (CHECKOUT / "docs/fsck.md").read_text()
    assert "\n".join(table()) in text, "run: python -m snapshotter.fsck.findings"
