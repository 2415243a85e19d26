"""A child process that says READY, and does not outlive its parent."""

import asyncio
import ctypes
import logging
import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from xllm_compile.scheduler.launch.plan import ProcessPlan

_PR_SET_PDEATHSIG = 1
_LINE_BYTES = 1 << 20
_READY = re.compile(r"READY http=(\S+):(\d+) grpc=(\S+):(\d+)(?: registry=(\S+:\d+))? startup_s=")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """What a READY line says."""

    http_host: str
    http_port: int
    grpc_port: int
    registry: str
    """HOST:PORT of a gateway's own; empty without one."""


class Child(Protocol):
    last_line: str
    """The last one it logged."""

    async def ready(self) -> Ready | None:
        """As soon as it serves; None when it ended before."""
        ...

    async def wait(self) -> int:
        """Its exit code, negative for a signal. Its output has been forwarded by then."""
        ...

    def send(self, number: signal.Signals) -> None:
        """Nothing happens where it has ended."""
        ...


class LocalChild:
    """See Child. What it logs is forwarded to stderr behind its name; only READY is taken from its stdout."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self._name = name
        self._process = process
        self._ready: asyncio.Future[Ready | None] = asyncio.get_running_loop().create_future()
        self.last_line = ""
        self._readers = [asyncio.create_task(self._read_output()), asyncio.create_task(self._read_log())]

    @classmethod
    async def start(cls, plan: ProcessPlan) -> Self:
        """In a session of its own: an interrupt at the terminal reaches the supervisor alone."""
        process = await asyncio.create_subprocess_exec(
            *plan.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(plan.environment),
            limit=_LINE_BYTES,
            start_new_session=True,
            preexec_fn=_DieWithParent(),
        )
        return cls(plan.name, process)

    async def ready(self) -> Ready | None:
        return await asyncio.shield(self._ready)

    async def wait(self) -> int:
        # Not gather: whoever stops waiting must not stop the readers.
        await asyncio.wait(self._readers)
        return await self._process.wait()

    def send(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            self._process.send_signal(number)

    async def _read_output(self) -> None:
        assert self._process.stdout is not None
        async for data in self._process.stdout:
            line = data.decode(errors="replace").rstrip("\n")
            found = _READY.match(line)
            if found is not None and not self._ready.done():
                self._ready.set_result(
                    Ready(http_host=found[1], http_port=int(found[2]), grpc_port=int(found[4]), registry=found[5] or "")
                )
            else:
                self._forward(line)
        if not self._ready.done():
            self._ready.set_result(None)

    async def _read_log(self) -> None:
        assert self._process.stderr is not None
        async for data in self._process.stderr:
            self._forward(data.decode(errors="replace").rstrip("\n"))

    def _forward(self, line: str) -> None:
        self.last_line = line
        print(f"[{self._name}] {line}", file=sys.stderr, flush=True)


def environment(more: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, **more}


class _DieWithParent:
    """Runs in the child before its program: whatever ends the parent, kill -9 included, ends the child."""

    def __init__(self) -> None:
        self._parent = os.getpid()
        # Loaded here: between fork and exec as little as possible should happen.
        self._libc = ctypes.CDLL(None)

    def __call__(self) -> None:
        self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._parent:
            os._exit(1)
