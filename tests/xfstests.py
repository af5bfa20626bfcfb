"""xfstests' overlay group with our fsck.overlay: `make xfstests XFSTESTS=DIR`, where DIR has it checked out and built.

It calls fsck.overlay after each test, and three tests are about it. Each test runs in namespaces of its own, since some
leave processes behind that keep a mount busy. Passed is what we are asked for: those three, and that no other test's
aftermath is called inconsistent; other failures are the kernel's or the set-up's, and are named.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.rig.namespace import CHECKOUT, enter_private_mounts

OURS = ("overlay/045", "overlay/046", "overlay/056")
DEVICE_BYTES = 16 << 30
TEST_S = 900


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    if len(arguments) != 1 or not Path(arguments[0], "check").exists():
        sys.exit("usage: make xfstests XFSTESTS=DIR, with a checkout of xfstests in DIR, built as its README says")
    suite = Path(arguments[0]).resolve()
    enter_private_mounts()
    with tempfile.TemporaryDirectory(prefix="xfstests-", dir="/var/tmp") as directory:
        return _run(suite, Path(directory))


def _run(suite: Path, place: Path) -> int:
    _command(place)
    images = [_device(place / name) for name in ("test", "scratch")]
    try:
        config = _config(place, *images)
        failed = []
        for test in _tests(suite):
            said = _check(suite, place, config, test)
            is_failed = "is inconsistent" in said or (test in OURS and "Passed all" not in said)
            state = (
                "FAILED" if is_failed else "passed" if "Passed all" in said else "not passed, but not for fsck.overlay"
            )
            print(f"{test}: {'not run' if '[not run]' in said else state}", flush=True)
            if is_failed:
                failed.append(test)
                print(said)
    finally:
        for device in images:
            subprocess.run(["losetup", "--detach", device], check=False)
    print(f"{len(failed)} failed")
    return bool(failed)


def _device(image: Path) -> str:
    image.touch()
    os.truncate(image, DEVICE_BYTES)
    subprocess.run(["mkfs.xfs", "-q", image], check=True)
    found = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def _command(place: Path) -> None:
    """fsck.overlay of this checkout, to be found on PATH."""
    (place / "bin").mkdir()
    program = place / "bin/fsck.overlay"
    python = shlex.quote(sys.executable)
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(CHECKOUT))} exec {python} -m snapshotter.fsck_overlay "$@"\n'
    )
    program.chmod(0o755)


def _config(place: Path, test_device: str, scratch_device: str) -> Path:
    for name in ("t", "s"):
        (place / name).mkdir()
    path = place / "local.config"
    path.write_text(
        f"FSTYP=xfs\nTEST_DEV={test_device}\nTEST_DIR={place}/t\nSCRATCH_DEV={scratch_device}\nSCRATCH_MNT={place}/s\n"
    )
    return path


def _tests(suite: Path) -> list[str]:
    names = sorted(path.name for path in (suite / "tests/overlay").iterdir() if re.fullmatch(r"[0-9]{3}", path.name))
    others = [f"overlay/{name}" for name in names]
    return [*OURS, *(name for name in others if name not in OURS)]


def _check(suite: Path, place: Path, config: Path, test: str) -> str:
    words = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--mount-proc", "--kill-child"]
    environment = os.environ | {"HOST_OPTIONS": str(config), "PATH": f"{place}/bin:{os.environ['PATH']}"}
    try:
        done = subprocess.run(
            [*words, "./check", "-overlay", test],
            cwd=suite, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            timeout=TEST_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"longer than {TEST_S} s"
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
