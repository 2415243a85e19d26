"""CPUs and memory that control groups of both versions leave a process, read from a copy of the files."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.runtime.memory.test_cpu_memory import resident_bytes
from xllm_compile.runtime.resources import available_memory_bytes, num_cpus, return_freed_memory, total_memory_bytes

GIB = 1 << 30
MEMINFO = "MemTotal: 67108864 kB\nMemFree: 1 kB\nMemAvailable: 33554432 kB\n"
V2 = "sys/fs/cgroup"


@pytest.fixture(autouse=True)
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


def root_of(folder: Path, groups: str, files: Mapping[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, 16),
        ("0::/\n", {f"{V2}/cpu.max": "max 100000\n"}, 16),
        ("0::/\n", {f"{V2}/cpu.max": "400000 100000\n"}, 4),
        # Time for less than a CPU more is none for a thread more.
        ("0::/\n", {f"{V2}/cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {f"{V2}/cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {f"{V2}/cpu.max": "9900000 100000\n"}, 16),
        # The tightest of all above, and a path that only the host has.
        ("0::/a/b\n", {f"{V2}/a/cpu.max": "300000 100000\n", f"{V2}/a/b/cpu.max": "500000 100000\n"}, 3),
        ("0::/kubepods/pod1\n", {f"{V2}/cpu.max": "200000 100000\n"}, 2),
        (
            "5:cpu,cpuacct:/docker/x\n4:memory:/\n",
            {f"{V2}/cpu/cpu.cfs_quota_us": "600000\n", f"{V2}/cpu/cpu.cfs_period_us": "100000\n"},
            6,
        ),
        (
            "5:cpu,cpuacct:/\n0::/\n",
            {f"{V2}/cpu/cpu.cfs_quota_us": "-1\n", f"{V2}/cpu/cpu.cfs_period_us": "100000\n"},
            16,
        ),
    ],
)
def test_cpus(tmp_path: Path, groups: str, files: Mapping[str, str], expected: int) -> None:
    assert num_cpus(root_of(tmp_path, groups, files)) == expected


def test_without_control_groups_all_of_the_machine_is_there(tmp_path: Path) -> None:
    root = root_of(tmp_path, "", {})
    (root / "proc/self/cgroup").unlink()
    assert num_cpus(root) == 16
    assert (total_memory_bytes(root), available_memory_bytes(root)) == (64 * GIB, 32 * GIB)


@pytest.mark.parametrize(
    ("groups", "files", "total", "available"),
    [
        ("0::/\n", {f"{V2}/memory.max": "max\n", f"{V2}/memory.current": f"{GIB}\n"}, 64, 32),
        # What was read from files, as weights are, makes room.
        (
            "0::/\n",
            {
                f"{V2}/memory.max": f"{8 * GIB}\n",
                f"{V2}/memory.current": f"{5 * GIB}\n",
                f"{V2}/memory.stat": f"anon {2 * GIB}\nactive_file {GIB}\ninactive_file {2 * GIB}\n",
            },
            8,
            6,
        ),
        (
            "4:memory:/docker/x\n",
            {
                f"{V2}/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
                f"{V2}/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
                f"{V2}/memory/memory.stat": f"active_file 0\ntotal_active_file {GIB}\ntotal_inactive_file 0\n",
            },
            4,
            2,
        ),
        (
            "4:memory:/\n",
            {
                f"{V2}/memory/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V2}/memory/memory.usage_in_bytes": f"{GIB}\n",
            },
            64,
            32,
        ),
    ],
)
def test_memory(tmp_path: Path, groups: str, files: Mapping[str, str], total: int, available: int) -> None:
    root = root_of(tmp_path, groups, files)
    assert (total_memory_bytes(root), available_memory_bytes(root)) == (total * GIB, available * GIB)


def test_this_machine() -> None:
    assert num_cpus() >= 1 and 0 < available_memory_bytes() <= total_memory_bytes()


def test_freed_memory_below_what_lives_goes_back_to_the_system() -> None:
    # Above the sizes that Python pools, below those that get a mapping of their own.
    blocks = [bytes(4096) for _ in range(25_000)]
    last = blocks[-1]
    del blocks
    held = resident_bytes(0, 1 << 64)
    return_freed_memory()
    assert held - resident_bytes(0, 1 << 64) > 50_000_000
    assert len(last) == 4096
