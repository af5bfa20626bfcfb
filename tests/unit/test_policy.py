"""What tests/conftest.py promises of every run holds: seen from outside, in runs of pytest of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rig.namespace import CHECKOUT


def run_pytest(base: Path, source: str, *arguments: str, ci: str = "") -> tuple[int, str]:
    """A run of a file with this content, in a mount namespace of its own where root can have one."""
    (base / "test_inner.py").write_text(source)
    private = ["unshare", "--mount", "--propagation", "private"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*private, sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider",
         "-c", "pyproject.toml", "--rootdir", ".", *arguments, base / "test_inner.py"],
        cwd=CHECKOUT, env={**os.environ, "CI": ci}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_nightly_tests_run_only_when_asked_for(base: Path) -> None:
    source = "import pytest\n@pytest.mark.nightly\ndef test_a(): pass\ndef test_b(): pass\n"
    assert "1 passed, 1 deselected" in run_pytest(base, source)[1]
    assert "2 passed" in run_pytest(base, source, "--nightly")[1]


@pytest.mark.parametrize(
    "source",
    [
        "import pytest\ndef test_a(): pytest.skip('no such kernel')\n",
        "import pytest\n@pytest.mark.skip(reason='no such kernel')\ndef test_a(): pass\n",
        "import pytest\npytest.skip('no such kernel', allow_module_level=True)\n",
    ],
    ids=["call", "marker", "module"],
)
def test_a_skip_is_a_failure_in_ci(base: Path, source: str) -> None:
    assert "1 skipped" in run_pytest(base, source)[1]
    status, output = run_pytest(base, source, ci="true")
    assert status != 0
    assert "CI=true, where every test must run: " in output
    assert "no such kernel" in output


def test_an_expected_failure_is_none_in_ci(base: Path) -> None:
    source = "import pytest\n@pytest.mark.xfail(strict=True)\ndef test_a(): assert False\n"
    assert run_pytest(base, source, ci="true")[0] == 0


def test_a_process_left_behind_is_an_error(base: Path) -> None:
    # Orphaned: `sh` has ended, init is its parent now. It ends by itself when the run has looked for it.
    source = (
        "import subprocess, tests.conftest\n"
        "tests.conftest._SETTLE_S = 0\n"
        "def test_a(): subprocess.run(['sh', '-c', 'sleep 5 >&- 2>&- &'])\n"
    )
    status, output = run_pytest(base, source)
    assert status != 0
    assert "the run left behind: process" in output
    assert "sleep 5" in output


@pytest.mark.root
def test_a_mount_left_behind_is_an_error(base: Path) -> None:
    source = (
        "import subprocess, tests.conftest\n"
        "tests.conftest._SETTLE_S = 0\n"
        f"def test_a(): subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', {str(base)!r}], check=True)\n"
    )
    status, output = run_pytest(base, source)
    assert status != 0
    assert f"at {base}" in output
