"""`make install` puts down what a host needs and nothing else, and `make uninstall` takes away just that."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.daemon import wait_until_serving
from tests.rig.installation import LIBRARY, PREFIX, Installation, make

CONFIG = Path("/etc/dedup-snapshotter/config.toml")


def expected(prefix: Path, systemd: Path) -> set[Path]:
    """All files, without those in the library."""
    return {
        CONFIG,
        prefix / "bin/containerd-dedup-grpc",
        prefix / "bin/snapctl",
        prefix / "bin/fsck.overlay",
        prefix / "share/bash-completion/completions/snapctl",
        prefix / "share/zsh/site-functions/_snapctl",
        systemd / "system/dedup-snapshotter.service",
        systemd / "system/containerd.service.d/10-dedup-snapshotter.conf",
        systemd.parent / "tmpfiles.d/dedup-snapshotter.conf",
    }


def test_files(installation: Installation) -> None:
    assert installation.files() == expected(PREFIX, PREFIX / "lib/systemd")
    modes = {path: installation.path(path).stat().st_mode & 0o777 for path in installation.files()}
    programs = {path for path, mode in modes.items() if mode == 0o755}
    assert programs == {PREFIX / "bin" / name for name in ("containerd-dedup-grpc", "snapctl", "fsck.overlay")}
    assert {mode for path, mode in modes.items() if path not in programs} == {0o644}


def test_no_file_names_the_place_where_it_was_made(installation: Installation) -> None:
    place = str(installation.destination).encode()
    found = [path for path in installation.destination.rglob("*") if path.is_file() and place in path.read_bytes()]
    assert found == []


def test_completions_are_valid(installation: Installation) -> None:
    script = installation.path(PREFIX / "share/bash-completion/completions/snapctl")
    subprocess.run(["bash", "-n", script], check=True)
    zsh = installation.path(PREFIX / "share/zsh/site-functions/_snapctl").read_text()
    assert zsh.startswith("#compdef snapctl\n")


@pytest.fixture
def trap(base: Path) -> Iterator[Path]:
    """A directory of modules that fail when they are imported."""
    for name in ("grpc", "lmdb", "snapshotter", "sitecustomize"):
        (base / f"{name}.py").write_text("raise SystemExit('imported from elsewhere')")
    yield base


@pytest.mark.root
def test_the_installed_daemon_serves_the_installed_snapctl(installation: Installation, base: Path, trap: Path) -> None:
    """And nothing but the installed packages is used, whatever PYTHONPATH says."""
    environment = {"PYTHONPATH": str(trap)}
    address = base / "s.sock"
    with installation.in_place() as host:
        command = [
            str(PREFIX / "bin/containerd-dedup-grpc"),
            "--root",
            str(base / "root"),
            "--address",
            str(address),
        ]
        daemon = host.popen(command, log=base / "daemon.log", env=environment)
        wait_until_serving(address, daemon, "the installed daemon")
        snapctl = [PREFIX / "bin/snapctl", "--address", address, "--json"]
        host.run([*snapctl, "prepare", "one"], env=environment)
        listed = json.loads(host.run([*snapctl, "ls"], env=environment).stdout)
    assert [snapshot["name"] for snapshot in listed] == ["one"]


@pytest.mark.root
def test_another_python_is_refused_in_one_line(installation: Installation) -> None:
    launcher = installation.path(PREFIX / "bin/snapctl").read_text()
    done = subprocess.run(
        ["/usr/bin/python3", "-IS", "-"],
        input=launcher.replace("(3, ", "(2, "), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("snapctl: was installed for another Python than 3.")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def copy(installation: Installation, base: Path) -> Installation:
    """The installation, to be changed."""
    shutil.copytree(installation.destination, base / "copy", symlinks=True)
    return Installation(base / "copy")


def test_a_second_installation_keeps_the_configuration_and_uninstalling_takes_the_rest(
    copy: Installation,
) -> None:
    copy.path(CONFIG).write_text("# mine\n")
    other = Path("/opt/dedup")
    make("install", f"DESTDIR={copy.destination}", f"PREFIX={other}")
    assert copy.path(CONFIG).read_text() == "# mine\n"

    # systemd does not look below /opt, so the units are in /etc.
    both = expected(PREFIX, PREFIX / "lib/systemd") | expected(other, Path("/etc/systemd"))
    assert copy.files() == both
    unit = copy.path("/etc/systemd/system/dedup-snapshotter.service").read_text()
    assert f"ExecStart={other}/bin/containerd-dedup-grpc\n" in unit
    assert f'"{other}/lib/dedup-snapshotter"' in copy.path(other / "bin/snapctl").read_text()

    make("uninstall", f"DESTDIR={copy.destination}", f"PREFIX={other}")
    assert copy.files() == expected(PREFIX, PREFIX / "lib/systemd")
    make("uninstall", f"DESTDIR={copy.destination}")
    assert copy.files() == {CONFIG}
    assert not copy.path(LIBRARY).exists()
    assert not copy.path(PREFIX / "lib/systemd/system/containerd.service.d").exists()
