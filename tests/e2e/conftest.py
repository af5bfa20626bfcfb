"""The fixtures of the end-to-end tests: images built once, and a fresh rig for each test, at whose end no two paths
of any chain may share an inode that the images did not link, and a full check of the store finds nothing."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest

from snapshotter.client import Client, Found
from snapshotter.fsck.findings import Finding
from tests.rig.chains import alias_findings, image_links
from tests.rig.containerd import Rig, directory_for_overlay
from tests.rig.image import Image, Recipe, build_image
from tests.rig.namespace import RigError


@functools.cache
def missing() -> str:
    """Why a private containerd cannot run here; empty when it can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [name for name in ("containerd", "ctr", "runc", "unshare", "nsenter") if not shutil.which(name)]
    if absent:
        return f"needs {', '.join(absent)} (make setup)"
    try:
        directory_for_overlay()
    except RigError as error:
        return str(error)
    return ""


def skip(reason: str) -> NoReturn:
    """Skips what cannot run here; where it is expected to (CI=true), that is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def make_image(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Image]:
    """Builds a recipe, each only once."""
    built: dict[str, Image] = {}

    if reason := missing():
        skip(reason)

    def make(recipe: Recipe) -> Image:
        if recipe.reference not in built:
            archive = tmp_path_factory.mktemp("image") / "image.tar"
            built[recipe.reference] = build_image(recipe, archive)
        return built[recipe.reference]

    return make


@pytest.fixture(scope="session")
def image(make_image: Callable[[Recipe], Image]) -> Image:
    """The usual image."""
    return make_image(Recipe("example.test/first:latest"))


@pytest.fixture(params=["daemon", "client"])
def mode(request: pytest.FixtureRequest) -> str:
    """Who mounts."""
    return str(request.param)


@pytest.fixture
def rig(mode: str) -> Iterator[Rig]:
    """Fresh daemon and containerd. At the end there must be no alias and nothing for fsck to find, the daemon must stop
    with 0, and nothing may be left."""
    if reason := missing():
        skip(reason)
    with Rig(daemon_arguments=["--mount-mode", mode]) as running:
        yield running
        print(running.logs(100))  # pytest shows it with a failed test
        assert find_aliases(running) == []
        assert errors_found(running) == []


def errors_found(rig: Rig) -> list[Finding]:
    """By a check of the running daemon, contents included."""
    with Client(str(rig.daemon.address)) as client:
        found = [event.finding for event in client.check(verify_content=True) if isinstance(event, Found)]
    return [finding for finding in found if finding.is_error]


def find_aliases(rig: Rig) -> list[str]:
    """In all chains of the store; what the images hard-linked is known from their archives."""
    rig.collect_garbage()  # or snapshots would go while they are looked at
    with Client(str(rig.daemon.address)) as client:
        return alias_findings(client, rig.daemon_root, image_links(rig.base / "content"))
