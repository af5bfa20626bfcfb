"""What fsck.overlay finds, and what it makes of it.

Each case seeds one corruption with plain system calls into an overlay that the kernel made. It is found, by its id and
nothing else; without consent nothing is changed; after the repair a second run finds nothing, and the overlay, mounted
again, shows what it showed before.
"""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from snapshotter import linux
from snapshotter.fsck_overlay import handles
from snapshotter.fsck_overlay.findings import KINDS, Consent, table
from snapshotter.fsck_overlay.layers import opened
from snapshotter.overlay.attributes import TRUSTED
from tests.rig.filesystem import filesystem
from tests.rig.namespace import CHECKOUT
from tests.rig.random_overlay import Directories, fsck
from tests.rig.seen import Seen, seen

pytestmark = pytest.mark.root

PREFIX = "trusted.overlay."
FEATURES = {"index": "on", "metacopy": "on", "redirect_dir": "on"}
NFS = {"index": "on", "nfs_export": "on", "redirect_dir": "on", "metacopy": "off"}


@dataclass(frozen=True)
class Case:
    kind: str
    seed: Callable[[Directories], object]
    use: Callable[[Path], object] = lambda _merged: None
    """What is done with the overlay before."""
    features: dict[str, str] | None = None
    adds: tuple[str, ...] = ()
    """What the corruption brings into the view."""
    loses: tuple[str, ...] = ()
    """What the repair must take from the view."""
    keeps_links: bool = True
    also: tuple[str, ...] = ()
    """Ids that come with it."""


@pytest.fixture
def ground(base: Path) -> Iterator[Path]:
    """A tmpfs: unmounting an overlay syncs the filesystem of its upper."""
    place = base / "t"
    place.mkdir()
    linux.mount("tmpfs", str(place), "tmpfs", 0, "mode=755,size=64m")
    yield place
    linux.umount2(str(place), linux.MNT_DETACH)


@pytest.fixture
def overlay(ground: Path) -> Directories:
    """Two lowers, with a file, hard links and directories that both have."""
    made = Directories(ground)
    for name in ("lower", "lower2"):
        lower = made.lower(name)
        for path in ("d", "e", "e/sub"):
            (lower / path).mkdir()
        (lower / "file").write_text(f"file of {name}")
        (lower / f"d/{name}").write_text(name)
        (lower / "e/sub/one").write_text("one")
        (lower / "big").write_bytes(b"big" * 5000)
        for link in ("h1", "h2", "h3"):
            if link == "h1":
                (lower / link).write_text("linked")
            else:
                os.link(lower / "h1", lower / link)
    return made


def setxattr(path: Path, name: str, value: bytes) -> None:
    os.setxattr(path, PREFIX + name, value, follow_symlinks=False)


def removexattr(path: Path, name: str) -> None:
    os.removexattr(path, PREFIX + name, follow_symlinks=False)


def getxattr(path: Path, name: str) -> bytes | None:
    try:
        return os.getxattr(path, PREFIX + name, follow_symlinks=False)
    except OSError:
        return None


def whiteout(path: Path) -> None:
    os.mknod(path, 0o020000, 0)


def entry(overlay: Directories) -> Path:
    """The one entry of the index."""
    (found,) = (overlay.work / "index").iterdir()
    return found


def handle_of(overlay: Directories, path: Path) -> bytes:
    """What overlayfs would store for a file or directory of a lower."""
    lowers = [str(lower) for lower in overlay.lowers]
    with opened(lowers, [], str(overlay.upper), str(overlay.work), TRUSTED) as layers:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
        try:
            found = handles.of_directory(layers.lowers[0], fd, of_upper=False)
        finally:
            os.close(fd)
    assert found
    return found


# -- what is done before


def rename_directory(merged: Path) -> None:
    (merged / "d").rename(merged / "renamed")


def use_every_name(merged: Path) -> None:
    for name in ("h1", "h2", "h3"):
        with (merged / name).open("a") as stream:
            stream.write("!")


def use_one_name(merged: Path) -> None:
    (merged / "h1").write_text("only the index knows that h2 has this")


def copy_up_directories(merged: Path) -> None:
    (merged / "e/sub/two").write_text("two")


def make_opaque(merged: Path) -> None:
    shutil.rmtree(merged / "d")
    (merged / "d").mkdir()
    (merged / "d/new").write_text("new")


# -- corruptions


def seed_dangling(overlay: Directories) -> None:
    (overlay.upper / "made").mkdir()
    setxattr(overlay.upper / "made", "redirect", b"/nowhere/at/all")


def seed_malformed_redirect(overlay: Directories) -> None:
    setxattr(overlay.upper / "d", "redirect", b"a/b")
    removexattr(overlay.upper / "d", "opaque")


def seed_dangling_merge(overlay: Directories) -> None:
    setxattr(overlay.upper / "d", "redirect", b"/nowhere")
    removexattr(overlay.upper / "d", "opaque")


def seed_duplicate(overlay: Directories) -> None:
    (overlay.upper / "zz").mkdir()
    setxattr(overlay.upper / "zz", "redirect", b"d")


def seed_duplicate_of_lower(overlay: Directories) -> None:
    """The upper's own directory of the name has it already."""
    (overlay.upper / "zz").mkdir()
    setxattr(overlay.upper / "zz", "redirect", b"/e")


def seed_uncovered_deep(overlay: Directories) -> None:
    """renamed/sub was e/sub, and its whiteout was where e is shown now."""
    (overlay.upper / "renamed/sub").unlink()


def rename_twice(merged: Path) -> None:
    (merged / "e").rename(merged / "renamed")
    (merged / "renamed/sub").rename(merged / "sub")


def seed_unmarked(overlay: Directories) -> None:
    removexattr(overlay.lowers[0] / "d", "opaque")


def seed_stale(overlay: Directories) -> None:
    """An entry for a file of the lower that is gone."""
    path = overlay.lowers[0] / "gone"
    path.write_text("gone")
    name = handle_of(overlay, path)
    path.unlink()
    (overlay.work / "index" / name.hex()).write_text("its data")
    setxattr(overlay.work / "index" / name.hex(), "origin", name)


def seed_index_type(overlay: Directories) -> None:
    name = handle_of(overlay, overlay.lowers[0] / "d")
    (overlay.work / "index" / name.hex()).write_text("a file")
    setxattr(overlay.work / "index" / name.hex(), "origin", name)


def seed_index_whiteout(overlay: Directories) -> None:
    whiteout(overlay.work / "index" / handle_of(overlay, overlay.lowers[0] / "file").hex())


def seed_index_whiteout_of_directory(overlay: Directories) -> None:
    whiteout(overlay.work / "index" / handle_of(overlay, overlay.lowers[0] / "e/sub").hex())


def index_directory(overlay: Directories, path: str) -> Path:
    """The index's entry for a directory of the upper."""
    origin = getxattr(overlay.upper / path, "origin")
    assert origin
    return overlay.work / "index" / origin.hex()


CASES = [
    Case("whiteout-orphan", lambda o: whiteout(o.upper / "nothing")),
    Case("whiteout-orphan", lambda o: whiteout(o.upper / "d/gone"), make_opaque, FEATURES),
    Case("whiteout-orphan", lambda o: whiteout(o.lowers[1] / "nothing")),
    Case("whiteout-unmarked", seed_unmarked),
    Case("redirect-dangling", seed_dangling, adds=("made",)),
    Case("redirect-dangling-merge", seed_dangling_merge, make_opaque, FEATURES),
    Case("redirect-dangling-merge", seed_malformed_redirect, make_opaque, FEATURES),
    Case("redirect-uncovered", lambda o: (o.upper / "d").unlink(), rename_directory, FEATURES),
    Case("redirect-uncovered", seed_uncovered_deep, rename_twice, FEATURES),
    Case("redirect-duplicate", seed_duplicate, rename_directory, FEATURES, adds=("zz",)),
    Case("redirect-duplicate", seed_duplicate_of_lower, copy_up_directories, FEATURES, adds=("zz",)),
    Case("impure-missing", lambda o: removexattr(o.upper, "impure"), copy_up_directories),
    Case("impure-missing", lambda o: removexattr(o.upper / "e", "impure"), copy_up_directories),
    Case("impure-missing", lambda o: removexattr(o.upper, "impure"), lambda m: (m / "file").chmod(0), FEATURES),
    Case(
        "origin-invalid", lambda o: setxattr(o.upper / "file", "origin", b"no handle"), lambda m: (m / "file").chmod(0)
    ),
    Case(
        "origin-type",
        lambda o: setxattr(o.upper / "file", "origin", handle_of(o, o.lowers[0] / "d")),
        lambda m: (m / "file").write_text("changed"),
    ),
    Case(
        "origin-directory",
        lambda o: setxattr(o.upper / "e/sub", "origin", handle_of(o, o.lowers[0] / "d")),
        copy_up_directories,
        NFS,
        also=("index-directory",),
    ),
    Case(
        "metacopy-value",
        lambda o: setxattr(o.upper / "big", "metacopy", b"x"),
        lambda m: (m / "big").chmod(0),
        FEATURES,
    ),
    Case(
        "metacopy-no-data",
        lambda o: setxattr(o.upper / "big", "redirect", b"/gone"),
        lambda m: (m / "big").chmod(0),
        FEATURES,
        loses=("big",),
    ),
    Case("uuid-size", lambda o: setxattr(o.upper, "uuid", b"short")),
    Case(
        "index-foreign",
        lambda o: setxattr(o.work / "index", "upper", handle_of(o, o.lowers[0])),
        use_every_name,
        FEATURES,
        keeps_links=False,  # lost+found has one
    ),
    Case("index-stray", lambda o: (o.work / "index/stray").write_text("?"), use_one_name, FEATURES),
    Case("index-stray", lambda o: (o.work / "index" / ("00" * 40)).mkdir(), use_one_name, FEATURES),
    Case("index-origin", lambda o: removexattr(entry(o), "origin"), use_one_name, FEATURES),
    Case(
        "index-origin",
        lambda o: setxattr(o.upper / "h1", "origin", handle_of(o, o.lowers[0] / "file")),
        use_one_name,
        FEATURES,
    ),
    Case("index-stale", seed_stale, use_one_name, FEATURES),
    Case("index-type", seed_index_type, use_one_name, FEATURES),
    Case("index-whiteout", seed_index_whiteout, features=NFS),
    Case("index-whiteout", seed_index_whiteout_of_directory, features=NFS),
    *(
        Case("index-nlink", lambda o, value=value: setxattr(entry(o), "nlink", value), use_one_name, FEATURES)  # type: ignore[misc]
        for value in (b"", b"U", b"X+1", b"U+99", b"L-9", b"+1")
    ),
    Case("index-nlink", lambda o: removexattr(entry(o), "nlink"), use_one_name, FEATURES),
    Case("index-nlink", lambda o: removexattr(entry(o), "nlink"), lambda m: (m / "h2").unlink(), FEATURES),
    Case(
        "index-directory",
        lambda o: setxattr(index_directory(o, "e/sub"), "upper", getxattr(index_directory(o, "e"), "upper") or b""),
        copy_up_directories,
        NFS,
    ),
    Case("index-directory", lambda o: removexattr(index_directory(o, "e"), "upper"), copy_up_directories, NFS),
]


def prepared(overlay: Directories, case: Case) -> dict[str, Seen]:
    """Uses the overlay, seeds the corruption, and returns what was to be seen before."""
    if case.kind == "whiteout-unmarked":
        hide_by_attribute(overlay)
    with overlay.mount(**(case.features or {})) as merged:
        case.use(merged)
    with overlay.mount(**(case.features or {})) as merged:
        before = seen(merged)
    assert overlay.found() == []
    with times_kept(overlay.upper, *overlay.lowers):
        case.seed(overlay)
    return before


@contextmanager
def times_kept(*trees: Path) -> Iterator[None]:
    """Of the directories that are there already."""
    paths = [path for tree in trees for path in (tree, *tree.rglob("*")) if path.is_dir()]
    times = {path: path.stat().st_mtime_ns for path in paths}
    yield
    for path, time_ns in times.items():
        os.utime(path, ns=(time_ns, time_ns))


def hide_by_attribute(overlay: Directories) -> None:
    hidden = overlay.lowers[0] / "d/lower2"
    hidden.touch()
    setxattr(hidden, "whiteout", b"")
    setxattr(overlay.lowers[0] / "d", "opaque", b"x")


def ids(overlay: Directories) -> set[str]:
    return {line.split()[0] for line in overlay.found()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_a_corruption_is_found_and_repaired(overlay: Directories, case: Case) -> None:
    before = prepared(overlay, case)
    assert ids(overlay) - {"impure-missing"} == {case.kind, *case.also} - {"impure-missing"}
    assert case.kind in ids(overlay)

    found = overlay.fsck("-n")
    assert (found.returncode, case.kind in found.stdout) == (4, True), found
    careful = overlay.fsck("-p")
    is_safe = all(KINDS[kind].consent is Consent.SAFE for kind in (case.kind, *case.also))
    assert careful.returncode == (1 if is_safe else 4), careful
    if not is_safe:
        assert case.kind in ids(overlay)
        done = overlay.fsck("-y")
        assert done.returncode == 1, done
    again = overlay.fsck("-n", "-v")
    assert (again.returncode, again.stdout.splitlines()[-1]) == (0, "clean"), again

    with overlay.mount(**(case.features or {})) as merged:
        after = seen(merged)
    for path in case.adds:
        del after[path]
    for path in case.loses:
        del before[path]
    if not case.keeps_links:
        before, after = without_links(before), without_links(after)
    assert after == before


def without_links(tree: dict[str, Seen]) -> dict[str, Seen]:
    return {path: replace(entry, links=0) for path, entry in tree.items()}


def test_every_kind_has_a_case() -> None:
    assert {case.kind for case in CASES} == KINDS.keys() - {"lower-replaced", "metacopy-size"}


def test_data_of_another_size_is_only_reported(overlay: Directories) -> None:
    with overlay.mount(**FEATURES) as merged:
        (merged / "big").chmod(0)
    os.truncate(overlay.lowers[0] / "big", 100)
    done = overlay.fsck("-y")
    assert done.returncode == 4
    assert "[metacopy-size]" in done.stdout


# -- the wrong lower


def replaced_by_a_copy(overlay: Directories) -> None:
    lower = overlay.lowers[0]
    lower.rename(lower.with_name("old"))
    shutil.copytree(lower.with_name("old"), lower, symlinks=True)


def replaced_by_nothing(overlay: Directories) -> None:
    for lower in overlay.lowers:
        shutil.rmtree(lower)
        lower.mkdir()


def use_all_ways(merged: Path) -> None:
    (merged / "file").unlink()
    (merged / "e/sub/one").unlink()
    (merged / "big").chmod(0o600)
    (merged / "h1").write_text("changed")


@pytest.mark.parametrize("features", [{"index": "on"}, FEATURES], ids=["index", "all"])
def test_a_copy_of_the_lower_is_refused_where_the_index_was_used(
    overlay: Directories, features: dict[str, str]
) -> None:
    with overlay.mount(**features) as merged:
        use_all_ways(merged)
    replaced_by_a_copy(overlay)
    assert_only_the_lower_is_wrong(overlay)


@pytest.mark.parametrize("features", [{"index": "off"}, {"metacopy": "on", "redirect_dir": "on"}, {"index": "on"}])
def test_nothing_is_offered_where_the_lower_is_another_one(overlay: Directories, features: dict[str, str]) -> None:
    with overlay.mount(**features) as merged:
        use_all_ways(merged)
    replaced_by_nothing(overlay)
    assert_only_the_lower_is_wrong(overlay)


def test_inodes_of_another_filesystem_with_the_same_numbers_are_others(base: Path, ground: Path) -> None:
    """The root of every fresh ext4 has the same handle but for the UUID."""
    made = Directories(ground)
    made.lowers = [base / "ext4"]
    for number in range(2):
        with filesystem("ext4", base, 4 << 20) as lower:
            (lower / "file").write_text("file")
            if number == 0:
                with made.mount(index="on") as merged:
                    (merged / "file").unlink()
                assert made.found() == []
            else:
                assert_only_the_lower_is_wrong(made)


def assert_only_the_lower_is_wrong(overlay: Directories) -> None:
    before = sorted(overlay.base.rglob("*"))
    done = overlay.fsck("-y")
    assert done.returncode == 4, done
    assert "this is not the lower that the upper was made on" in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("[")] == done.stdout.splitlines()[:1]
    assert sorted(overlay.base.rglob("*")) == before


def test_a_copy_of_the_lower_is_as_good_where_no_feature_needs_the_old_one(overlay: Directories) -> None:
    with overlay.mount(index="off") as merged:
        use_all_ways(merged)
    replaced_by_a_copy(overlay)
    done = overlay.fsck("-n", "-v")
    assert done.returncode == 0, done
    assert "are not those that were copied up" in done.stdout


# -- what is refused


@pytest.mark.parametrize("where", ["upper/file", "upper", "lower/d", "lower2/file"])
def test_an_unknown_attribute_is_refused_by_name(overlay: Directories, where: str) -> None:
    (overlay.upper / "file").touch()
    setxattr(overlay.base / where, "invention", b"1")
    whiteout(overlay.upper / "orphan")
    done = overlay.fsck("-y")
    assert done.returncode == 8
    assert "trusted.overlay.invention" in done.stderr
    assert f'{overlay.base / where}"' in done.stderr
    assert (overlay.upper / "orphan").lstat()


def test_escaped_attributes_are_data(overlay: Directories) -> None:
    (overlay.upper / "file").touch()
    setxattr(overlay.upper / "file", "overlay.invention", b"1")
    os.setxattr(overlay.upper / "file", "user.overlay.redirect", b"/nowhere")
    assert overlay.fsck("-n").returncode == 0


def test_an_unknown_feature_of_the_work_directory_is_refused(overlay: Directories) -> None:
    (overlay.work / "work/incompat/invention").mkdir(parents=True)
    done = overlay.fsck("-y")
    assert (done.returncode, "incompat/invention" in done.stderr) == (8, True)


def test_a_later_version_of_a_handle_is_refused(overlay: Directories) -> None:
    with overlay.mount(**FEATURES) as merged:
        use_one_name(merged)
    origin = bytearray(getxattr(overlay.upper / "h1", "origin") or b"")
    origin[0] = 1
    setxattr(overlay.upper / "h1", "origin", bytes(origin))
    assert overlay.fsck("-y").returncode == 8


@pytest.mark.parametrize("index", ["on", "off"])
def test_a_mounted_overlay_is_refused(overlay: Directories, index: str) -> None:
    with overlay.mount(index=index) as merged:
        done = overlay.fsck("-n")
    assert (done.returncode, f"mounted at {merged}" in done.stderr) == (8, True), done


def test_an_overlay_that_only_a_detached_mount_has_is_refused(overlay: Directories) -> None:
    """No mount table has it: the kernel itself says so."""
    linux.mount("x", str(overlay.merged), "overlay", 0, overlay.options())
    fd = os.open(overlay.merged, os.O_RDONLY)
    try:
        linux.umount2(str(overlay.merged), linux.MNT_DETACH)
        done = overlay.fsck("-n")
        assert (done.returncode, "mounted" in done.stderr) == (8, True), done
    finally:
        os.close(fd)


def test_an_overlay_that_another_namespace_has_is_refused(overlay: Directories) -> None:
    script = f"mount -t overlay x -o {overlay.options()} {overlay.merged} && echo ready && exec cat"
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin and holder.stdout
        assert holder.stdout.readline() == b"ready\n"
        done = overlay.fsck("-n")
        holder.stdin.close()
    assert (done.returncode, "mounted" in done.stderr) == (8, True), done


def test_a_lower_that_a_mounted_overlay_has_is_not_changed(overlay: Directories) -> None:
    whiteout(overlay.lowers[1] / "orphan")
    other = Directories(overlay.base / "other", overlay.lowers[1:])
    with other.mount():
        done = overlay.fsck("-y")
    assert done.returncode == 4, done
    assert (overlay.lowers[1] / "orphan").lstat()
    assert overlay.fsck("-y").returncode == 1


# -- the interface


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["-o", "upperdir=/u,workdir=/w"],
        ["-o", "lowerdir=/l"],
        ["-o", "lowerdir=/l,upperdir=/u"],
        ["-o", "lowerdir=/l:/m,sometimes=yes"],
        ["-o", "lowerdir=/a::", "-n"],
        ["-o", "lowerdir=/a:/b", "-n", "-y"],
        ["-o", "lowerdir=/a:/b", "-x"],
        ["-o"],
    ],
)
def test_wrong_usage_is_16(words: list[str]) -> None:
    assert fsck(*words).returncode == 16


def test_what_cannot_be_opened_is_8(overlay: Directories) -> None:
    done = fsck("-o", f"lowerdir={overlay.base}/missing,upperdir={overlay.upper},workdir={overlay.work}")
    assert (done.returncode, done.stderr.count("\n")) == (8, 1)


def test_help_and_version() -> None:
    assert (
        fsck("-h").returncode == fsck("--help").returncode == fsck("-V").returncode == fsck("--version").returncode == 0
    )


def test_options_may_be_apart_and_escaped(overlay: Directories) -> None:
    """As mount(8) takes them."""
    strange = overlay.base / "a,b:c\\d"
    strange.mkdir()
    whiteout(overlay.upper / "orphan")
    escaped = str(strange).replace("\\", r"\\").replace(",", r"\,").replace(":", r"\:")
    whiteout(strange / "another")
    done = fsck(
        "-o", f"lowerdir={escaped}", "-o", f"upperdir={overlay.upper}", "-o", f"rw,workdir={overlay.work}", "-y"
    )
    assert done.returncode == 1, done
    assert list(strange.iterdir()) == list(overlay.upper.iterdir()) == []


def test_lowers_alone_are_checked(overlay: Directories) -> None:
    whiteout(overlay.lowers[0] / "orphan")
    lowers = f"lowerdir={overlay.lowers[0]}:{overlay.lowers[1]}"
    assert [fsck("-o", lowers, mode).returncode for mode in ("-n", "-p", "-n")] == [4, 1, 0]


def test_without_a_terminal_nothing_is_changed(overlay: Directories) -> None:
    whiteout(overlay.upper / "orphan")
    assert overlay.fsck().returncode == 4
    assert (overlay.upper / "orphan").lstat()


@pytest.mark.parametrize(
    ("answer", "status"), [(b"what?\ny\n", 1), (b"n\n", 4), (b"\x03", 32)], ids=["yes", "no", "^C"]
)
def test_on_a_terminal_it_asks(overlay: Directories, answer: bytes, status: int) -> None:
    whiteout(overlay.upper / "orphan")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(CHECKOUT)
        os.execv(sys.executable, [sys.executable, "-m", "snapshotter.fsck_overlay", "-o", overlay.options()])
    said = b""
    while b"(y/n)" not in said:
        said += os.read(terminal, 4096)
    os.write(terminal, answer)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
    os.close(terminal)
    assert b"[whiteout-orphan]" in said
    assert bool(list(overlay.upper.iterdir())) == (status != 1)


def test_the_table_in_the_documents_is_that_of_the_code() -> None:
    text = (CHECKOUT / "docs/fsck.overlay.md").read_text()
    assert table() in text, "replace it with the output of: python -m snapshotter.fsck_overlay.findings"


# -- redirects through several layers


def three_layers(ground: Path) -> tuple[Directories, Path, Path, Path]:
    """Nothing in them yet but, in the lowest, x/sub/file."""
    overlay = Directories(ground)
    middle, lowest = overlay.lower("middle"), overlay.lower("lowest")
    (lowest / "x/sub").mkdir(parents=True)
    (lowest / "x/sub/file").write_text("file")
    return overlay, overlay.upper, middle, lowest


def redirected(path: Path, target: bytes) -> None:
    path.mkdir(parents=True, exist_ok=True)
    setxattr(path, "redirect", target)


def test_a_path_is_redirected_again_on_its_way_down(ground: Path) -> None:
    """In the middle p/x was renamed to p/y, then in the upper p/y/sub to z, where its file was removed."""
    overlay, upper, middle, lowest = three_layers(ground)
    (lowest / "p").mkdir()
    (lowest / "x").rename(lowest / "p/x")
    redirected(middle / "p/y", b"x")
    whiteout(middle / "p/x")
    redirected(upper / "z", b"/p/y/sub")
    (upper / "p/y").mkdir(parents=True)
    for path in (upper / "p/y/sub", upper / "z/file"):
        whiteout(path)
    for path in (upper, upper / "p"):
        setxattr(path, "impure", b"y")
    assert overlay.found() == []
    with overlay.mount(redirect_dir="on") as merged:
        assert [sorted(os.listdir(merged / path)) for path in (".", "p", "p/y", "z")] == [["p", "z"], ["y"], [], []]


def test_a_redirect_in_an_opaque_directory_is_followed(ground: Path) -> None:
    """In the middle too, where the path to it goes through the opaque directory."""
    overlay, upper, middle, _ = three_layers(ground)
    (middle / "o").mkdir()
    setxattr(middle / "o", "opaque", b"y")
    redirected(middle / "o/moved", b"/x/sub")
    (middle / "x").mkdir()
    whiteout(middle / "x/sub")
    redirected(upper / "again", b"/o/moved")
    (upper / "o").mkdir()
    for path in (upper / "o/moved", upper / "again/file"):
        whiteout(path)
    setxattr(upper, "impure", b"y")
    assert overlay.found() == []
    with overlay.mount(redirect_dir="on") as merged:
        assert list((merged / "again").iterdir()) == list((merged / "o").iterdir()) == []


def test_a_lower_layer_may_show_a_directory_twice(ground: Path) -> None:
    overlay, _, middle, _ = three_layers(ground)
    redirected(middle / "y", b"x")
    assert overlay.found() == []


def test_what_a_lower_layer_moved_cannot_be_had_under_another_redirect(ground: Path) -> None:
    """And nothing is hidden while it is open which of them is right."""
    overlay, upper, middle, _ = three_layers(ground)
    redirected(middle / "y", b"x")
    redirected(upper / "z", b"x")
    setxattr(upper, "impure", b"y")
    assert [line.split()[:2] for line in overlay.found()] == [["redirect-duplicate", f'"{upper}/z"']]
    assert overlay.fsck("-p").returncode == 4
    assert list(upper.iterdir()) == [upper / "z"]
    assert overlay.fsck("-y").returncode == 1
    assert (getxattr(middle / "y", "redirect"), getxattr(upper / "z", "redirect")) == (b"x", None)


def test_two_redirects_and_the_old_place(ground: Path) -> None:
    overlay, upper, _, _ = three_layers(ground)
    redirected(upper / "a", b"x")
    redirected(upper / "b", b"x")
    setxattr(upper, "impure", b"y")
    assert [line.split()[0] for line in overlay.found()] == ["redirect-duplicate"]
    assert overlay.fsck("-y").returncode == 1
    with overlay.mount(redirect_dir="on") as merged:
        assert sorted(os.listdir(merged)) == ["a", "b"]
        assert list((merged / "b").iterdir()) == []


def test_a_whiteout_is_put_where_the_upper_has_no_directory_yet(ground: Path) -> None:
    """The directories down to it are made like those that show there."""
    overlay, upper, _, lowest = three_layers(ground)
    (lowest / "x").chmod(0o750)
    os.chown(lowest / "x", 12, 34)
    os.setxattr(lowest / "x", "user.note", b"kept")
    os.utime(lowest / "x", ns=(10**18, 10**18))
    redirected(upper / "z", b"/x/sub")
    with overlay.mount(redirect_dir="on") as merged:
        before = seen(merged / "x")["."]
    assert overlay.fsck("-p").returncode == 1
    with overlay.mount(redirect_dir="on") as merged:
        assert seen(merged / "x") == {".": before}
        assert (merged / "z/file").read_text() == "file"
