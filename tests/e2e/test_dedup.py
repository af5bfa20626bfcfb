"""Real images, stored once: no reader can tell, and the second one takes next to nothing.

Proves, for images of Debian packages, a base built twice with some other times, a pip tree and a node_modules tree:
every layer reads through its mount, and is diffed by containerd, to the byte as without sharing, in whatever order
and beside whatever else it was imported; two images that share a base take the least that they can of the disk, and
one page cache; a stub takes an inode and no block. Also that the checks which say so can fail.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from snapshotter.client import Client
from snapshotter.model import Kind, Mount
from tests.e2e.conftest import find_aliases, missing, skip
from tests.e2e.test_containerd import import_image
from tests.rig import lower_bound, residency
from tests.rig.aliases import Groups, aliases, links_of_tar, links_of_tree, shared
from tests.rig.chains import alias_findings, archive_links
from tests.rig.containerd import SNAPSHOTTER, Rig
from tests.rig.dependencies import npm_tree, pip_tree
from tests.rig.filesystem import filesystem
from tests.rig.host import Host
from tests.rig.image import CAP_NET_RAW, EntryKind, Image, Layer, Recipe, write_with_layer
from tests.rig.packages import packages

pytestmark = pytest.mark.root

TIME_S = 1_700_000_000
SHIFT_NS = 5_000_000_001
WRITE_TAR = (
    "tar", "--create", "--sort=name", "--format=pax", "--xattrs", "--xattrs-include=*", "--acls",
    "--pax-option=delete=atime,delete=ctime,exthdr.name=%d/PaxHeaders/%f", "--numeric-owner",
)  # fmt: skip
PLAIN_TAR = "application/vnd.oci.image.layer.v1.tar"
SHELL = "export LC_ALL=C; shopt -s dotglob; set -o pipefail\n"
LISTING = r"%P %y %m %U %G %T@ %s %l\n"
TOLERANCE = 1.01


# -- what goes into the images


@pytest.fixture(scope="session")
def pip_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of a layer: what pip installed, in /opt/python."""
    return tree_layer(pip_tree, "opt/python", tmp_path_factory.mktemp("pip"))


@pytest.fixture(scope="session")
def npm_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of a layer: what npm installed, in /srv/application."""
    return tree_layer(npm_tree, "srv/application", tmp_path_factory.mktemp("npm"))


def tree_layer(make: Callable[[], Path], place: str, directory: Path) -> Path:
    if reason := missing():
        skip(reason)
    top = directory / "top"
    target = top / place
    target.parent.mkdir(parents=True)
    shutil.copytree(make(), target, symlinks=True)
    for path in [top, *(top / above for above in Path(place).parents)]:
        os.utime(path, (TIME_S, TIME_S))
    return write_tar(top, directory / "layer.tar")


def write_tar(top: Path, archive: Path) -> Path:
    run(*WRITE_TAR, "--file", archive, "--directory", top, ".")
    return archive


def run(*argv: str | Path) -> bytes:
    return subprocess.run(argv, check=True, capture_output=True).stdout


@pytest.fixture(scope="session")
def images(image: Image, pip_layer: Path, npm_layer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Image]:
    """Two builds, each on a base of its own of the same packages; the second base has some other times."""
    directory = tmp_path_factory.mktemp("images")
    first = replace(image, layers=tuple(map(one_xattr, image.layers)))
    second = replace(first, layers=tuple(map(some_later, first.layers)))
    return [
        with_top(first, "example.test/python:latest", pip_layer, directory / "python.tar"),
        with_top(second, "example.test/node:latest", npm_layer, directory / "node.tar"),
    ]


def one_xattr(layer: Layer) -> Layer:
    """At most one for each file: containerd sets several in a random order, in which they are listed and archived."""
    return replace(
        layer,
        entries=tuple(replace(entry, xattrs=dict(sorted(entry.xattrs.items())[:1])) for entry in layer.entries),
    )


def some_later(layer: Layer) -> Layer:
    """Every third file has another time."""
    entries = [
        replace(entry, mtime_ns=entry.mtime_ns + SHIFT_NS)
        if entry.kind is EntryKind.FILE and number % 3 == 0
        else entry
        for number, entry in enumerate(layer.entries)
    ]
    return replace(layer, entries=tuple(entries))


def with_top(base: Image, reference: str, layer: Path, archive: Path) -> Image:
    write_with_layer(base, reference, layer.read_bytes(), archive)
    return replace(base, reference=reference, archive=archive)


# -- what is seen of them


@dataclass(frozen=True, slots=True)
class Look:
    """One layer as somebody sees it who has no business with where it is stored."""

    tar: str
    """The digest of a tar written from the mount of a view."""
    diff: str
    """The digest of what containerd says that the layer changed."""
    listing: tuple[str, ...]
    """Names, attributes and times, to say what differs."""


def looks(rig: Rig) -> dict[str, Look]:
    """Every layer in the store."""
    rig.collect_garbage()  # or containerd would remove a view that it does not know
    views: dict[str, tuple[str, tuple[str, ...]]] = {}
    with Client(str(rig.daemon.address)) as client:
        names = [info.name for info in client.list() if info.kind is Kind.COMMITTED]
        for name in names:
            (mount,) = client.view("looking", name)
            views[name] = read(rig, mount)
            client.remove("looking")
    found = {}
    for name, (tar, listing) in views.items():
        chain_id = name.rpartition("/")[2]
        diff = rig.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "diff", "--media-type", PLAIN_TAR, chain_id).stdout
        found[chain_id] = Look(tar, sha256(without_time_of_whiteouts(diff)), listing)
    return found


def read(rig: Rig, mount: Mount) -> tuple[str, tuple[str, ...]]:
    """The digest of a tar of it, and a listing, without the root itself, which has the time of its unpacking. Mounted
    where the daemon's mounts can be seen."""
    target = rig.base / "looked-at"
    target.mkdir(exist_ok=True)
    argv = ["mount", "-t", mount.type, "-o", ",".join(mount.options), mount.source, str(target)]
    if mount.type == "bind":
        argv[1:3] = []
    script = f"""
        {shlex.join(argv)}
        cd {target}
        {shlex.join(WRITE_TAR)} -- * | sha256sum
        find . -mindepth 1 -printf {shlex.quote(LISTING)} | sort
        cd /
        umount {target}
    """
    output = rig.run_in_namespace(["bash", "-ec", SHELL + script]).stdout
    digest, *listing = output.decode(errors="surrogateescape").splitlines()
    return digest.split()[0], tuple(listing)


def without_time_of_whiteouts(tar: bytes) -> bytes:
    """A whiteout in a diff has the time at which the diff was made."""
    changed = bytearray(tar)
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as archive:
        for member in archive:
            if os.path.basename(member.name).startswith(".wh."):
                changed[member.offset : member.offset_data] = bytes(member.offset_data - member.offset)
    return bytes(changed)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def rig_with(strategy: str, mode: str) -> Iterator[Rig]:
    """A fresh containerd, whose store has no alias at the end."""
    if reason := missing():
        skip(reason)
    with Rig(daemon_arguments=["--mount-mode", mode], dedup={"strategy": strategy}) as rig:
        yield rig
        print(rig.logs(100))
        assert find_aliases(rig) == []


@pytest.fixture(scope="module")
def undeduplicated(images: Sequence[Image]) -> dict[str, Look]:
    """What a store shows that shares nothing."""
    with rig_with("off", "daemon") as rig:
        for image in images:
            import_image(rig, image)
        return looks(rig)


FIRST, SECOND, LATER = "first", "second", "later"
"""The two builds, and the usual image with all times later, which is only in the way."""


@pytest.mark.containerd
@pytest.mark.parametrize(
    "strategy, mode, order",
    [
        ("stub", "daemon", (SECOND, FIRST)),
        ("hardlink", "client", (SECOND, FIRST)),
        *(
            pytest.param(*setting, order, marks=pytest.mark.nightly)
            for setting in (("stub", "daemon"), ("hardlink", "daemon"), ("hardlink", "client"))
            for order in ((FIRST, SECOND), (LATER, SECOND, FIRST), (FIRST, LATER, SECOND))
        ),
    ],
)
def test_every_layer_reads_as_if_nothing_were_shared(
    strategy: str,
    mode: str,
    order: Sequence[str],
    images: Sequence[Image],
    make_image: Callable[[Recipe], Image],
    undeduplicated: Mapping[str, Look],
) -> None:
    with rig_with(strategy, mode) as rig:
        for name in order:
            if name == LATER:
                import_image(rig, make_image(Recipe("example.test/later:latest", shift_ns=SHIFT_NS)))
            else:
                import_image(rig, images[(FIRST, SECOND).index(name)])
        assert any(rig.daemon_root.glob("objects/*/*")), "or this test proves nothing"
        seen = looks(rig)
    assert undeduplicated.keys() <= seen.keys()
    assert differences(undeduplicated, seen) == []


def differences(wanted: Mapping[str, Look], seen: Mapping[str, Look]) -> list[str]:
    lines = []
    for name, look in wanted.items():
        changed = sorted({*look.listing} ^ {*seen[name].listing})
        lines += [f"{name}: {line}" for line in changed[:10]]
        for what in ("tar", "diff"):
            if getattr(look, what) != getattr(seen[name], what):
                lines.append(f"{name}: the {what} is another")
    return lines


def test_every_kind_of_file_is_archived_as_if_nothing_were_shared(base: Path) -> None:
    top = base / "top"
    every_kind_of_file(top)
    original = write_tar(top, base / "original.tar")
    archives = set()
    for strategy in ("off", "stub", "hardlink"):
        directory = base / strategy
        directory.mkdir()
        with Host(directory, dedup={"strategy": strategy}) as host:
            host.unpack("lower", fill=functools.partial(extract, original))
            host.unpack("upper", "lower", fill=functools.partial(extract, original))
            for name in ("lower", "upper"):
                with host.viewed(name) as merged:
                    archives.add(sha256(write_tar(merged, base / "seen.tar").read_bytes()))
            assert strategy == "off" or any(host.root.glob("objects/*/*")), "or this test proves nothing"
    assert archives == {sha256(original.read_bytes())}


def every_kind_of_file(top: Path) -> None:
    """Over and under a block, with times, owners and modes of their own, the last directory's set last."""
    (top / "directory").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "größe", "long" * 60)):
        for size in (0, 1, 4095, 4096, 4097, 70_000):
            path = top / "directory" / f"{name[:240]}-{size}"
            path.write_bytes(bytes([number // 2 + 1]) * size)
            os.chown(path, 1000 * number, 3_000_000_000)
            path.chmod((0o4755, 0o600, 0, 0o2711)[number])
            os.utime(path, ns=(0, TIME_S * 10**9 + number // 3))
    labelled = top / "directory/a-70000"
    for label in ("user.z", "user.a", "trusted.m", "user.b"):
        os.setxattr(labelled, label, label.encode() * 9)
    run("setfacl", "--modify", "user:7:rw,group:8:r", labelled, top / "directory/a-4096")
    run("setfacl", "--default", "--modify", "user:7:rwx", top / "directory")
    os.setxattr(top / "directory/b-4097", "security.capability", CAP_NET_RAW)
    (top / "linked").hardlink_to(top / "directory/b-70000")
    (top / "small and linked").hardlink_to(top / "directory/b-1")
    (top / "link").symlink_to("directory/" + "x" * 100)
    os.mkfifo(top / "fifo")
    with (top / "sparse").open("wb") as stream:
        stream.seek(1 << 20)
        stream.write(b"end")
    os.truncate(top / "sparse", 3 << 20)
    for path in [*top.rglob("*"), top]:
        if path.is_dir() or not path.name[-1].isdigit():
            os.utime(path, ns=(0, TIME_S * 10**9 + 12_345), follow_symlinks=False)


# -- what they take of disk and memory


@pytest.fixture(scope="module")
def builds(
    pip_layer: Path, npm_layer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sequence[Sequence[Path]]]:
    """Two images as the archives of their layers, on a base that was built twice: whole packages, with some other
    times in the second."""
    directory = tmp_path_factory.mktemp("builds")
    top = directory / "top"
    top.mkdir()
    for deb in packages(("git",), ()):
        run("dpkg-deb", "--extract", deb, top)
    once = write_tar(top, directory / "once.tar")
    for number, (where, _, names) in enumerate(sorted(os.walk(top))):
        for path in (Path(where, name) for name in names if number % 3 == 0):
            if not path.is_symlink():
                os.utime(path, ns=(0, path.lstat().st_mtime_ns + SHIFT_NS))
    again = write_tar(top, directory / "again.tar")
    shutil.rmtree(top)
    yield [[once, pip_layer], [again, npm_layer, pip_layer]]
    shutil.rmtree(directory)


def links_of(builds: Sequence[Sequence[Path]]) -> dict[str, Groups]:
    """Of the layers that `unpack_image` makes."""
    return {
        layer_name(build, number): archive_links(archive)
        for build, layers in enumerate(builds)
        for number, archive in enumerate(layers)
    }


def layer_name(build: int, number: int) -> str:
    return f"layer {number} of build {build}"


def unpack_image(host: Host, build: int, layers: Sequence[Path]) -> str:
    """The name of its top snapshot."""
    parent = ""
    for number, archive in enumerate(layers):
        layer = layer_name(build, number)
        host.unpack(layer, parent, fill=functools.partial(extract, archive))
        parent = layer
    return parent


def extract(archive: Path, directory: Path) -> None:
    run("tar", "--extract", "--same-permissions", "--xattrs", "--xattrs-include=*", "--numeric-owner",
        "--file", archive, "--directory", directory)  # fmt: skip


def allocated_bytes(root: Path) -> int:
    """What the store takes, each inode once."""
    run("sync", "--file-system", root)
    found = run("du", "--summarize", "--total", "--block-size=1", root / "objects", root / "snapshots")
    return int(found.splitlines()[-1].split()[0])


@pytest.mark.parametrize("strategy", ["stub", "hardlink"])
def test_two_images_on_one_base_take_the_least_of_disk_and_memory(
    strategy: str, builds: Sequence[Sequence[Path]], base: Path
) -> None:
    bound = lower_bound.stub_bound(builds) if strategy == "stub" else lower_bound.hardlink_bound(builds)
    assert bound < 0.8 * lower_bound.plain_bytes(builds), "or this test proves nothing"
    with Host(base, dedup={"strategy": strategy, "never_link": []}) as host:
        one, other = (unpack_image(host, build, layers) for build, layers in enumerate(builds))
        assert allocated_bytes(host.root) <= TOLERANCE * bound
        assert alias_findings(host.client, host.root, links_of(builds)) == []
        with host.viewed(one) as first, host.viewed(other) as second:
            names = same_files(first, second)
            alike = [name for name in names if strategy == "stub" or same_time(name, first, second)]
            assert len(alike) > 500
            # All of the first image's: of two equal files there, either may be what the second image has.
            residency.evict([first / name for name in names])
            assert memory(second, alike) < all_pages(second, alike) / 100
            for name in names:
                residency.read(first / name)
            assert memory(second, alike) == all_pages(second, alike)


def memory(top: Path, names: Sequence[Path]) -> int:
    """Pages of these files that are in memory."""
    return sum(residency.resident_pages(top / name) for name in names)


def all_pages(top: Path, names: Sequence[Path]) -> int:
    return sum(residency.pages(top / name) for name in names)


def same_files(first: Path, second: Path) -> list[Path]:
    """The regular files of the base that are large enough to be stubs, as far as both have them."""
    paths = (Path(where, name) for where, _, names in os.walk(first / "usr") for name in names)
    found = [path.relative_to(first) for path in paths if not path.is_symlink() and path.stat().st_size >= 4096]
    return [name for name in found if (second / name).is_file()]


def same_time(name: Path, first: Path, second: Path) -> bool:
    return (first / name).stat().st_mtime_ns == (second / name).stat().st_mtime_ns


def test_a_stub_takes_an_inode_and_no_block(base: Path) -> None:
    with filesystem("ext4", base, 1 << 30) as disk, Host(base, root=disk / "root", dedup={"strategy": "stub"}) as host:
        device = run("findmnt", "--noheadings", "--output", "SOURCE", disk).decode().strip()
        described = run("tune2fs", "-l", device).decode().splitlines()
        assert [line.split()[-1] for line in described if line.startswith("Inode size:")] == ["256"]
        host.unpack("layer", fill=plain_and_labelled)
        (tree,) = host.layers("layer")
        for name in ("plain", "deep/" * 40 + "program"):
            stub = tree / name
            assert sorted(os.listxattr(stub)) == ["trusted.overlay.metacopy", "trusted.overlay.redirect"]
            assert stub.stat().st_size == 100_000
            assert stub.stat().st_blocks == 0
        # What does not fit into the inode is seen by the same measure.
        assert (tree / "labelled").stat().st_size == 100_000
        assert (tree / "labelled").stat().st_blocks > 0


def plain_and_labelled(tree: Path) -> None:
    deep = tree / ("deep/" * 40)
    deep.mkdir(parents=True)
    for path in (tree / "plain", tree / "labelled", deep / "program"):
        path.write_bytes(os.urandom(100_000))
    (deep / "program").chmod(0o4755)
    os.setxattr(tree / "labelled", "user.label", b"x" * 200)


# -- the checks


def layers_with_files(base: Path) -> tuple[Path, Path]:
    lower, upper = base / "lower", base / "upper"
    for layer in (lower, upper):
        (layer / "etc").mkdir(parents=True)
        for name in ("a", "b", "c"):
            (layer / "etc" / name).write_text("content")
    return lower, upper


def relink(path: Path, to: Path) -> None:
    path.unlink()
    path.hardlink_to(to)


def test_the_alias_checker_sees_two_paths_of_one_layer(base: Path) -> None:
    lower, upper = layers_with_files(base)
    relink(upper / "etc/b", upper / "etc/a")
    linked = {upper: links_of_tree(upper)}
    assert linked[upper] == {frozenset({b"etc/a", b"etc/b"})}
    assert aliases([[upper, lower]], linked) == []
    assert aliases([[upper, lower]], {}) == [aliases_line(upper, "etc/a", "etc/b")]
    relink(upper / "etc/c", upper / "etc/a")
    assert aliases([[lower], [upper, lower]], linked) == [aliases_line(upper, "etc/a", "etc/b", "etc/c")]


def aliases_line(layer: Path, *names: str) -> str:
    paths = [layer / name for name in names]
    return f"paths of one layer share inode {paths[0].stat().st_ino}: {' = '.join(map(str, paths))}"


def test_the_alias_checker_sees_two_layers_of_one_chain(base: Path) -> None:
    lower, upper = layers_with_files(base)
    relink(upper / "etc/b", lower / "etc/a")
    assert aliases([[lower], [upper]], {}) == [], "two chains may share"
    (found,) = aliases([[lower], [upper, lower]], {})
    assert found.startswith("layers of one chain share inode")
    assert {str(upper / "etc/b"), str(lower / "etc/a")} <= {*found.split()}


def test_the_alias_checker_takes_whiteouts_for_nothing(base: Path) -> None:
    lower, upper = layers_with_files(base)
    for layer in (lower, upper):
        os.mknod(layer / "gone", 0o20000, os.makedev(0, 0))
        (layer / "gone too").hardlink_to(layer / "gone")
    assert aliases([[upper, lower]], {}) == []


def test_the_alias_checker_sees_a_writable_file_that_is_stored(base: Path) -> None:
    lower, upper = layers_with_files(base)
    assert shared([upper], [lower]) == []
    relink(upper / "etc/a", lower / "etc/c")
    assert len(shared([upper], [lower])) == 1


def test_links_of_an_archive_are_those_that_it_makes(base: Path) -> None:
    lower, _ = layers_with_files(base)
    relink(lower / "etc/b", lower / "etc/a")
    (lower / "link").symlink_to("etc/a")
    with write_tar(lower, base / "layer.tar").open("rb") as stream:
        assert links_of_tar(stream) == {frozenset({b"etc/a", b"etc/b"})} == links_of_tree(lower)


def test_an_alias_in_the_store_is_found(base: Path) -> None:
    """As a careless deduplication would make it."""
    with Host(base, dedup={"strategy": "off"}) as host:
        host.expected_errors |= {"alias", "upper-shared"}
        host.unpack("lower", fill=lambda tree: (tree / "file").write_text("content"))
        host.unpack("upper", "lower", fill=lambda tree: (tree / "other").write_text("content"))
        host.client.prepare("container", "upper")
        assert alias_findings(host.client, host.root, {}) == []
        upper, lower = host.layers("upper")
        relink(upper / "other", lower / "file")
        (host.upper("container") / "copied").hardlink_to(lower / "file")
        assert {finding.partition(" share")[0] for finding in alias_findings(host.client, host.root, {})} == {
            "layers of one chain", "a writable file",
        }  # fmt: skip


def test_a_difference_of_one_time_is_seen(base: Path) -> None:
    lower, _ = layers_with_files(base)
    before = write_tar(lower, base / "before.tar").read_bytes()
    os.utime(lower / "etc", ns=(0, (lower / "etc").stat().st_mtime_ns + 1))
    assert write_tar(lower, base / "after.tar").read_bytes() != before


def test_residency_is_of_the_file_and_not_of_its_content(base: Path) -> None:
    first, linked, equal = base / "first", base / "linked", base / "equal"
    for path in (first, equal):
        path.write_bytes(os.urandom(100_000))
    linked.hardlink_to(first)
    residency.evict([first, equal])
    assert [residency.resident_pages(path) for path in (linked, equal)] == [0, 0]
    residency.read(first)
    assert [residency.resident_pages(path) for path in (linked, equal)] == [residency.pages(first), 0]


def test_the_lower_bound_counts_what_a_chain_needs(base: Path) -> None:
    lower, upper = layers_with_files(base)
    for number, path in enumerate([lower / "etc/a", lower / "etc/b", upper / "etc/a", upper / "etc/c"]):
        path.write_bytes(b"x" * 5000)
        os.utime(path, (TIME_S, TIME_S + number // 3))
    archives = [write_tar(layer, base / f"{layer.name}.tar") for layer in (lower, upper)]
    # Two directories a layer; two blocks a file of 5,000 bytes, one a small file.
    blocks = [bound // 4096 for bound in (lower_bound.plain_bytes([archives]), lower_bound.stub_bound([archives]))]
    assert blocks == [4 + 4 * 2 + 2, 4 + 2 + 2]
    for path in (lower / "etc/c", upper / "etc/b"):
        os.utime(path, (TIME_S, TIME_S))
    archives = [write_tar(layer, base / f"{layer.name} again.tar") for layer in (lower, upper)]
    assert lower_bound.hardlink_bound([archives]) // 4096 == 4 + (3 + 1) * 2 + 2
    apart = [[archives[0]], [archives[1]]]
    assert lower_bound.hardlink_bound(apart) // 4096 == 4 + (2 + 1) * 2 + 1
    assert lower_bound.hardlink_bound(apart, ["e*/[bc]"]) // 4096 == 4 + (1 + 0) * 2 + 2 + 1 + 2 + 1
