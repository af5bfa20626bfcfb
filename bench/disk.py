"""A filesystem as hosts have it, to measure on.

The machine's own may be mounted with `discard` and without a journal, as on many virtual machines: there the kernel
waits for the device for every file that is deleted (ext4_free_blocks in fs/ext4/mballoc.c), which hides all else.
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.rig.filesystem import filesystem
from tests.rig.roots import tear_down

SIZE_BYTES = 16 << 30
"""Of the sparse image; what has been written stays allocated until the end."""


@contextmanager
def fresh_ext4(directory: Path) -> Iterator[Path]:
    """Where a new ext4 is mounted, with a journal. It is in an image below `directory`, which is read and written
    directly: nothing is cached twice. Nothing happens on it in the background. SIGTERM, too, leaves nothing behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    base = Path(tempfile.mkdtemp(prefix="dds-bench-", dir=directory))
    try:
        with filesystem("ext4", base, SIZE_BYTES) as mountpoint:
            _run("mount", "-o", "remount,noinit_itable", mountpoint)
            device = _run("findmnt", "--noheadings", "--output", "SOURCE", mountpoint).strip()
            _run("losetup", "--direct-io=on", device)
            yield mountpoint
    finally:
        tear_down(base)


def _run(*argv: str | Path) -> str:
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
