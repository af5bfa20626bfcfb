"""<root>/lost+found: what a repair took out of its place, and why.

    lost+found/<number>.<name>         what was there
    lost+found/<number>.<name>.note    text: what it is, where it was, why it is here, since when

The note is there first. Nobody but a person deletes anything here.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from snapshotter import failpoint
from snapshotter.durable import sync_directory

NAME = "lost+found"


class LostAndFound:
    """Of one root."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._directory = root / NAME

    def move(self, path: Path, why: str) -> Path:
        """Moves a file or a directory here. Raises OSError."""
        place = self.note(path, why)
        failpoint.hit("fsck.step")
        path.rename(place)
        sync_directory(path.parent)
        sync_directory(self._directory)
        return place

    def keep(self, path: Path, why: str) -> Path:
        """Gives a file another name here, before the one that it has goes to something else. Raises OSError."""
        place = self.note(path, why)
        failpoint.hit("fsck.step")
        os.link(path, place, follow_symlinks=False)
        sync_directory(self._directory)
        return place

    def note(self, path: Path, why: str) -> Path:
        """Writes down something about a path; the name that is free for it. Raises OSError."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        place = self._directory / f"{time.time_ns()}.{path.name[:100]}"
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        text = f"what:  {os.fsencode(path)!r}\nroot:  {self._root}\nwhy:   {why}\nsince: {since}\n"
        fd = os.open(f"{place}.note", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(fd)
        sync_directory(self._directory)
        sync_directory(self._root)
        return place
