"""`make demo`: a real container on this snapshotter, from nothing to nothing, in a few seconds.

Runs as root, needs containerd, runc and overlayfs, and leaves no process, mount or file behind (except the
downloaded packages in `.cache/`). Exit status 1, and one line that says why, where that cannot be.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.rig.containerd import SNAPSHOTTER, Rig, directory_for_overlay
from tests.rig.image import Image, Recipe, build_image, merged
from tests.rig.namespace import CHECKOUT, RigError
from tests.rig.packages import packages
from tests.rig.tree import Tree, differences, expected, seen_by

PROGRAMS = ("containerd", "containerd-shim-runc-v2", "ctr", "runc", "unshare", "nsenter", "dpkg-deb")
NAME = "demo"
REFERENCE = "example.test/demo:latest"
SECOND = "example.test/demo:rebuilt"


def main() -> int:
    """Runs the demo. Returns the exit status."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check_host()
        mounts_before = _mount_count()
        run()
        if _mount_count() != mounts_before:
            raise RigError(f"{_mount_count() - mounts_before} mounts were left on the host")
    except RigError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        for line in error.log.splitlines():
            print(f"    {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; all that it started is stopped and removed", file=sys.stderr)
        return 130
    say(f"Done in {time.monotonic() - began:.1f} s. No process, mount, cgroup or file is left behind.")
    return 0


def check_host() -> None:
    """Raises RigError where the demo cannot run."""
    if os.geteuid() != 0:
        raise RigError("must run as root, it mounts and starts containers: sudo make demo")
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise RigError(f"missing here: {', '.join(missing)}; `make setup` installs them")
    directory_for_overlay()


def run() -> None:
    """The steps, in order."""
    say(f"Linux {platform.release()}, {_version('containerd')}, {_version('runc')}")
    with step("Get Debian packages: a shell and a few tools, with their libraries") as note:
        debs = packages()
        size = sum(deb.stat().st_size for deb in debs)
        kept = debs[0].parent.parent.relative_to(CHECKOUT)
        note.append(f"{len(debs)} packages, {_megabytes(size)}, kept in {kept}")
    with contextlib.ExitStack() as stack:
        with step("Start the daemon and a private containerd that uses it") as note:
            rig = stack.enter_context(Rig(namespace=NAME))
            note.append(f"in {rig.base}")
        image = make_and_import(rig)
        use(rig, image)
        second = import_second(rig)
        remove(rig, [image, second])
        with step("Stop containerd and the daemon, remove their files, look for anything left"):
            stack.close()


def make_and_import(rig: Rig) -> Image:
    """The image, in the daemon's store."""
    with step("Make an image of them, and of files that are easy to get wrong") as note:
        image = build_image(Recipe(REFERENCE), rig.base / "image.tar")
        note.append(f"{len(image.layers)} layers, {_megabytes(image.archive.stat().st_size)}")
    with step(f"ctr image import --snapshotter {SNAPSHOTTER} image.tar"):
        rig.ctr("image", "import", "--snapshotter", SNAPSHOTTER, image.archive)
    return image


def import_second(rig: Rig) -> Image:
    """The same packages built again, with other times: what that takes, by du, and what it takes unpacked."""
    with step("Build the image again, with other times on all files") as note:
        second = build_image(Recipe(SECOND, shift_ns=5_000_000_000), rig.base / "second.tar")
        note.append("not one layer is the same")
    before, known = _disk_usage(rig), set(_sizes(rig))
    with step(f"ctr image import --snapshotter {SNAPSHOTTER} second.tar") as lines:
        rig.ctr("image", "import", "--snapshotter", SNAPSHOTTER, second.archive)
        more = _disk_usage(rig) - before
        alone = sum(size for name, size in _sizes(rig).items() if name not in known)
        lines.append(f"du: the first image takes {_megabytes(before)}, the second {more / 1e6:.1f} MB more")
        lines.append(
            f"unpacked without sharing it would have taken {_megabytes(alone)}: {_megabytes(alone - more)} saved"
        )
        if more > alone / 2:
            raise RigError("the second image shares too little with the first")
    with step("snapctl df --now  (digests cut short here)") as lines:
        store, _, snapshots = rig.snapctl("df", "--now").stdout.decode().partition("\n\n")
        lines += [*store.splitlines(), "", *shortened(snapshots.splitlines())]
    return second


def _sizes(rig: Rig) -> dict[str, int]:
    """What each snapshot's own files take, shared or not, in bytes."""
    return {each["name"]: each["size_bytes"] for each in json.loads(rig.snapctl("usage", "--json").stdout)}


def _disk_usage(rig: Rig) -> int:
    """What the daemon's root takes, in bytes, each inode once, when all that was to be deleted is."""
    rig.snapctl("cleanup")
    return int(subprocess.run(["du", "-s", "-B1", rig.daemon_root], capture_output=True, check=True).stdout.split()[0])


def use(rig: Rig, image: Image) -> None:
    """A container looks at every file, then writes."""
    with step(f"ctr run --snapshotter {SNAPSHOTTER} {REFERENCE} {NAME}"):
        rig.ctr_run("--detach", image=image.reference, name=NAME, argv=("sleep", "1000"))
    with step("In the container: look at every file") as lines:
        prove_image(rig, image, lines)
    with step("In the container: write a file, change one, delete one") as lines:
        prove_writes(rig, lines)
        rig.collect_garbage()
    for command in ("tree", "ls"):
        with step(f"snapctl {command}  (digests cut short here)") as lines:
            lines += shortened(rig.snapctl(command).stdout.decode().splitlines())


def remove(rig: Rig, images: Sequence[Image]) -> None:
    """Container and images, as a user would, and the garbage collection that follows."""
    with step("Remove the container and the images; containerd collects the garbage") as note:
        rig.ctr("task", "delete", "--force", NAME)
        rig.ctr("container", "delete", NAME)
        rig.ctr("image", "remove", "--sync", *(image.reference for image in images))
        rig.snapctl("gc")
        left = [path.name for path in (rig.daemon_root / "snapshots").iterdir()]
        left += [path.name for path in (rig.daemon_root / "objects").glob("*/*")]
        if left:
            raise RigError(f"snapshots were left in the daemon's root: {', '.join(left)}")
        note.append("the daemon's store is empty")


def execute(rig: Rig, script: str) -> bytes:
    """Runs a shell script in the container."""
    return rig.ctr("task", "exec", "--exec-id", f"exec-{time.monotonic_ns()}", NAME, "sh", "-ec", script).stdout


def prove_image(rig: Rig, image: Image, lines: list[str]) -> None:
    """Raises RigError unless the container sees exactly the image; adds `lines` on what is worth a look."""
    tree = seen_by(lambda script: execute(rig, script))
    wrong = differences(expected(merged(image.layers)), tree)
    if wrong:
        raise RigError("the container does not see its image", "\n".join(wrong[:20]))
    lines += [f"{what:<18}{shown}" for what, shown in features(tree)]
    lines.append(f"all {len(tree.paths)} files: type, mode, owner, time, xattrs and content are the image's")


def features(tree: Tree) -> Iterator[tuple[str, str]]:
    """What the container saw of each feature, in words made of what it saw, not of what it should see."""
    seen = tree.paths
    opaque = [path.rpartition(b"/")[2].decode() for path in sorted(seen) if path.startswith(b"srv/opaque/")]
    yield "whiteout", f"/srv/deleted is {'there' if b'srv/deleted' in seen else 'gone'}"
    yield "opaque directory", f"/srv/opaque shows only: {' '.join(opaque)}"
    one_inode = frozenset({b"srv/first-name", b"srv/second-name"}) in tree.same_inode
    yield "hard link", f"first-name and second-name are {'one inode' if one_inode else 'two inodes'}"
    yield "setuid", f"/srv/set-user-id has mode {seen[b'srv/set-user-id'].mode:04o}"
    capability = seen[b"srv/capability"].xattrs["security.capability"]
    yield "file capability", f"security.capability = 0x{capability.hex()}"
    yield "user xattr", f"user.origin = {seen[b'srv/user-xattr'].xattrs['user.origin'].decode()!r}"
    yield "nanoseconds", f"mtime {_seconds(seen[b'srv/nanosecond'].mtime_ns)}"
    odd = next(path for path in seen if path.startswith(b"srv/not-utf8"))
    yield "not UTF-8", f"/{odd.decode('utf-8', 'backslashreplace')}"


def prove_writes(rig: Rig, lines: list[str]) -> None:
    """Raises RigError unless the container's writes are there, and only in this container."""
    execute(rig, "echo 'hello from the container' > /srv/written; echo more >> /srv/changed; rm /srv/twice")
    got = execute(rig, "cat /srv/written /srv/changed; test -e /srv/twice || echo deleted").decode()
    if got != "hello from the container\nsecond version\nmore\ndeleted\n":
        raise RigError(f"the container reads back something else than it wrote: {got!r}")
    other = rig.ctr_run(
        "--rm", image=REFERENCE, name="other",
        argv=("sh", "-c", "cat /srv/changed; ls -d /srv/written /srv/twice 2>&-; true"),
    ).decode()  # fmt: skip
    if other != "second version\n/srv/twice\n":
        raise RigError(f"a second container sees what the first wrote: {other!r}")
    lines += ["it reads back what it wrote", "a second container of the same image sees none of that"]


def shortened(lines: list[str]) -> list[str]:
    """The lines with short digests, and the columns of a table as narrow as that makes them."""
    rows = [re.split(r"(?<=\S)  +", re.sub(r"(sha256:[0-9a-f]{8})[0-9a-f]{56}", r"\1…", line)) for line in lines]
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


# -- output


_WIDTH = 78
_steps = iter(range(1, 100))


def say(line: str) -> None:
    """A line of its own, between empty ones."""
    print(f"\n{line}\n", flush=True)


@contextlib.contextmanager
def step(what: str) -> Iterator[list[str]]:
    """Prints what is being done, then how long it took and below it the lines that the body collected."""
    print(f"{next(_steps):>2}. {what:<{_WIDTH - 4}}", end="", flush=True)
    began = time.monotonic()
    lines: list[str] = []
    try:
        yield lines
    except BaseException:
        print(" failed")
        raise
    finally:
        if sys.exc_info()[0] is None:
            print(f" {time.monotonic() - began:4.1f} s")
        for line in lines:
            print(f"    {line}", flush=True)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _seconds(time_ns: int) -> str:
    return f"{time_ns // 10**9}.{time_ns % 10**9:09d}"


def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RigError(f"`{program} --version` fails: {done.stderr.strip()}")
    words = done.stdout.split()
    return f"{program} {next(word for word in words if word.lstrip('v')[:1].isdigit())}"


def _mount_count() -> int:
    return len(Path("/proc/self/mountinfo").read_text().splitlines())


if __name__ == "__main__":
    sys.exit(main())
