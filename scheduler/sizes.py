"""Sizes in bytes as people write them: 4GiB, 512MiB, 1.5GB."""

import re

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}b"] = 1000**_power
    _UNITS[f"{_letter}ib"] = _UNITS[_letter] = 1024**_power


def parse_size(text: str) -> int:
    """Bytes; a bare letter is binary (4G = 4GiB). Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match.group(2) not in _UNITS:
        raise ValueError(f"'{text}' is not a size; write it as 4GiB, 512MiB or 1.5GB")
    size = int(float(match.group(1)) * _UNITS[match.group(2)])
    if size < 1:
        raise ValueError(f"'{text}' must be above 0 bytes")
    return size
