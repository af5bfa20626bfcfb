"""Runs Go programs against containerd's own sources, as Debian packages them.

Offline and in GOPATH mode: golang-github-containerd-containerd-dev and what it depends on are under
/usr/share/gocode. Without cgo, since no C compiler is asked for. The build cache is .cache/go-build of the
checkout, so that only the first run takes long.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
GOPATH = Path("/usr/share/gocode")
_BUILD_S = 150


def require(*programs: str) -> None:
    """Skips a test that cannot run here."""
    if reason := _missing(programs):
        pytest.skip(reason)


def _missing(programs: tuple[str, ...]) -> str:
    for name in ("go", *programs):
        if not shutil.which(name):
            return f"needs {name} (make setup)"
    if not (GOPATH / "src/github.com/containerd/containerd").is_dir():
        return "needs golang-github-containerd-containerd-dev (make setup)"
    return ""


def build(package: Path, binary: Path, *, test: bool = False) -> None:
    """Builds the program, or the test binary, of a directory. Fails the test with Go's output."""
    command = ["go", "test", "-c"] if test else ["go", "build"]
    done = subprocess.run(
        [*command, "-o", binary, "."],
        cwd=package, env=_environment(), timeout=_BUILD_S,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.fail(f"Go does not build {package}:\n{done.stdout}")


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "GO111MODULE": "off",
        "GOPATH": os.fspath(GOPATH),
        "GOCACHE": os.fspath(CHECKOUT / ".cache/go-build"),
        "GOENV": "off",
        "GOFLAGS": "-buildvcs=false",
        "GOPROXY": "off",
        "CGO_ENABLED": "0",
    }
