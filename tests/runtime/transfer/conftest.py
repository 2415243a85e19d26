import os
import threading
import time
from pathlib import Path

import pytest

from tests.runtime.transfer.libraries import MODULES, why_missing
from tests.runtime.transfer.memory import memory


@pytest.fixture
def target(request):
    """Of the module's SIZE, zeroes."""
    with memory(request.module.SIZE) as region:
        yield region


@pytest.fixture
def source(request):
    with memory(request.module.SIZE, seed=1) as region:
        yield region


@pytest.fixture
def no_leaks():
    """Descriptors, threads and mapped regions are as many after the test as before."""
    for scheme in MODULES:
        why_missing(scheme)
    before = _counts()
    yield
    # A thread that ends the last connection may still be about to.
    deadline_s = time.monotonic() + 60
    while _counts() != before and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert _counts() == before


def _counts() -> dict[str, int]:
    files = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_open(name)]
    return {
        "files": sum(path.startswith(("socket:", "/memfd:", "anon_inode:", "pipe:")) for path in files),
        "threads": threading.active_count(),
        "mappings": Path("/proc/self/maps").read_text().count("/memfd:test"),
    }


def _is_open(name: str) -> bool:
    return Path(f"/proc/self/fd/{name}").exists() or Path(f"/proc/self/fd/{name}").is_symlink()
