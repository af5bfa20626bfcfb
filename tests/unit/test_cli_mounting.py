"""From fstab options to mount(2), and real mounts in a namespace of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter import linux
from snapshotter.cli.mounting import (
    MountArguments,
    mount_all,
    parse_options,
    shorten_lowers,
    split_lowers,
    unescape,
)
from snapshotter.errors import FailedPrecondition, NotFound
from snapshotter.model import Mount


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["rbind", "ro"], MountArguments(linux.MS_BIND | linux.MS_REC | linux.MS_RDONLY, "")),
        (["rw", "bind"], MountArguments(linux.MS_BIND, "")),
        (["ro", "rw"], MountArguments(0, "")),
        (["nosuid", "nodev", "noexec", "suid"], MountArguments(linux.MS_NODEV | linux.MS_NOEXEC, "")),
        (["defaults", "index=off", "lowerdir=/a:/b"], MountArguments(0, "index=off,lowerdir=/a:/b")),
    ],
)
def test_fstab_options_become_flags_and_data(options: list[str], expected: MountArguments) -> None:
    assert parse_options(options) == expected


@pytest.mark.parametrize("option", ["loop", "uidmap=0:1:2", "gidmap=0:1:2", "X-containerd.mkfs"])
def test_an_option_that_needs_more_than_mount_is_refused(option: str) -> None:
    with pytest.raises(FailedPrecondition, match="cannot mount with"):
        parse_options(["ro", option])


def test_lower_directories_become_relative_to_what_they_share() -> None:
    options = ["index=off", "upperdir=/r/snapshots/9/fs", "lowerdir=/r/snapshots/2/fs:/r/snapshots/1/fs"]
    assert shorten_lowers(options) == (
        "/r/snapshots",
        ["index=off", "upperdir=/r/snapshots/9/fs", "lowerdir=2/fs:1/fs"],
    )


def test_escapes_in_lower_directories_survive() -> None:
    directory, options = shorten_lowers([r"lowerdir=/a\:b/1\,2:/a\:b/3"])
    assert (directory, options) == ("/a:b", [r"lowerdir=1\,2:3"])


def test_what_cannot_be_shortened_stays() -> None:
    assert shorten_lowers(["upperdir=/u"]) == ("", ["upperdir=/u"])
    assert shorten_lowers(["lowerdir=a:b"]) == ("", ["lowerdir=a:b"])


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in (".", "..")
)


@given(st.lists(st.lists(NAMES, min_size=1, max_size=4), min_size=1, max_size=6))
def test_shortened_lower_directories_name_the_same_directories(lowers: list[list[str]]) -> None:
    def escape(path: str) -> str:
        return path.replace("\\", "\\\\").replace(":", "\\:")

    paths = ["/" + "/".join(parts) for parts in lowers]
    directory, [option] = shorten_lowers(["lowerdir=" + ":".join(map(escape, paths))])
    relative = [unescape(lower) for lower in split_lowers(option.removeprefix("lowerdir="))]
    assert [os.path.join(directory, lower) for lower in relative] == paths


def test_options_that_mount_would_cut_never_reach_it(tmp_path: Path) -> None:
    lowers = ":".join(f"/{'x' * 200}/{number}" for number in range(3000))
    with pytest.raises(FailedPrecondition, match="too many layers"):
        mount_all([Mount("overlay", "overlay", (f"lowerdir={lowers}",))], str(tmp_path))


def test_a_target_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=f"no directory {tmp_path}/gone"):
        mount_all([], str(tmp_path / "gone"))


def in_private_namespace(directory: Path, code: str) -> str:
    """Runs `code` in a mount namespace of its own, in an empty tmpfs that is mounted at `directory`."""
    prelude = "from snapshotter.cli.mounting import *\nfrom snapshotter.model import Mount\nimport os, sys\n"
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c",
         'mount -t tmpfs -o nosuid tmpfs "$1" && cd "$1" && exec "$2" -c "$3"',
         "sh", str(directory), sys.executable, prelude + code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.root
def test_a_read_only_bind_is_read_only_and_keeps_the_flags_of_its_source(tmp_path: Path) -> None:
    code = """
os.mkdir("s"); os.mkdir("t")
mount_all([Mount("bind", os.path.abspath("s"), ("rbind", "ro"))], "t")
print(next(line for line in open("/proc/self/mounts") if line.split()[1].endswith("/t")).split()[3])
try: open("t/f", "w")
except OSError as error: print(error.strerror)
unmount("t")
open("t/f", "w")
try: unmount("t")
except errors.FailedPrecondition as error: print(error)
"""
    options, refusal, again = in_private_namespace(tmp_path, code).splitlines()
    assert {"ro", "nosuid"} <= set(options.split(","))
    assert refusal == "Read-only file system"
    assert again == f"cannot unmount {tmp_path}/t: nothing is mounted there"


@pytest.mark.root
def test_when_the_second_mount_fails_the_first_does_not_stay(tmp_path: Path) -> None:
    code = """
os.mkdir("s"); os.mkdir("t")
mounts = [Mount("bind", os.path.abspath("s"), ("rbind",)), Mount("bind", "/nonexistent", ("rbind",))]
try: mount_all(mounts, "t")
except errors.FailedPrecondition as error: print(error)
print(any(line.split()[1].endswith("/t") for line in open("/proc/self/mounts")))
"""
    message, mounted = in_private_namespace(tmp_path, code).splitlines()
    assert "is not to be seen from here" in message
    assert mounted == "False"


@pytest.mark.root
def test_a_mount_in_use_is_refused_unless_lazy(tmp_path: Path) -> None:
    code = """
os.mkdir("s"); os.mkdir("t")
mount_all([Mount("bind", os.path.abspath("s"), ("rbind", "rw"))], "t")
held = open("t/f", "w")
try: unmount("t")
except errors.FailedPrecondition as error: print(error)
unmount("t", lazy=True)
print(os.listdir("t"))
"""
    message, left = in_private_namespace(tmp_path, code).splitlines()
    assert "in use" in message
    assert left == "[]"


@pytest.mark.root
def test_a_long_chain_is_mounted_from_the_common_directory_and_the_caller_stays_where_it_was(
    tmp_path: Path,
) -> None:
    code = """
long = os.path.abspath("x" * 200); os.makedirs(f"{long}/u/fs"); os.mkdir(f"{long}/work"); os.mkdir("t")
for number in range(128):
    os.makedirs(f"{long}/{number}/fs"); open(f"{long}/{number}/fs/{number}", "w").close()
lowers = ":".join(f"{long}/{number}/fs" for number in range(128))
before = os.getcwd()
mount_all([Mount("overlay", "overlay",
    (f"upperdir={long}/u/fs", f"workdir={long}/work", f"lowerdir={lowers}"))], "t")
assert os.getcwd() == before
open("t/new", "w").close()
print(len(os.listdir("t")), os.listdir(f"{long}/u/fs"))
"""
    assert in_private_namespace(tmp_path, code) == "129 ['new']\n"
