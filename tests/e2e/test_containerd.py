"""A real containerd on the daemon: images, containers, and restarts of either side.

Proves: a container sees exactly its image and keeps its own writes; containerd's diff finds exactly what
the container changed; removal of everything leaves an empty root; a restart or a kill of the daemon, or a
restart of containerd, is not noticed by a running container.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence

import pytest

from tests.rig.containerd import SNAPSHOTTER, Rig
from tests.rig.image import Image, Recipe, merged
from tests.rig.tree import Execute, differences, expected, seen_by, without_links

pytestmark = [pytest.mark.root, pytest.mark.containerd]

SLEEP = ("sleep", "1000")


def import_image(rig: Rig, image: Image) -> None:
    rig.ctr("image", "import", "--snapshotter", SNAPSHOTTER, str(image.archive))


def start(rig: Rig, image: Image, name: str, *options: str) -> Execute:
    """Starts a container that sleeps; what it returns runs a script in it.

    By nsenter, since `ctr task exec` now and then loses what a process wrote just before its end (containerd#770).
    """
    rig.ctr_run("--detach", *options, image=image.reference, name=name, argv=SLEEP)
    tasks = map(str.split, rig.ctr("task", "list").stdout.decode().splitlines())
    pid = next(words[1] for words in tasks if words[0] == name)

    def execute(script: str) -> bytes:
        return rig.run_in_namespace(["nsenter", f"--target={pid}", "--all", "--", "sh", "-ec", script]).stdout

    return execute


def remove(rig: Rig, name: str) -> None:
    """Kills and removes a container, and with it its snapshot."""
    rig.ctr("task", "delete", "--force", name)
    rig.ctr("container", "delete", name)


def snapshots(rig: Rig) -> list[str]:
    """What containerd lists, one line for each snapshot."""
    lines = rig.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "list").stdout.decode().splitlines()
    return lines[1:]


def stored(rig: Rig) -> list[str]:
    """The snapshots' directories in the daemon's root, and those that wait for their deletion."""
    found = []
    for directory in ("snapshots", "trash", "mounts"):
        if (rig.daemon_root / directory).is_dir():
            found += [f"{directory}/{path.name}" for path in (rig.daemon_root / directory).iterdir()]
    return found


def chain_id(diff_ids: Sequence[str]) -> str:
    """The name of the top layer's snapshot (image-spec, config.md: Layer ChainID)."""
    chain = diff_ids[0]
    for diff_id in diff_ids[1:]:
        chain = "sha256:" + hashlib.sha256(f"{chain} {diff_id}".encode()).hexdigest()
    return chain


def assert_sees(rig: Rig, execute: Execute, image: Image) -> None:
    wanted, seen = expected(merged(image.layers)), seen_by(execute)
    if json.loads(rig.snapctl("info", "--json").stdout)["dedup_strategy"] == "hardlink":
        wanted, seen = without_links(wanted), without_links(seen)
    assert differences(wanted, seen) == []


def test_a_container_sees_exactly_its_image(rig: Rig, image: Image) -> None:
    import_image(rig, image)
    assert len(snapshots(rig)) == len(image.layers)
    execute = start(rig, image, "one")
    assert_sees(rig, execute, image)


def test_two_images_with_equal_files_stay_apart(rig: Rig, image: Image, make_image: Callable[[Recipe], Image]) -> None:
    other = make_image(Recipe("example.test/later:latest", shift_ns=5_000_000_001))
    import_image(rig, image)
    import_image(rig, other)
    one, two = start(rig, image, "one"), start(rig, other, "two")
    one("echo changed > /srv/twice; chmod 600 /srv/same-content; rm /usr/bin/dir")
    assert_sees(rig, two, other)
    assert_sees(rig, start(rig, image, "three"), image)


def test_exec_and_the_container_share_what_they_write(rig: Rig, image: Image) -> None:
    import_image(rig, image)
    execute = start(rig, image, "one")
    execute("echo one > /srv/written; echo more >> /srv/changed; rm /srv/twice; mkdir /srv/opaque/made")
    assert execute("cat /srv/written /srv/changed") == b"one\nsecond version\nmore\n"
    assert execute("ls /srv/opaque; test ! -e /srv/twice") == b"made\nshown\n"
    # None of it is seen by another container of the same image.
    assert_sees(rig, start(rig, image, "two"), image)


def test_diff_holds_exactly_what_the_container_changed(rig: Rig, image: Image) -> None:
    import_image(rig, image)
    execute = start(rig, image, "one")
    execute("echo new > /srv/written; rm /srv/changed; chmod 700 /srv/twice; mkdir /srv/made")
    diff = rig.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "diff", "one").stdout
    with tarfile.open(fileobj=io.BytesIO(diff), errors="surrogateescape") as archive:
        members = {member.name.strip("/"): member for member in archive}
    # runc makes mountpoints that the image lacks; the time of /srv itself changed with its entries.
    changed = {name for name in members if name.startswith("srv")}
    assert changed == {"srv", "srv/written", "srv/.wh.changed", "srv/twice", "srv/made"}
    assert members["srv/twice"].mode == 0o700
    assert members["srv/made"].isdir()


def test_a_read_only_container_reads_and_cannot_write(rig: Rig, image: Image) -> None:
    import_image(rig, image)
    script = "cat /srv/changed; touch /srv/new 2>/dev/null || echo refused"
    output = rig.ctr_run("--rm", "--read-only", image=image.reference, name="one", argv=("sh", "-c", script))
    assert output == b"second version\nrefused\n"


def test_a_mounted_view_shows_the_image_and_cannot_be_written(rig: Rig, image: Image) -> None:
    import_image(rig, image)
    target = rig.base / "mounted"
    target.mkdir()
    # Not `ctr image mount`: 1.6 looks for the image in its default snapshotter, whatever it is told.
    # ctr does not protect a view: the collection that follows an import must be over.
    rig.collect_garbage()
    top = chain_id(image.diff_ids)
    rig.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "view", "looking", top)
    mount = rig.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "mounts", str(target), "looking").stdout
    rig.run_in_namespace(["sh", "-ec", mount.decode()])
    read = rig.run_in_namespace(["cat", f"{target}/srv/changed"]).stdout
    written = rig.run_in_namespace(["touch", f"{target}/srv/new"], check=False)
    assert (read, written.returncode) == (b"second version\n", 1)
    rig.run_in_namespace(["umount", str(target)])
    rig.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "remove", "looking")
    assert len(snapshots(rig)) == len(image.layers)


def test_usage_is_known_for_every_snapshot(rig: Rig, image: Image) -> None:
    import_image(rig, image)
    start(rig, image, "one")("head -c 100000 /dev/zero | tr '\\0' x > /srv/written")
    lines = rig.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "usage", "-b").stdout.decode().splitlines()
    usage = {line.split()[0]: [int(word) for word in line.split()[1:3]] for line in lines[1:]}
    assert len(usage) == len(image.layers) + 1
    size_bytes, inodes = usage["one"]
    assert size_bytes >= 100_000
    assert inodes >= 2


def test_removing_everything_leaves_an_empty_root(rig: Rig, image: Image) -> None:
    import_image(rig, image)
    start(rig, image, "one")("echo data > /srv/written")
    assert stored(rig) != []
    remove(rig, "one")
    # containerd collects its garbage, and calls Cleanup, before it answers a synchronous removal.
    rig.ctr("image", "remove", "--sync", image.reference)
    assert snapshots(rig) == []
    assert stored(rig) == []


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_a_running_container_outlives_the_daemon(rig: Rig, image: Image, kill: bool) -> None:
    import_image(rig, image)
    execute = start(rig, image, "one")
    execute("echo before > /srv/written")
    rig.restart_daemon(kill=kill)
    assert execute("echo after >> /srv/written; cat /srv/written /srv/changed") == (b"before\nafter\nsecond version\n")
    assert len(snapshots(rig)) == len(image.layers) + 1
    assert_sees(rig, start(rig, image, "two"), image)
    for name in ("one", "two"):
        remove(rig, name)
    rig.ctr("image", "remove", "--sync", image.reference)
    assert stored(rig) == []


def test_a_container_runs_on_while_the_daemon_is_away(rig: Rig, image: Image) -> None:
    import_image(rig, image)
    execute = start(rig, image, "one")
    rig.daemon.stop()
    assert execute("echo alone > /srv/written; cat /srv/written") == b"alone\n"
    refused = rig.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "list", check=False, timeout_s=30)
    assert refused.returncode != 0
    rig.start_daemon()
    assert len(snapshots(rig)) == len(image.layers) + 1


def test_a_stopped_container_starts_again_on_its_writes(rig: Rig, image: Image) -> None:
    import_image(rig, image)
    start(rig, image, "one")("echo kept > /srv/written")
    rig.ctr("task", "delete", "--force", "one")
    rig.restart_daemon()
    rig.ctr("task", "start", "--detach", "one")
    output = rig.ctr("task", "exec", "--exec-id", "again", "one", "cat", "/srv/written").stdout
    assert output == b"kept\n"


def test_a_running_container_outlives_containerd(rig: Rig, image: Image) -> None:
    import_image(rig, image)
    execute = start(rig, image, "one")
    execute("echo before > /srv/written")
    rig.restart_containerd()
    assert execute("cat /srv/written") == b"before\n"
    assert_sees(rig, start(rig, image, "two"), image)
    remove(rig, "one")
    assert len(snapshots(rig)) == len(image.layers) + 1
