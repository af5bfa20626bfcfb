"""What Commit has answered is on disk, as the system calls of a daemon and its workers show (rig/synced.py); and the
tests notice when any single sync is left out.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from snapshotter.failpoint import SYNCS
from tests.rig.filesystem import filesystem
from tests.rig.host import Host, upper_of
from tests.rig.namespace import CHECKOUT
from tests.rig.roots import tear_down
from tests.rig.synced import ATTRIBUTES, Step, Trace, unsynced

pytestmark = pytest.mark.root

_BYTES = 512 << 20
BIG, OTHER = b"content that becomes an object\n" * 300, b"of another file\n" * 1000
DEAD = {f"trusted.overlay.{name}" for name in ("origin", "impure", "nlink", "uuid", "upper", "protattr")}


@contextmanager
def place(kind: str) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="dds-", dir="/var/tmp"))
    try:
        with filesystem(kind, directory, _BYTES) as mountpoint:
            yield mountpoint
    finally:
        tear_down(directory)


@pytest.fixture(scope="module")
def journal() -> Iterator[Path]:
    """A filesystem that keeps the order of changes."""
    with place("ext4") as mountpoint:
        yield mountpoint


class Watched:
    """A host whose daemon is traced, and what clients had it do."""

    def __init__(self, place: Path, mode: str, strategy: str, durability: str, skipped: str) -> None:
        base = Path(tempfile.mkdtemp(dir=place))
        (base / "there").mkdir()
        self.trace = Trace(base / "trace")
        self.host = Host(
            base, root=base / "there" / "made" / "root", mode=mode, dedup={"strategy": strategy}, durability=durability,
            environment={"DEDUP_FAILPOINTS": f"{skipped}=skip"} if skipped else None,
        )  # fmt: skip
        self.host.daemon.wrapper = self.trace.wrapper()
        self.steps: list[Step] = []

    def prepare(self, key: str, parent: str = "") -> Path:
        """The upper."""
        start = self.trace.position()
        mounts = self.host.client.prepare(key, parent)
        end = self.trace.position()
        bound = self.host.root / "snapshots" / Path(mounts[0].source).name / "fs"
        upper = bound if bound.exists() else upper_of(mounts)
        self.steps.append(Step(f"prepare {key}", start, end, upper.parent))
        return upper

    def commit(self, name: str, key: str, upper: Path, transactions: int = 2, stripped: bool = True) -> Path:
        """The layer's tree."""
        dead = [path for path in files(upper) if DEAD.intersection(os.listxattr(path))]
        start = self.trace.position()
        self.host.client.commit(name, key)
        end = self.trace.position()
        layer = self.host.layers(name)[0]
        brought = files(layer)
        changed = dead if stripped else ()
        self.steps.append(Step(f"commit {name}", start, end, layer.parent, transactions, brought, changed, brought))
        return layer


def files(tree: Path) -> dict[Path, Path]:
    """The files and directories of a tree; for each, the name that stands for all names of it."""
    paths = [tree, *tree.rglob("*")]
    found = {path: path.lstat() for path in paths if not path.is_symlink() and (path.is_file() or path.is_dir())}
    first = {status.st_ino: path for path, status in found.items()}
    return {path: first[status.st_ino] for path, status in found.items()}


def watch(
    place: Path, *scenarios: Scenario, mode: str = "daemon", strategy: str = "stub", durability: str = "full",
    skipped: str = "",
    has_journal: bool = True,
) -> list[str]:  # fmt: skip
    """What was not durable when it had to be."""
    watched = Watched(place, mode, strategy, durability, skipped)
    with watched.host:
        for scenario in scenarios:
            scenario(watched)
    return unsynced(watched.trace, watched.host.root, watched.steps, has_journal)


# -- what clients do

Scenario = Callable[[Watched], object]


def unpack(watched: Watched) -> None:
    """Two layers of an image; the second has nothing that is new, but for names."""
    for name, parent in (("base", ""), ("top", "base")):
        key = f"extract-{name}"
        upper = watched.prepare(key, parent)
        fill(upper)
        watched.commit(name, key, upper)


def fill(tree: Path) -> None:
    (tree / "d" / "deep").mkdir(parents=True, exist_ok=True)
    (tree / "e").mkdir()
    (tree / "empty").mkdir()
    (tree / "d" / "big").write_bytes(BIG)
    (tree / "d" / "small").write_text("small")
    (tree / "d" / "deep" / "other").write_bytes(OTHER)
    os.link(tree / "d" / "deep" / "other", tree / "e" / "linked")
    (tree / "e" / "link").symlink_to("../d/big")
    os.lchown(tree / "e" / "link", 1, 1)
    os.mkfifo(tree / "e" / "fifo")


def change(watched: Watched) -> None:
    """A container writes, links, renames, removes."""
    upper = watched.prepare("container", "base")
    with watched.host.again("container") as merged:
        alter(merged)
    watched.commit("changed", "container", upper)


def alter(merged: Path) -> None:
    (merged / "d" / "big").chmod(0o600)
    (merged / "e" / "linked").write_bytes(b"new content of a file with two names\n" * 500)
    (merged / "new").mkdir()
    (merged / "new" / "file").write_bytes(BIG + OTHER)
    (merged / "new" / "link").symlink_to("file")
    with suppress(OSError):  # EXDEV, of what clients mount
        (merged / "empty").rename(merged / "renamed")
    (merged / "d" / "small").unlink()


def change_while_bound(watched: Watched) -> None:
    """Somebody forgot a mount: the layer is a new tree."""
    upper = watched.prepare("bound", "base")
    with watched.host.again("bound") as merged:
        alter(merged)
        watched.commit("new tree", "bound", upper, stripped=False)


def change_while_writing(watched: Watched) -> None:
    """Somebody still has a file open: the layer is a copy."""
    upper = watched.prepare("written", "base")
    with watched.host.again("written") as merged:
        alter(merged)
        with (merged / "log").open("w") as stream:
            stream.write("line")
            stream.flush()
            copy = watched.commit("copy", "written", upper, transactions=1, stripped=False)
    assert copy != upper


# -- nothing is forgotten


def test_a_layer_is_durable_before_it_is_committed_and_again_before_it_is_sealed(journal: Path) -> None:
    assert not watch(journal, unpack, change, change_while_bound, change_while_writing)


def test_likewise_of_hard_links(journal: Path) -> None:
    assert not watch(journal, unpack, change, strategy="hardlink")


def test_likewise_where_nothing_is_shared(journal: Path) -> None:
    def unpack_one(watched: Watched) -> None:
        upper = watched.prepare("extract-base")
        fill(upper)
        watched.commit("base", "extract-base", upper, transactions=1)

    assert not watch(journal, unpack_one, change, strategy="off")


def test_likewise_of_what_clients_mount(journal: Path) -> None:
    assert not watch(journal, unpack, change, mode="client", strategy="auto")


# -- each sync is needed


HOW: dict[str, tuple[str, tuple[Scenario, ...]]] = {
    "sync.root": (r"prepare .*: \.$", (unpack,)),
    "sync.root-parents": (r"prepare .*: \.\./\.\.$", (unpack,)),
    "sync.metadata": (r"prepare .*: metadata$", (unpack,)),
    "sync.upper": (r"prepare .*: snapshots/\d+/fs$", (unpack,)),
    "sync.snapshot": (r"prepare .*: snapshots/\d+$", (unpack,)),
    "sync.snapshots": (r"prepare .*: snapshots$", (unpack,)),
    "sync.layer-files": (r"commit base, transaction 1: .*/fs/d/small$", (unpack,)),
    "sync.layer-directories": (r"commit base, transaction 1: .*/fs/d/deep$", (unpack,)),
    "sync.layer-barrier": (r"commit base, transaction 1: attributes$", (unpack,)),
    "sync.plan": (r"commit base, transaction 1: .*/seal/plan$", (unpack,)),
    "sync.plan-directory": (r"commit base, transaction 1: .*/seal$", (unpack,)),
    "sync.copies": (r"commit copy, transaction 1: snapshots$", (unpack, change_while_writing)),
    "sync.new-tree": (r"fs renamed: attributes$", (unpack, change_while_bound)),
    "sync.exchange": (r"new renamed: snapshots/\d+$", (unpack, change_while_bound)),
    "sync.stripped": (r"commit changed, transaction 2: .*/fs/d/big$", (unpack, change)),
    "sync.refs": (r"commit top, transaction 2: .*/refs$", (unpack,)),
    "sync.objects": (r"commit base, transaction 2: objects/..$", (unpack,)),
    "sync.shared-directories": (r"commit top, transaction 2: .*/fs/d/deep$", (unpack,)),
    "sync.sealed-barrier": (r"commit top, transaction 2: attributes$", (unpack,)),
}
"""Of each sync: what is not durable when it is left out, and what clients have to do for that."""


@pytest.mark.parametrize("name", HOW)
def test_a_sync_that_is_left_out_is_noticed(journal: Path, name: str) -> None:
    finding, scenarios = HOW[name]
    found = watch(journal, *scenarios, skipped=name)
    assert any(re.search(finding, line) for line in found), found


def test_every_sync_has_a_name_and_is_left_out_here() -> None:
    """Outside durable.py nothing of the daemon syncs by itself, or without a name, that mypy knows; repairs may."""
    assert HOW.keys() == SYNCS
    modules = (CHECKOUT / "snapshotter").rglob("*.py")
    paths = [path for path in modules if not {"fsck", "fsck_overlay"}.intersection(path.parts)]
    sources = {path: path.read_text() for path in paths}
    syncs = re.compile(r"\b(os\.(fsync|fdatasync|sync)|linux\.syncfs|O_D?SYNC)\b")
    assert [path.name for path, text in sources.items() if syncs.search(text)] == ["durable.py"]
    used = {name for path, text in sources.items() if path.name != "failpoint.py" for name in SYNCS if name in text}
    assert used == SYNCS
    nameless = re.compile(r"(?<!def )(?<![.\w])(sync|sync_directory)\([^*,()]*(\([^()]*\))?[^*,()]*\)")
    assert not [match[0] for text in sources.values() for match in nameless.finditer(text)]


# -- less than that


def test_metadata_leaves_out_what_would_be_synced_one_by_one(journal: Path) -> None:
    """Names and attributes are durable with the directory that is synced last."""
    found = watch(journal, unpack, change, durability="metadata")
    commits = [line for line in found if line.startswith("commit")]
    assert any(line.endswith("/fs/d/small") for line in commits)
    assert not [line for line in found if line.endswith(ATTRIBUTES) or line not in commits]


def test_none_leaves_out_all_that_is_the_layers(journal: Path) -> None:
    found = watch(journal, unpack, change, durability="none")
    assert {f"commit {name}, transaction {n}: attributes" for name in ("base", "changed") for n in (1, 2)} <= {*found}
    assert not [line for line in found if not line.startswith("commit")]


def test_without_a_journal_the_filesystem_is_synced() -> None:
    with place("btrfs") as mountpoint:
        assert not watch(mountpoint, unpack, has_journal=False)
        for name in ("sync.layer-barrier", "sync.sealed-barrier"):
            assert any(
                line.endswith(ATTRIBUTES) for line in watch(mountpoint, unpack, skipped=name, has_journal=False)
            ), name


@pytest.mark.parametrize(("durability", "strategy"), [("none", "stub"), ("metadata", "hardlink")])
def test_what_was_not_synced_is_only_shared_within_a_run(base: Path, durability: str, strategy: str) -> None:
    """A power cut may have taken the content of an object that nobody synced: no later layer may stand on it."""
    dedup = {"strategy": strategy}

    def fill_with(content: bytes) -> Callable[[Path], object]:
        def fill(tree: Path) -> None:
            (tree / "f").write_bytes(content)
            os.utime(tree / "f", (1, 1))

        return fill

    def objects_of(*names: str) -> list[set[int]]:
        """The inodes that the layers refer to."""
        refs = (host.layers(name)[0].parent / "refs" for name in names)
        return [{entry.stat().st_ino for entry in directory.iterdir()} for directory in refs]

    with Host(base, dedup=dedup) as host:
        host.unpack("full 1", fill=fill_with(BIG))
        host.stop()
        host.configure(dedup=dedup, durability=durability)
        host.start()
        host.unpack("less 1", fill=fill_with(BIG))
        host.unpack("less 2", fill=fill_with(OTHER))
        host.unpack("less 3", fill=fill_with(OTHER))
        with host.viewed("less 3") as merged:
            assert (merged / "f").read_bytes() == OTHER
        host.restart(kill=True)
        host.unpack("less 4", fill=fill_with(OTHER))
        host.stop()
        host.configure(dedup=dedup)
        host.start()
        host.unpack("full 2", fill=fill_with(OTHER))
        host.unpack("full 3", fill=fill_with(OTHER))
        names = [*(f"less {number}" for number in range(1, 5)), *(f"full {number}" for number in range(1, 4))]
        of = dict(zip(names, objects_of(*names), strict=True))
        assert of["less 1"] == of["full 1"], "what is durable may be shared by who does not ask for it"
        assert of["less 2"] == of["less 3"]
        assert of["full 2"] == of["full 3"]
        distinct = of["full 1"], of["less 2"], of["less 4"], of["full 2"]
        assert len(set[int]().union(*distinct)) == 4
        for name in names:
            with host.viewed(name) as merged:
                assert (merged / "f").read_bytes() == (BIG if name.endswith(" 1") else OTHER)
