"""What something takes: time, and processor time, which other work on the machine changes much less."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cost:
    elapsed_s: float
    cpu_s: float
    """Of all processors together."""

    @classmethod
    def median(cls, costs: Sequence[Self]) -> Self:
        return cls(statistics.median(cost.elapsed_s for cost in costs), statistics.median(cost.cpu_s for cost in costs))


class Clock:
    """Runs from its making."""

    def __init__(self, pid: int = 0) -> None:
        """The process whose processor time counts, with all below it; 0: the children that this one waits for."""
        self._pid = pid
        self._cpu_s = self._used_s()
        self._began_s = time.perf_counter()

    def cost(self) -> Cost:
        """Since it was made."""
        elapsed_s = time.perf_counter() - self._began_s
        return Cost(elapsed_s, self._used_s() - self._cpu_s)

    def _used_s(self) -> float:
        if self._pid:
            return _used_below(self._pid)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime


def _used_below(pid: int) -> float:
    """Of a process and of all that it started, ended or not (proc_pid_stat(5): utime, stime, cutime, cstime)."""
    process = Path("/proc", str(pid))
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        children = [child for found in process.glob("task/*/children") for child in found.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS_PER_S + sum(_used_below(int(child)) for child in children)
