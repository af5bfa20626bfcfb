"""Fixtures of the tests of what a mounted snapshot shows. Everything here needs root and real mounts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.host import Host


@pytest.fixture
def host(base: Path) -> Iterator[Host]:
    """A running daemon on a fresh root, in daemon mode, and its client."""
    with Host(base) as running:
        yield running
