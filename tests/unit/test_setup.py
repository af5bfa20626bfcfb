"""deploy/setup.sh says in one line what keeps it from its work, and is silent when nothing is to do.

What it installs on a fresh machine is not tried here: these hosts have it already.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.rig.namespace import CHECKOUT

SETUP = "deploy/setup.sh"
NO_NETWORK = ["unshare", "--net"]


@pytest.fixture
def checkout(base: Path) -> Path:
    """A copy of what set-up reads, as a new clone would have it."""
    target = base / "checkout"
    for name in ("deploy", "proto", "snapshotter"):
        ignore = shutil.ignore_patterns("__pycache__", "*_pb2*")
        shutil.copytree(CHECKOUT / name, target / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(CHECKOUT / name, target)
    return target


def run(checkout: Path, profile: str, wrapper: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(wrapper or []), checkout / SETUP, profile],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_nothing_to_do_is_silent_and_changes_nothing() -> None:
    assert run(CHECKOUT, "test").returncode == 0  # under `make test` there is nothing to do already
    stamp = CHECKOUT / ".venv/.setup"
    before = stamp.stat()
    for profile in ("install", "demo", "test"):
        done = run(CHECKOUT, profile)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.path.samestat(before, stamp.stat()) and before.st_mtime_ns == stamp.stat().st_mtime_ns


@pytest.mark.root
def test_an_unfinished_venv_is_made_again_and_no_network_is_one_line(checkout: Path) -> None:
    # Interrupted: only the stamp, which is written last, says that .venv is whole.
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").write_text("half a file")
    done = run(checkout, "install", NO_NETWORK)
    assert "making .venv" in done.stdout
    assert (checkout / ".venv/bin/python").is_symlink()

    assert done.returncode == 1
    assert done.stderr.startswith("setup: no network: pip cannot reach the package index (")
    assert done.stderr.count("\n") == 1

    # That failure was orderly: the next run goes on from there.
    again = run(checkout, "install", NO_NETWORK)
    assert again.returncode == 1
    assert "making .venv" not in again.stdout


@pytest.mark.root
def test_a_missing_package_without_root_is_one_line(checkout: Path) -> None:
    # A file that is no program hides ctr, in a mount namespace that ends with the command.
    script = 'mount --bind /dev/null "$(command -v ctr)" && exec setpriv --reuid=65534 --clear-groups "$@"'
    checkout.chmod(0o777)
    checkout.parent.chmod(0o755)
    done = run(checkout, "demo", ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"])
    assert done.returncode == 1
    assert done.stderr == "setup: must be root to install containerd: use sudo\n"


def test_a_wrong_profile_is_one_line() -> None:
    done = run(CHECKOUT, "nonsense")
    assert (done.returncode, done.stderr) == (1, "setup: usage: deploy/setup.sh install|demo|test|bench|xfstests\n")
