"""Fixtures of the tests that need one daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.daemon import Daemon


@pytest.fixture
def daemon(base: Path) -> Iterator[Daemon]:
    """A running daemon on a fresh root; a test may stop, kill and start it."""
    with Daemon(base / "root", base / "s.sock", log=base / "daemon.log") as running:
        yield running
