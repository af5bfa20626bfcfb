"""The trash: who waits for it is answered when what was in it is gone, whatever hung in between."""

from __future__ import annotations

import fcntl
import os
import time
from concurrent.futures import Future
from pathlib import Path

from snapshotter.errors import Unavailable
from snapshotter.gc import Trash
from snapshotter.workers.pool import Workers

HANG_S = 1.0
HUNG = 3
"""As many as may hang; there is more to delete."""


def lock(directory: Path) -> int:
    """Until it is closed, whoever deletes an object there waits, as for a disk."""
    fd = os.open(directory, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def throw_away(trash: Path, layer: int) -> None:
    """With an object in shard 00."""
    refs = trash / f"{layer}.1/refs"
    refs.mkdir(parents=True)
    (refs / f"00{layer}").touch()


def wait_for_hung(trash: Trash) -> None:
    deadline_s = time.monotonic() + 60
    while len(trash._hung) < HUNG:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_who_waits_while_the_last_that_may_hangs_goes_on_is_answered_when_all_is_gone(tmp_path: Path) -> None:
    directory, shard = tmp_path / "trash", tmp_path / "objects/00"
    shard.mkdir(parents=True)
    for layer in range(HUNG + 2):
        throw_away(directory, layer)
    locked, workers = lock(shard), Workers()
    left: list[str] = []

    def look(_: Future[None]) -> None:
        left.extend(os.listdir(directory))

    trash = Trash(directory, shard.parent, workers, HANG_S)
    try:
        waiter = trash.drained()
        waiter.add_done_callback(look)
        wait_for_hung(trash)
        os.close(locked)
        # Where this test is slower than the trash, that says what hangs.
        assert isinstance(waiter.exception(60), Unavailable) or not left, left
        trash.drained().result(60)
        assert os.listdir(directory) == []
    finally:
        trash.stop()
        workers.close()
        trash.close(time.monotonic() + 10)
