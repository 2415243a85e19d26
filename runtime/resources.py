"""CPUs and memory for this process: those of the machine, and of them what its control groups (a container) leave it.

Control groups of both versions are read where they are usually mounted; limits of groups above count, too.
Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/ of Linux.
"""

import ctypes
import math
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def num_cpus(root: Path = _ROOT) -> int:
    """CPUs that this process can keep busy: those it may run on, or whole CPUs' worth of time where that is less.

    More threads than that would be stopped, all of them, for the rest of each period.
    """
    return max(1, int(min(len(os.sched_getaffinity(0)), _cpu_quota(root))))


def total_memory_bytes(root: Path = _ROOT) -> int:
    """All that this process could ever have."""
    limits = [limit for folder in _folders("memory", root) if (limit := _memory_limit(folder)) is not None]
    return min([_meminfo_bytes("MemTotal", root), *limits])


def available_memory_bytes(root: Path = _ROOT) -> int:
    """Memory that can be had without swapping."""
    left = [_memory_left(folder) for folder in _folders("memory", root)]
    return min([_meminfo_bytes("MemAvailable", root), *(each for each in left if each is not None)])


def return_freed_memory() -> None:
    """Gives pages of the heap that hold nothing any more back to the system; takes about 15 ms for each 100 MB.

    glibc keeps them while anything above them lives. Source: malloc_trim(3). Other C libraries have no such call, and
    nothing is done.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """Of this process's group and of those above it. In a container the path may be one that only the host has."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = top / path.strip("/")
        yield from (above for above in (folder, *folder.parents) if above.is_relative_to(top) and above.is_dir())


def _cpu_quota(root: Path) -> float:
    """CPUs' worth of time; infinity where nothing limits it."""
    quota = math.inf
    for folder in _folders("cpu", root):
        # Version 2 says "max" or a quota and a period in one file, version 1 in two, where -1 is no quota.
        values = _words(folder / "cpu.max")
        values = values or [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        if len(values) == 2 and values[0].isdecimal():
            quota = min(quota, int(values[0]) / int(values[1]))
    return quota


def _memory_limit(folder: Path) -> int | None:
    limit = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
    return int(limit[0]) if limit and limit[0].isdecimal() else None


def _memory_left(folder: Path) -> int | None:
    """Up to the limit; what was read from files makes room."""
    limit = _memory_limit(folder)
    used = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes")
    if limit is None or not used:
        return None
    words = _words(folder / "memory.stat")
    stat = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    files = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in ("active_file", "inactive_file"))
    return max(0, limit - int(used[0]) + files)


def _words(file: Path) -> list[str]:
    """None of a file that is not there."""
    try:
        return file.read_text().split()
    except OSError:
        return []


def _meminfo_bytes(name: str, root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo has no {name} line")
