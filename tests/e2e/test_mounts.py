"""What containerd and containers do with snapshots that the daemon mounts.

Proves: `ctr snapshots diff`, and an image made of what it says, hold the real data of files of which only the
attributes changed, of renamed directories and of hard links; a second mount and a diff of a snapshot do not disturb
the container that writes into it; hard links stay one file in a container.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.test_containerd import import_image, remove, start
from tests.rig.containerd import SNAPSHOTTER, Rig
from tests.rig.image import Image, merged, write_with_layer
from tests.rig.tree import Tree, differences, seen_by

pytestmark = [
    pytest.mark.root,
    pytest.mark.containerd,
    pytest.mark.parametrize("mode", ["daemon"], indirect=True),
]

CHANGES = """
chown 1234 /srv/twice
chmod 755 /srv/changed
mv /srv/opaque /srv/moved
echo more >> /srv/first-name
rm /srv/fifo
"""


def diff(rig: Rig, key: str) -> bytes:
    """The tar of what a snapshot changed."""
    found = rig.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "diff", key).stdout
    return gzip.decompress(found) if found.startswith(b"\x1f\x8b") else found


def contents(tar: bytes) -> dict[str, bytes]:
    """Of the regular files in it, under all their names."""
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as archive:
        files = {member.name.strip("/"): archive.extractfile(member) for member in archive if not member.isdir()}
        return {name: stream.read() for name, stream in files.items() if stream}


@pytest.mark.parametrize("committed", [False, True], ids=["active", "committed"])
def test_a_diff_and_an_image_made_of_it_hold_the_real_data(rig: Rig, image: Image, committed: bool) -> None:
    import_image(rig, image)
    execute = start(rig, image, "one")
    execute(CHANGES)
    seen = seen_by(execute)
    key = "one"
    if committed:
        rig.ctr("task", "delete", "--force", "one")
        rig.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "commit", "changed", "one")
        key = "changed"
    uppers = list(rig.daemon_root.glob("snapshots/*/fs/srv/moved"))
    assert len(uppers) == 1
    upper = uppers[0].parent
    assert "trusted.overlay.metacopy" in os.listxattr(upper / "twice"), "or this test proves nothing"
    assert "trusted.overlay.redirect" in os.listxattr(upper / "moved")

    tar = diff(rig, key)
    found = contents(tar)
    original = merged(image.layers)
    assert found["srv/twice"] == original[b"srv/twice"].content
    assert found["srv/changed"] == original[b"srv/changed"].content
    assert found["srv/moved/shown"] == original[b"srv/opaque/shown"].content
    assert found["srv/first-name"] == found["srv/second-name"] == b"one file, two names\nmore\n"

    archive = rig.base / "made.tar"
    write_with_layer(image, "example.test/made:latest", tar, archive)
    rig.ctr("image", "import", "--snapshotter", SNAPSHOTTER, str(archive))
    made = Image("example.test/made:latest", archive, (), ())
    assert differences(as_archived(seen), as_archived(seen_by(start(rig, made, "two")))) == []


def as_archived(tree: Tree) -> Tree:
    """What containerd keeps in the tar of a diff: whole seconds, and of the attributes only capabilities."""
    return Tree(
        {
            path: replace(
                seen,
                mtime_ns=seen.mtime_ns // 10**9,
                xattrs={name: value for name, value in seen.xattrs.items() if name == "security.capability"},
            )
            for path, seen in tree.paths.items()
        },
        tree.same_inode,
    )


def test_a_container_writes_while_it_is_diffed_and_mounted_again(rig: Rig, image: Image) -> None:
    import_image(rig, image)
    execute = start(rig, image, "one")
    # In place, since tar wants a file to keep its size while it reads.
    execute(
        "echo 00000000 > /srv/counter\n"
        "(n=0; while test ! -e /srv/stop; do n=$((n+1));"
        " printf %08d $n | dd of=/srv/counter conv=notrunc status=none && chmod $((600 + n % 2)) /srv/twice"
        " || { echo failed > /srv/failed; break; }; done) >/dev/null 2>&1 &"
    )
    seen = [int(execute("cat /srv/counter"))]
    for round_number in range(3):
        with mounted(rig, "one") as target:
            found = contents(diff(rig, "one"))
            assert found["srv/twice"] == merged(image.layers)[b"srv/twice"].content
            # One superblock: what one side writes the other reads.
            rig.run_in_namespace(["sh", "-ec", f"echo {round_number} > {target}/srv/outside"])
            assert execute("cat /srv/outside") == b"%d\n" % round_number
            outside = rig.run_in_namespace(["stat", "-c", "%d:%i", f"{target}/srv/counter"]).stdout
            assert execute("stat -c %d:%i /srv/counter") == outside
        seen.append(int(execute("cat /srv/counter")))
    assert seen == sorted(set(seen)), "it went on writing"
    execute("touch /srv/stop; test ! -e /srv/failed")
    remove(rig, "one")


def test_hard_links_are_one_file_in_a_container(rig: Rig, image: Image) -> None:
    import_image(rig, image)
    execute = start(rig, image, "one")
    both = "cat /srv/first-name /srv/second-name; stat -c '%h %a %u' /srv/first-name /srv/second-name"
    inodes = "stat -c %i /srv/first-name /srv/second-name"
    first, second = execute(inodes).split()
    assert first == second
    execute("echo changed > /srv/first-name; chmod 604 /srv/second-name; chown 5 /srv/first-name")
    after = b"changed\nchanged\n2 604 5\n2 604 5\n"
    assert execute(both) == after
    assert execute(inodes).split() == [first, second], "copy-up changes no inode number"
    # Another container, another daemon, the same container again: the link holds.
    assert start(rig, image, "two")("cat /srv/second-name") == b"one file, two names\n"
    rig.restart_daemon(kill=True)
    assert execute(both) == after
    execute("ln /srv/second-name /srv/third-name; rm /srv/first-name; echo again > /srv/third-name")
    assert execute("cat /srv/second-name; stat -c %h /srv/second-name") == b"again\n2\n"


@contextmanager
def mounted(rig: Rig, key: str) -> Iterator[Path]:
    """A second mount of a snapshot, beside its container's."""
    target = rig.base / "second"
    target.mkdir(exist_ok=True)
    script = rig.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "mounts", str(target), key).stdout.decode()
    rig.run_in_namespace(["sh", "-ec", script])
    try:
        yield target
    finally:
        rig.run_in_namespace(["umount", str(target)])
