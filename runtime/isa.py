"""Instruction-set features of this CPU, as the artifact names them."""

import platform
from pathlib import Path

# Compiled graphs are built for the build machine's own CPU: any of these may be in the code.
_PREFIXES = ("avx", "amx", "fma", "f16c", "bmi", "gfni", "vaes", "vpclmulqdq", "sse4", "sha_ni", "popcnt", "movbe")


def isa_features() -> tuple[str, ...]:
    """Sorted, the machine's architecture first."""
    flags: set[str] = set()
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    return (platform.machine(), *sorted(flag for flag in flags if flag.startswith(_PREFIXES)))
