"""Write a directory whole or not at all: build beside it, then swap the two names in one step."""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """Yields an empty directory that replaces ``output`` when the block ends without an exception.

    A process killed in between leaves ``output`` as it was, and a hidden directory that the next build clears.
    Raises ValueError when another process is writing the same output, NotADirectoryError when ``output`` is a file.
    """
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "exists and is no directory", str(output))
    building = output.parent / f".{output.name}.building"
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(output.parent / f".{output.name}.lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            raise ValueError(f"another build is writing {output}; wait for it or choose another -o") from err
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            yield building
            _swap(building, output)
        finally:
            # After the swap this is the artifact that was replaced; after an error, what was half built.
            shutil.rmtree(building, ignore_errors=True)
            (output.parent / f".{output.name}.lock").unlink(missing_ok=True)
    finally:
        os.close(lock)


def _swap(new: Path, output: Path) -> None:
    if not output.exists():
        os.rename(new, output)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(output), _RENAME_EXCHANGE)
    if done == 0:
        return
    if ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(output))
    # A file system without exchange: for a moment there is no output, but never a half one.
    shutil.rmtree(output)
    os.rename(new, output)
