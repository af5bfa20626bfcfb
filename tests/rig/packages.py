"""Debian packages as the content of test images: resolved and downloaded by apt, kept in `.cache/`.

A set of packages is resolved against an empty system, so that the result holds every library that its
programs need, whatever is installed here.

    .cache/packages/<digest of the names, release and architecture>/*.deb
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.rig.cache import kept
from tests.rig.namespace import RigError

TOOLS = ("attr", "coreutils", "findutils", "libcap2-bin")
"""Resolved with the libraries that they need."""
ALONE = ("dash",)
"""Taken without their dependencies: dash needs dpkg only while it is installed."""


def packages(tools: Sequence[str] = TOOLS, alone: Sequence[str] = ALONE) -> list[Path]:
    """The .deb files, downloaded unless they are in the cache. Raises RigError in one line."""
    release = platform.freedesktop_os_release()
    identity = [platform.machine(), release["ID"], release.get("VERSION_ID", ""), *tools, *alone]
    directory = kept("packages", identity, lambda place: _download(place, tools, alone))
    return sorted(directory.glob("*.deb"))


def members(deb: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The files in a package, in its order, with their content (empty where it is not a regular file)."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as unpack:
        assert unpack.stdout
        with tarfile.open(fileobj=unpack.stdout, mode="r|", errors="surrogateescape") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isreg() else None
                yield member, stream.read() if stream else b""
    if unpack.returncode != 0:
        raise RigError(f"{deb} is damaged; remove {deb.parent} and try again")


def _download(directory: Path, tools: Sequence[str], alone: Sequence[str]) -> None:
    """Tries with the package lists as they are, then once with new ones."""
    if shutil.which("apt-get") is None:
        raise RigError("no apt-get here: the image is made of Debian or Ubuntu packages")
    try:
        _resolve_and_download(directory, tools, alone)
    except subprocess.CalledProcessError:
        try:
            _apt("update", cwd=directory)
            _resolve_and_download(directory, tools, alone)
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if line.startswith("E:")]
            reason = lines[0][2:].strip() if lines else f"exit status {error.returncode}"
            raise RigError(f"apt cannot download the image's packages (no network?): {reason}") from error


def _resolve_and_download(directory: Path, tools: Sequence[str], alone: Sequence[str]) -> None:
    # An empty status file stands for an empty system; apt's own cache is left as it is.
    plan = _apt(
        "-o", "Dir::State::status=/dev/null", "-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=",
        "-o", "APT::Install-Recommends=false", "--simulate", "install", *tools, cwd=directory,
    )  # fmt: skip
    names = list(alone)
    for line in plan.splitlines():
        if line.startswith("Inst "):
            name, version = line.split()[1:3]
            names.append(f"{name}={version.strip('(')}")
    _apt("-o", "APT::Sandbox::User=root", "download", *names, cwd=directory)


def _apt(*arguments: str, cwd: Path) -> str:
    return subprocess.run(
        ["apt-get", "--quiet", "-o", "Acquire::Retries=1", *arguments],
        cwd=cwd, env={**os.environ, "LC_ALL": "C"}, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
