"""A server as a child process: what it says is kept for the day it fails, and it ends with whoever started it."""

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from xllm_compile.benchmarks.engine_process import KEEP_BYTECODE

_LAST_CHARS = 2000


class ChildProcess:
    """Context manager: the child runs from the start on, and is told to end, then made to, on leaving."""

    def __init__(
        self, command: Sequence[str], *, log: Path | None = None, has_stdout: bool = False, patience_s: float = 15.0
    ) -> None:
        """log: what it says is appended there. has_stdout: its stdout is a pipe to us instead. patience_s: for its end.

        Raises OSError where the command cannot be run.
        """
        # A file, not a pipe: nobody reads it until something goes wrong.
        self._log = tempfile.TemporaryFile("w+") if log is None else open(log, "a+")  # noqa: SIM115  (see __exit__)
        self._patience_s = patience_s
        self.started = time.monotonic()
        try:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE if has_stdout else self._log,
                stderr=self._log,
                text=True,
                env={**os.environ, **KEEP_BYTECODE},
            )
        except OSError:
            self._log.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=self._patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def last_words(self) -> str:
        self._log.seek(0)
        return self._log.read().strip()[-_LAST_CHARS:]


def free_port() -> int:
    """A port of the loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
