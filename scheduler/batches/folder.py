"""The folder of --batch-dir: the database, the uploads, and the lock that one server at a time holds."""

import contextlib
import fcntl
import os
import secrets
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_UNFINISHED = ".part"
_MAX_HOLDER_BYTES = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    folder: Path
    max_file_bytes: int = 200 << 20
    """Of one upload."""
    max_lines: int = 50_000
    """Requests in one batch."""
    max_disk_bytes: int = 16 << 30
    """Of all uploads and results. Beyond it uploads are refused, and batches wait until files are deleted."""

    def __post_init__(self) -> None:
        for name in ("max_file_bytes", "max_lines", "max_disk_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class BatchFolder:
    """Paths are made of ids only, which are ours."""

    def __init__(self, config: BatchConfig) -> None:
        """Raises OSError when the folder cannot be used, ValueError when another server uses it."""
        self.config = config
        folder = config.folder
        self._uploads = folder / "files"
        # Prompts and answers are nobody else's.
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._uploads.mkdir(exist_ok=True)
        self.database = folder / "batches.sqlite3"
        self._lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            # A server that took it a moment ago may not have written who it is.
            holder = os.pread(self._lock, _MAX_HOLDER_BYTES, 0).decode(errors="replace") or "unknown"
            os.close(self._lock)
            raise ValueError(
                f"--batch-dir {folder} is in use by another server ({holder}); stop that one or give each a folder of"
                " its own"
            ) from err
        except OSError:
            os.close(self._lock)
            raise
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._lock)

    def upload(self, file_id: str) -> Path:
        return self._uploads / file_id

    def unfinished(self, file_id: str) -> Path:
        """Where an upload lies until it is whole."""
        return self._uploads / (file_id + _UNFINISHED)

    def keep(self, file_id: str) -> None:
        """The upload is whole and on disk under its own name. It has no place in the database yet: see clear."""
        os.replace(self.unfinished(file_id), self.upload(file_id))
        descriptor = os.open(self._uploads, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def discard(self, file_id: str) -> None:
        for path in (self.upload(file_id), self.unfinished(file_id)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def clear(self, known_ids: Collection[str]) -> None:
        """Delete what a process that died left: uploads that did not get into the database, or were deleted there."""
        for path in self._uploads.iterdir():
            if path.name not in known_ids:
                path.unlink()


def new_id(prefix: str) -> str:
    """An id that nobody guesses: who knows it may read."""
    return prefix + secrets.token_hex(16)
