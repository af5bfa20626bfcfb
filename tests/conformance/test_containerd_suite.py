"""containerd's own snapshotter test suite, through its own proxy client: both mount modes, a fresh daemon a test.

Rename is the suite's to skip: it does so itself, whatever the snapshotter ("still fails on some kernels
with overlay").
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance import go
from tests.rig.containerd import directory_for_overlay
from tests.rig.namespace import CHECKOUT, Namespace, RigError

pytestmark = pytest.mark.root

PASSED = {
    "Basic", "StatActive", "StatComitted", "TransitivityTest", "PreareViewFailingtest", "Update", "Remove",
    "Walk", "LayerFileupdate", "RemoveDirectoryInLowerLayer", "Chown", "DirectoryPermissionOnCommit",
    "RemoveIntermediateSnapshot", "DeletedFilesInChildSnapshot", "MoveFileFromLowerLayer", "ViewReadonly",
    "StatInWalk", "CloseTwice", "RootPermission", "128LayersMount",
}  # fmt: skip
SKIPPED = {"Rename"}

_RESULT = re.compile(r"^ +--- (PASS|FAIL|SKIP): TestSnapshotter/(\S+) \(", re.MULTILINE)
_TIMEOUT_S = 120


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short-named, where overlays can be mounted. The mounts below it are gone with their namespace."""
    go.require("unshare", "nsenter", "chattr")
    try:
        place = directory_for_overlay()
    except RigError as error:
        pytest.skip(str(error))
    made = Path(tempfile.mkdtemp(prefix="dds-", dir=place))
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("mode", ["daemon", "client"])
def test_containerds_suite_passes(directory: Path, mode: str) -> None:
    suite = directory / "suite"
    go.build(Path(__file__).parent / "snapshotter", suite, test=True)
    with Namespace() as namespace:
        done = run(namespace, suite, directory, mode)
    results = {name: result for result, name in _RESULT.findall(done.stdout)}
    expected = dict.fromkeys(PASSED, "PASS") | dict.fromkeys(SKIPPED, "SKIP")
    wrong = {name for name in results.keys() | expected.keys() if results.get(name) != expected.get(name)}
    assert not wrong, f"{wrong} are not as expected:\n{done.stdout}"
    assert done.returncode == 0, done.stdout
    assert [path.name for path in directory.iterdir()] == ["suite"], "the suite left something behind"


def run(namespace: Namespace, suite: Path, directory: Path, mode: str) -> subprocess.CompletedProcess[str]:
    """Not namespace.run: the suite goes on after a failure, and its output says what failed."""
    flags = ["-test.v", "-test.root", "-test.parallel=4", f"-test.timeout={_TIMEOUT_S}s"]
    return subprocess.run(
        namespace.command([suite, *flags, sys.executable, "-m", "snapshotter.server", "--mount-mode", mode]),
        env={**os.environ, "TMPDIR": os.fspath(directory), "PYTHONPATH": os.fspath(CHECKOUT)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", timeout=_TIMEOUT_S + 20, check=False,
    )  # fmt: skip
