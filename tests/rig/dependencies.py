"""What package managers put into images: a directory of pip's and a node_modules of npm's, kept in `.cache/`.

Each is asked through its own client, as it is configured here. Where it cannot be reached, RigError says so. Where
there is no npm, the modules come from Debian packages.

    .cache/trees/<digest of what was asked for>/
        bin/ pygments/ …        what pip installed
        node_modules/           what npm installed
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.rig.cache import kept
from tests.rig.namespace import RigError
from tests.rig.packages import packages

PIP = ("markdown-it-py", "packaging", "pygments", "rich")
"""Without compiled code, and installed here already, by which version is settled."""
NPM = ("chalk@4.1.2", "lodash@4.17.21", "semver@7.6.3")
NODE_PACKAGES = ("node-chalk", "node-lodash", "node-semver")


def pip_tree() -> Path:
    """Where pip has installed PIP, byte code and all."""
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in PIP]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--compile", "--root-user-action=ignore"]
    return _tree("pip", _runs("pip", [*pip, "--target", "."], wanted), wanted)


def npm_tree() -> Path:
    """The directory in which is a node_modules of NPM, and what these need."""
    if shutil.which("npm") is None:
        return _tree("apt", _unpack_node_packages, NODE_PACKAGES)
    npm = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", "."]
    return _tree("npm", _runs("npm", npm, NPM), NPM)


def _tree(kind: str, fill: Callable[[Path], None], wanted: Sequence[str]) -> Path:
    return kept("trees", [kind, sys.version, *wanted], fill)


def _unpack_node_packages(directory: Path) -> None:
    unpacked = directory / "unpacked"
    for deb in packages((), NODE_PACKAGES):
        subprocess.run(["dpkg-deb", "--extract", deb, unpacked], check=True)
    (unpacked / "usr/share/nodejs").rename(directory / "node_modules")
    shutil.rmtree(unpacked)


def _runs(kind: str, command: Sequence[str], wanted: Sequence[str]) -> Callable[[Path], None]:
    """What installs into a directory."""

    def fill(directory: Path) -> None:
        environment = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(
            [*command, *wanted], cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
            reason = "; ".join(map(str.strip, lines[:2])) or f"exit status {done.returncode}"
            raise RigError(f"{kind} cannot install (no network?): {reason}")

    return fill
