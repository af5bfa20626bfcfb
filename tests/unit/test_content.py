"""The object store and the hashing, by themselves: names that are taken, links that run out, files that change."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from snapshotter.content.hashing import Hasher
from snapshotter.content.objects import Adopted, Locator, Objects, TooManyLinks, Wanted, collect_unused, release_all
from snapshotter.content.plan import Plan, read_plan
from snapshotter.model import NO_EXTENT
from snapshotter.overlay.features import Feature
from snapshotter.root import SHARDS_OF_OBJECTS

pytestmark = pytest.mark.root

MEGABYTE = 1 << 20


# -- hashing


@pytest.mark.parametrize("size_bytes", [0, 1, 4096, MEGABYTE - 1, MEGABYTE, MEGABYTE + 1, 40 * MEGABYTE + 7])
def test_the_hash_is_blake3_of_the_content(base: Path, size_bytes: int) -> None:
    content = os.urandom(size_bytes)
    (base / "file").write_bytes(content)
    with (base / "file").open("rb", buffering=0) as stream:
        assert Hasher(2).hash(stream.fileno(), size_bytes) == (blake3(content).digest(), size_bytes)


@pytest.mark.parametrize("expected_bytes", [100, 5 * MEGABYTE, 64 * MEGABYTE])
def test_a_file_that_is_shorter_or_longer_than_expected_is_read_to_its_end(base: Path, expected_bytes: int) -> None:
    content = os.urandom(3 * MEGABYTE)
    (base / "file").write_bytes(content)
    with (base / "file").open("rb", buffering=0) as stream:
        assert Hasher(2).hash(stream.fileno(), expected_bytes) == (blake3(content).digest(), len(content))


def test_a_file_that_shrinks_while_it_is_read_harms_nobody(base: Path) -> None:
    path = base / "file"
    size_bytes = 256 * MEGABYTE
    with path.open("wb") as stream:
        stream.truncate(size_bytes)
    over = threading.Event()

    def shrink_and_grow() -> None:
        while not over.is_set():
            os.truncate(path, 5)
            os.truncate(path, size_bytes)

    thread = threading.Thread(target=shrink_and_grow)
    thread.start()
    try:
        for _ in range(20):
            with path.open("rb", buffering=0) as stream:
                assert Hasher(2).hash(stream.fileno(), size_bytes).size_bytes <= size_bytes
    finally:
        over.set()
        thread.join()


def test_an_error_while_reading_is_raised(base: Path) -> None:
    fd = os.open(base, os.O_RDONLY)
    try:
        for size_bytes in (10, 64 * MEGABYTE):
            with pytest.raises(IsADirectoryError):
                Hasher(2).hash(fd, size_bytes)
    finally:
        os.close(fd)


def test_a_large_file_takes_no_more_memory_than_a_small_one(base: Path) -> None:
    with (base / "file").open("wb") as stream:
        stream.truncate(2 << 30)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (base / "file").open("rb", buffering=0) as stream:
        assert Hasher(2).hash(stream.fileno(), 2 << 30).size_bytes == 2 << 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 64 << 10


# -- the store


class Layer:
    """A refs directory, and files that may be adopted; their content says which object they want."""

    def __init__(self, base: Path, store: Objects, name: str) -> None:
        self.tree = base / name
        self.refs = base / f"{name}.refs"
        self.tree.mkdir()
        self.refs.mkdir()
        self.refs_fd = os.open(self.refs, os.O_RDONLY)
        self.store = store

    def adopt(self, content: bytes, locator: Locator, *, may_repeat: bool = True) -> Adopted:
        path = self.tree / str(len(list(self.tree.iterdir())))
        path.write_bytes(content)

        def is_wanted(directory_fd: int, name: str) -> bool:
            with open(os.open(name, os.O_RDONLY, dir_fd=directory_fd), "rb") as stream:
                return stream.read() == content

        with path.open("rb") as stream:
            wanted = Wanted(locator, is_wanted, lambda _fd: None, may_repeat)
            return self.store.adopt(wanted, stream.fileno(), self.refs_fd)

    def remove(self) -> int:
        """The inodes that this frees."""
        for path in self.tree.iterdir():
            path.unlink()
        return release_all(self.tree.parent / "objects", self.refs).inodes


@pytest.fixture
def store(base: Path) -> Iterator[Objects]:
    for shard in SHARDS_OF_OBJECTS:
        (base / "objects" / shard).mkdir(parents=True)
    made = Objects(base / "objects")
    yield made
    made.close()


HERE = Locator("ab", "cdef")


def objects_in(base: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (base / "objects").glob("*/*")}


def test_an_object_is_made_once_and_used_by_all(base: Path, store: Objects) -> None:
    one, two = Layer(base, store, "one"), Layer(base, store, "two")
    made = one.adopt(b"x", HERE)
    assert (made.is_new, made.instance) == (True, 0)
    again = one.adopt(b"x", HERE)
    assert (again.is_new, again.made_ref, again.name) == (False, False, made.name)
    other = two.adopt(b"x", HERE)
    assert (other.is_new, other.made_ref, other.name) == (False, True, made.name)
    assert objects_in(base) == {"cdef": b"x"}


def test_a_name_that_something_else_has_makes_for_another_instance(base: Path, store: Objects) -> None:
    """Two contents with the same locator: the whole hash decides."""
    one, two = Layer(base, store, "one"), Layer(base, store, "two")
    one.adopt(b"x", HERE)
    assert two.adopt(b"y", HERE).name == "cdef.1"
    assert one.adopt(b"y", HERE).name == "cdef.1"
    assert two.adopt(b"x", HERE).name == "cdef"
    assert objects_in(base) == {"cdef": b"x", "cdef.1": b"y"}


def test_who_may_not_repeat_gets_an_instance_for_each_use(base: Path, store: Objects) -> None:
    one, two = Layer(base, store, "one"), Layer(base, store, "two")
    assert [one.adopt(b"x", HERE, may_repeat=False).name for _ in range(3)] == ["cdef", "cdef.1", "cdef.2"]
    assert [two.adopt(b"x", HERE, may_repeat=False).name for _ in range(2)] == ["cdef", "cdef.1"]


def test_an_inode_that_takes_no_more_links_makes_for_another_instance(
    base: Path, store: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = Layer(base, store, "one"), Layer(base, store, "two")
    one.adopt(b"x", HERE)
    link = os.link

    def refuse_first(source: str, *rest: object, **more: object) -> None:
        if source == "cdef":
            raise OSError(errno.EMLINK, "Too many links")
        link(source, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", refuse_first)
    assert two.adopt(b"x", HERE).name == "cdef.1"

    def refuse_all(*_: object, **__: object) -> None:
        raise OSError(errno.EMLINK, "Too many links")

    monkeypatch.setattr(os, "link", refuse_all)
    with pytest.raises(TooManyLinks):
        two.adopt(b"z", HERE)


def test_an_object_lives_as_long_as_a_layer_uses_it(base: Path, store: Objects) -> None:
    one, two = Layer(base, store, "one"), Layer(base, store, "two")
    for layer in (one, two):
        layer.adopt(b"x", HERE)
        layer.adopt(b"own " + layer.tree.name.encode(), Locator("cd", layer.tree.name))
    assert one.remove() == 1
    assert objects_in(base) == {"cdef": b"x", "two": b"own two"}
    assert one.remove() == 0, "and again"
    assert two.remove() == 2
    assert objects_in(base) == {}


def test_what_no_layer_refers_to_is_collected(base: Path, store: Objects) -> None:
    Layer(base, store, "one").adopt(b"x", HERE)
    (base / "objects" / "00" / "stray").write_bytes(b"y")
    assert collect_unused(base / "objects").inodes == 1
    assert objects_in(base) == {"cdef": b"x"}
    assert collect_unused(base / "objects") == NO_EXTENT


def test_what_came_to_nothing_is_undone(base: Path, store: Objects) -> None:
    one, two = Layer(base, store, "one"), Layer(base, store, "two")
    store.forget(one.adopt(b"x", HERE), one.refs_fd, 1)
    assert objects_in(base) == {}
    assert not list(one.refs.iterdir())
    made = one.adopt(b"x", HERE)
    two.adopt(b"x", HERE)
    store.forget(made, one.refs_fd, 1)
    assert objects_in(base) == {"cdef": b"x"}, "somebody else needs it by now"


def test_a_ref_without_an_object_is_taken_up_again(base: Path, store: Objects) -> None:
    """What a kill leaves between the two links."""
    one = Layer(base, store, "one")
    (one.tree / "killed").write_bytes(b"x")
    os.link(one.tree / "killed", one.refs / "abcdef")
    assert one.adopt(b"x", HERE).is_new
    assert objects_in(base) == {"cdef": b"x"}
    assert sorted(path.name for path in one.refs.iterdir()) == ["abcdef"]


# -- the plan of a layer


def test_a_plan_that_was_not_synced_may_be_empty_after_a_power_cut(base: Path) -> None:
    plan = Plan("stub", 4096, ("etc/cron*",), True, Feature.METACOPY, 5000, {12: 34}, "none", "a run")
    plan.write(base / "seal")
    assert read_plan(base / "seal") == plan
    os.truncate(base / "seal" / "plan", 0)
    assert read_plan(base / "seal") is None
