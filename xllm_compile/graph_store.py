"""Compiled files by content key, in the user's cache: what one build made the next one links."""

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import xxhash

# No compilation of one graph takes this long: its scratch folder belongs to a build that was killed.
_ABANDONED_S = 24 * 3600


class GraphStore:
    """Files named by key. A key names one content for ever, so a file is never rewritten; writes are atomic."""

    def __init__(self, root: Path, suffix: str = ".so") -> None:
        self.root = root
        self.suffix = suffix
        self._adopted: dict[str, Path] = {}

    def path(self, key: str) -> Path:
        return self.root / f"{key}{self.suffix}"

    def adopt(self, key: str, path: Path) -> None:
        """Also find ``key`` at ``path``: in the artifact that is about to be replaced, when the cache was cleared."""
        if path.is_file():
            self._adopted[key] = path

    def find(self, key: str) -> Path | None:
        path = self.path(key)
        if path.is_file():
            # Recently used files are the ones to keep when the cache is trimmed.
            os.utime(path)
            return path
        return self._adopted.get(key)

    def trim(self, max_bytes: int) -> None:
        """Delete the least recently used files beyond ``max_bytes``, and what killed builds left behind."""
        for scratch in self.root.glob(".*/"):
            if time.time() - scratch.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(scratch, ignore_errors=True)
        files = sorted(self.root.glob(f"*{self.suffix}"), key=lambda file: file.stat().st_mtime, reverse=True)
        total = 0
        for file in files:
            total += file.stat().st_size
            if total > max_bytes:
                file.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows it: an artifact's files are replaced, never written to."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def graph_key(parts: Iterable[str]) -> str:
    """Key over everything a compiled file depends on. No path, time, HOME or host name goes in."""
    return xxhash.xxh3_128("\0".join(parts).encode()).hexdigest()
