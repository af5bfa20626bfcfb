"""Layers that are made to be obeyed: attributes by which an image would show what is not its own.

Proves: of an extraction snapshot overlay obeys nothing but whiteouts and opaque directories, whatever is on its files,
directories, symlinks or root; what is taken off is logged with its path, or the layer is refused; nothing is ever
taken off what a mount wrote; what a container writes under these names stays its data.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from snapshotter import layer, linux
from snapshotter.errors import FailedPrecondition
from snapshotter.overlay.attributes import TRUSTED
from tests.rig.host import Host, upper_of
from tests.rig.seen import Seen, seen, without_times, xattrs_of

pytestmark = pytest.mark.root

SECRET = b"of another image" * 1000
OWN = b"of the image itself" * 1000
NAMES = (".", "d", "d/empty", "d/file", "file", "again", "link", "fifo", "device", "new\nline", "\udcff")
"""What the hostile image has."""
DEAD = ("origin", "impure", "nlink", "uuid", "upper", "protattr")
VERITY = b"\x00\x24\x00\x01" + b"\x5a" * 32
"""struct ovl_metacopy (fs/overlayfs/overlayfs.h): version, length, flags, algorithm, digest."""


def image(tree: Path) -> None:
    """Everything that `NAMES` lists."""
    (tree / "d/empty").mkdir(parents=True)
    (tree / "file").write_bytes(OWN)
    os.link(tree / "file", tree / "again")
    for path in ("d/file", "new\nline", "\udcff"):
        (tree / path).write_bytes(OWN)
    (tree / "link").symlink_to("/etc/passwd")
    os.mkfifo(tree / "fifo")
    os.mknod(tree / "device", 0o20600, os.makedev(1, 3))
    for path in sorted(NAMES, reverse=True):
        os.utime(tree / path, ns=(1, 10**18), follow_symlinks=False)


def crafted(stub: bytes) -> list[tuple[str, bytes]]:
    """What no image may bring. `stub`: the path of an object of another image."""
    redirects = [b"/etc/passwd", b"/etc", b"../../../../../etc/passwd", b"/../../etc", b"/", b"d", stub, stub[1:], b""]
    return [
        *(("trusted.overlay.redirect", redirect) for redirect in redirects),
        ("trusted.overlay.metacopy", b""),
        ("trusted.overlay.metacopy", VERITY),
        ("trusted.overlay.metacopy", b"\xff" * 100),
        ("trusted.overlay.future", b"y"),
        ("trusted.overlay.", b"y"),
        ("trusted.dedup.blake3", b"x" * 32),
        *((f"user.overlay.{name}", b"/etc") for name in ("redirect", "metacopy", "opaque", "whiteout", "origin")),
    ]


def put(path: Path, name: str, value: bytes) -> bool:
    """Whether the path takes the attribute: symlinks and devices take none under user."""
    try:
        os.setxattr(path, name, value, follow_symlinks=False)
    except OSError:
        assert name.startswith("user.") or not name.rpartition(".")[2], f"{path} takes no {name}"
        return False
    return True


def readable(tree: dict[str, Seen]) -> dict[str, Seen]:
    """Without what differs between an upper, a stub and a mount."""
    return {path: replace(entry, links=0) for path, entry in tree.items()}


@pytest.fixture(params=["stub", "hardlink"])
def host(base: Path, request: pytest.FixtureRequest) -> Iterator[Host]:
    with Host(base, dedup={"strategy": request.param}) as running:
        running.unpack("victim", fill=lambda tree: (tree / "secret").write_bytes(SECRET))
        yield running


def stub_of_the_victim(host: Host) -> bytes:
    found = xattrs_of(host.layers("victim")[0] / "secret").get("trusted.overlay.redirect")
    return found or b"/" + os.fsencode(
        str(next((host.root / "objects").glob("*/*")).relative_to(host.root / "objects"))
    )


def test_an_image_is_obeyed_in_nothing_but_what_it_hides(host: Host) -> None:
    """Every attribute on everything, in as many images; all must read as the one without any."""
    host.unpack("honest", "victim", fill=image)
    honest = host.layers("honest")[0]
    with host.viewed("honest") as merged:
        expected = readable(seen(merged))
    assert len(expected) == len(NAMES) + 1
    for number, (name, value) in enumerate(crafted(stub_of_the_victim(host))):

        def fill(tree: Path, name: str = name, value: bytes = value) -> None:
            image(tree)
            assert any([put(tree / path, name, value) for path in NAMES])

        crafted_image = f"crafted {number}"
        host.unpack(crafted_image, "victim", fill=fill)
        tree = host.layers(crafted_image)[0]
        with host.viewed(crafted_image) as merged:
            assert readable(seen(merged)) == expected, (name, value)
        for path in NAMES:
            assert xattrs_of(tree / path) == xattrs_of(honest / path), (path, name, value)
    with host.running("container", crafted_image) as merged:
        assert readable(without_times(seen(merged))) == readable(without_times(expected))
        (merged / "file").write_bytes(b"changed")
        (merged / "d").chmod(0o700)
    host.client.commit("changed", "container")
    with host.viewed("changed") as merged:
        assert (merged / "again").read_bytes() == b"changed"
    with host.viewed("victim") as merged:
        assert (merged / "secret").read_bytes() == SECRET


def test_what_is_taken_off_is_named_in_the_log_ten_times_a_layer(base: Path) -> None:
    def fill(tree: Path) -> None:
        image(tree)
        for path in NAMES:
            put(tree / path, "trusted.overlay.redirect", b"/etc")
            put(tree / path, "trusted.overlay.future", b"/etc")

    with Host(base) as host:
        host.unpack("crafted", fill=fill)
        log = host.daemon.log_text()
    lines = [line for line in log.splitlines() if "commit.attribute_stripped" in line]
    assert len(lines) == 10
    paths = {path for path in NAMES if any(rf'path="\"{escaped(path)}\""' in line for line in lines)}
    assert len(paths) >= 5
    assert all("trusted.overlay." in line for line in lines)
    inodes = len(NAMES) - 1  # "again" is "file"
    (total,) = (line for line in log.splitlines() if "commit.attributes_stripped" in line)
    assert total.endswith(f" count={2 * inodes}")


def escaped(path: str) -> str:
    """As logfmt has a JSON string."""
    return path.replace("\n", r"\\n").replace("\udcff", r"\\udcff")


def test_or_it_is_refused(base: Path) -> None:
    with Host(base, untrusted_attributes="refuse") as host:
        upper = upper_of(host.client.prepare("extract-1 image"))
        image(upper)
        for path in (".", "d", "d/file", "link", "new\nline", "\udcff"):
            for name in ("trusted.overlay.redirect", "trusted.overlay.metacopy", "user.overlay.opaque"):
                if not put(upper / path, name, b"y"):
                    continue
                before = seen(upper)
                with pytest.raises(FailedPrecondition) as refused:
                    host.client.commit("image", "extract-1 image")
                assert json.dumps(path) in str(refused.value)
                assert name in str(refused.value)
                assert seen(upper) == before, "a commit that is refused changes nothing"
                os.removexattr(upper / path, name, follow_symlinks=False)
        host.client.commit("image", "extract-1 image")


def test_what_only_the_mount_of_an_upper_obeys_is_gone_before_any_mount(host: Host) -> None:
    """Among it a handle that leads to another image's file, as the kernel itself would make it."""
    with host.running("key", "victim") as merged:
        (merged / "secret").chmod(0o600)
    origin = xattrs_of(host.upper("key") / "secret")["trusted.overlay.origin"]

    def fill(tree: Path) -> None:
        image(tree)
        for path in NAMES:
            for name in DEAD:
                put(tree / path, f"trusted.overlay.{name}", {"origin": origin, "nlink": b"U-1"}.get(name, b"y"))

    host.unpack("honest", "victim", fill=image)
    host.unpack("crafted", "victim", fill=fill)
    tree = host.layers("crafted")[0]
    assert {name for path in NAMES for name in xattrs_of(tree / path)}.isdisjoint(f"trusted.overlay.{n}" for n in DEAD)
    with host.viewed("honest") as honest, host.viewed("crafted") as merged:
        assert readable(seen(merged)) == readable(seen(honest))
    with host.running("writer", "crafted") as merged:
        for path in ("file", "again", "d/file"):
            (merged / path).write_bytes(b"changed")
        assert (merged / "secret").read_bytes() == SECRET


def test_an_immutable_file_is_refused_since_nothing_can_be_taken_off_it(base: Path) -> None:
    tree = base / "tree"
    tree.mkdir()
    image(tree)
    put(tree / "file", "trusted.overlay.metacopy", b"")
    set_flags(tree / "file", linux.FS_IMMUTABLE_FL)
    with pytest.raises(FailedPrecondition, match="immutable"):
        layer.finish(tree, TRUSTED.of_an_image(is_stripped=True))
    set_flags(tree / "file", 0)
    assert layer.finish(tree, TRUSTED.of_an_image(is_stripped=True)).stripped_count == 1


def set_flags(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, linux.FS_IOC_SETFLAGS, struct.pack("l", flags))
    finally:
        os.close(fd)


# -- what a mount wrote


def mark(top: Path, *prefixes: str) -> None:
    """All that overlay knows, written by whoever may write it."""
    for path in (".", "d", "d/file", "file"):
        for prefix in prefixes:
            for name in (*DEAD, "opaque", "whiteout", "redirect", "metacopy", "future", "overlay.redirect"):
                os.setxattr(top / path, prefix + name, b"y" if name == "opaque" else b"/etc")
    os.setxattr(top / "link", "trusted.overlay.redirect", b"/etc")


@pytest.mark.parametrize("mode", ["daemon", "client"])
def test_what_a_container_writes_is_its_data(base: Path, mode: str) -> None:
    """A nested overlay's, of either kind: rootless ones write under user. It reads back the same, for good."""
    with Host(base, mode=mode) as host:
        host.unpack("image", fill=image)
        with host.running("key", "image") as merged:
            mark(merged, "trusted.overlay.", "user.overlay.")
            shown = readable(seen(merged))
        assert "user.overlay.redirect" in dict(shown["."].xattrs)
        host.client.commit("layer", "key")
        with host.viewed("layer") as merged:
            assert readable(seen(merged)) == shown
        with host.running("child", "layer") as merged:
            assert readable(without_times(seen(merged))) == without_times(shown)
        assert "stripped" not in host.daemon.log_text()


@pytest.mark.parametrize(
    ("overlay", "name"),
    [
        ({}, "trusted.overlay.future"),
        ({"metacopy": "off", "redirect_dir": "off"}, "trusted.overlay.redirect"),
    ],
)
def test_what_its_mount_cannot_have_written_is_refused_and_kept(base: Path, overlay: dict[str, str], name: str) -> None:
    """A newer kernel may have meant something by it: without, files could lose their data."""
    with Host(base, overlay=overlay) as host:
        host.expected_errors.add("features")  # the upper has what its record does not know
        host.unpack("image", fill=image)
        with host.running("key", "image") as merged:
            (merged / "d/file").write_bytes(b"changed")
            os.setxattr(host.upper("key") / "d/file", name, b"")
            with pytest.raises(FailedPrecondition, match=f'"d/file".*{name}'):
                host.client.commit("layer", "key")
            (merged / "still").write_text("writable")
        assert name in xattrs_of(host.upper("key") / "d/file")


def test_a_client_that_mounts_with_features_of_its_own_loses_no_data(base: Path) -> None:
    """It was told not to: its renamed directory is refused, and not made an empty one."""
    with Host(base, mode="client") as host:
        host.unpack("image", fill=image)
        (mount,) = host.client.prepare("key", "image")
        options = [option for option in mount.options if not option.startswith("redirect_dir=")]
        with host.mounted([replace(mount, options=(*options, "redirect_dir=on", "metacopy=on"))]) as merged:
            (merged / "d").rename(merged / "moved")
            (merged / "file").chmod(0o600)
        upper = upper_of([mount])
        before = seen(upper)
        with pytest.raises(FailedPrecondition, match=r"trusted\.overlay\.(redirect|metacopy)"):
            host.client.commit("layer", "key")
        assert seen(upper) == before
