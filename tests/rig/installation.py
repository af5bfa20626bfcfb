"""What `make install` puts on a host: in a directory, and in place in a private mount namespace.

with installed() as installation:
    installation.files()                     # Path("/usr/local/bin/snapctl"), …
    with installation.in_place() as host:
        host.run(["/usr/local/bin/snapctl", "--version"])
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.rig.namespace import CHECKOUT, Namespace, RigError

PREFIX = Path("/usr/local")
LIBRARY = PREFIX / "lib/dedup-snapshotter"


@dataclass(frozen=True, slots=True)
class Installation:
    """A directory that was DESTDIR."""

    destination: Path

    def path(self, installed: Path | str) -> Path:
        """Where a file of the host is in the directory."""
        return self.destination / str(installed).removeprefix("/")

    def files(self) -> set[Path]:
        """What is not a directory, as the host will name it, without what is inside the library."""
        found = set()
        for directory, names, files in os.walk(self.destination):
            place = Path("/", Path(directory).relative_to(self.destination))
            if place.name == LIBRARY.name and place.parent.name == "lib":
                names.clear()
                files = []
            found.update(place / name for name in files)
        return found

    @contextmanager
    def in_place(self) -> Iterator[Namespace]:
        """A namespace in which /usr/local is the installed one."""
        with Namespace() as namespace:
            namespace.run(["mount", "--bind", self.path(PREFIX), PREFIX])
            yield namespace


@contextmanager
def installed() -> Iterator[Installation]:
    """Runs `make install` into a fresh directory, and removes it at the end. Raises RigError."""
    directory = Path(tempfile.mkdtemp(prefix="dds-install-", dir="/var/tmp"))
    try:
        make("install", f"DESTDIR={directory}")
        yield Installation(directory)
    finally:
        shutil.rmtree(directory)


def make(*arguments: str) -> str:
    """Runs make in the checkout: its output. Raises RigError."""
    # Under `make test`, the outer make's flags and variables would come through the environment.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES")}
    done = subprocess.run(
        ["make", "--no-print-directory", "--silent", *arguments],
        cwd=CHECKOUT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RigError(f"make {' '.join(arguments)} exited with {done.returncode}", done.stdout + done.stderr)
    return done.stdout
