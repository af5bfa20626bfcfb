"""What holds for all tests: what is skipped, what a skip means, and that a run leaves nothing behind.

- Tests marked `nightly` run only with --nightly.
- Tests marked `root` are skipped without root.
- Where all tests are expected to run (CI=true), every skip is a failure.
- A mount, a loop device or a process that the run left behind is an error at its end.
- Each process that runs tests (pytest-xdist has several) has a mount namespace of its own: what one mounts is not in
  the way of the other, and nothing of it reaches the host.
"""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.rig.installation import Installation, installed
from tests.rig.namespace import enter_private_mounts
from tests.rig.roots import tear_down

_RUN = "DEDUP_SNAPSHOTTER_TEST_RUN"
"""Every process that the run starts has this variable, whoever its parent is by then."""
_SETTLE_S = 10
"""The kernel, and other programs of the host, may need a moment."""

_bases: list[Path] = []
"""The directories that this process gave to its tests."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run the tests with larger numbers, too")


def pytest_configure() -> None:
    if os.geteuid() == 0:
        enter_private_mounts()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--nightly"):
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        if nightly:
            config.hook.pytest_deselected(items=nightly)
            items[:] = [item for item in items if item not in nightly]
    if os.geteuid() != 0:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not hasattr(report, "wasxfail"):  # an expected failure counts as skipped
        _no_skip_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _no_skip_in_ci(report)
    return report


def _no_skip_in_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and os.environ.get("CI") == "true":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"CI=true, where every test must run: {reason}"


@pytest.fixture
def base() -> Iterator[Path]:
    """A short-named directory that is not on a tmpfs: sockets and overlays fit into it."""
    directory = Path(tempfile.mkdtemp(prefix="dds-", dir="/var/tmp"))
    _bases.append(directory)
    yield directory
    tear_down(directory)


@pytest.fixture(scope="session")
def installation() -> Iterator[Installation]:
    """What `make install` puts on a host, in a directory of its own."""
    with installed() as result:
        yield result


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Compares mounts and loop devices, and looks for processes of this run."""
    os.environ[_RUN] = uuid.uuid4().hex
    mounts = _mounts()
    yield
    left = _settled(lambda: [*sorted(_mounts() - mounts), *_loop_devices(), *_processes()])
    if left:
        pytest.fail("the run left behind: " + "; ".join(left), pytrace=False)


def _settled(look: Callable[[], list[str]]) -> list[str]:
    """What `look` still finds when it has found nothing, or after _SETTLE_S."""
    deadline = time.monotonic() + _SETTLE_S
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _mounts() -> set[str]:
    """proc_pid_mountinfo(5): the id, which tells two mounts at one place apart, and the place."""
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return {f"mount {words[0]} at {words[4]}" for words in map(str.split, lines)}


def _loop_devices() -> list[str]:
    """Of this process's tests."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            image = Path(backing.read_text().strip())
        except OSError:  # detached just now (sysfs answers ENOENT, ENODEV or ENXIO)
            continue
        if any(image.is_relative_to(base) for base in _bases):
            found.append(f"{backing.parts[3]} of {image}")
    return found


def _processes() -> list[str]:
    """Of this run, but this one. multiprocessing's own helpers live as long as their interpreter."""
    marker = f"{_RUN}={os.environ[_RUN]}".encode()
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = Path(entry, "environ").read_bytes().split(b"\0")
            command = Path(entry, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # gone, or somebody else's
            continue
        if marker in environment and "multiprocessing" not in command:
            found.append(f"process {entry.name}: {command.strip()}")
    return found
