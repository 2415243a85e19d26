"""Facts of this machine and user: the only place where environment variables are read at build time."""

import os
import shutil
from pathlib import Path


def cache_dir() -> Path:
    """Where compiled graphs and models compiled on first use are kept: $XDG_CACHE_HOME/xllm-compile."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "xllm-compile"


def free_disk_bytes(path: Path) -> int:
    """Free space on the file system that holds ``path`` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def cpu_model() -> str:
    """As /proc/cpuinfo names it; "unknown" where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
