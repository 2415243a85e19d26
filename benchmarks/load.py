"""What else the machine was doing: a figure taken beside other work says so in its record."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Cores' worth of foreign work that a quiet machine may show: its own daemons.
QUIET_CORES = 0.08


@dataclass(frozen=True, kw_only=True, slots=True)
class _Snapshot:
    wall_s: float
    busy_s: float
    """CPU time of the whole machine, time stolen by its host included."""
    own_s: float
    """CPU time of this process, its descendants, and those of them that have ended and were waited for."""


class ForeignLoad:
    """Context manager; ``cores`` is then the mean number of cores that others kept busy inside the block."""

    def __init__(self) -> None:
        self.cores = 0.0

    def __enter__(self) -> "ForeignLoad":
        self._began = _snapshot()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = _snapshot()
        foreign = (ended.busy_s - self._began.busy_s) - (ended.own_s - self._began.own_s)
        self.cores = round(max(0.0, foreign / max(ended.wall_s - self._began.wall_s, 1e-3)), 3)


def wait_quiet(timeout_s: float = 30.0) -> float:
    """Wait until others use next to nothing, or the timeout. Returns the cores they use now."""
    deadline = time.monotonic() + timeout_s
    while True:
        with ForeignLoad() as load:
            time.sleep(0.5)
        if load.cores <= QUIET_CORES or time.monotonic() > deadline:
            return load.cores


def process_tree(root: int) -> list[int]:
    """``root`` and its living descendants."""
    found = [root]
    for pid in found:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except OSError:
                # The thread or the process has just ended.
                continue
    return found


def _snapshot() -> _Snapshot:
    fields = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle, waiting = fields[3], fields[4]
    own = _cpu_seconds(process_tree(os.getpid()))
    return _Snapshot(wall_s=time.monotonic(), busy_s=(sum(fields) - idle - waiting) / _TICKS_PER_S, own_s=own)


def _cpu_seconds(pids: Iterable[int]) -> float:
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        # utime, stime, cutime and cstime: fields 14 to 17 of the file.
        total += sum(int(value) for value in fields[11:15])
    return total / _TICKS_PER_S
