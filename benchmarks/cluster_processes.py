"""A service of several processes, one of which may be ended at any time and started again."""

import os
import signal
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from xllm_compile.benchmarks.server_process import ServerProcess


@dataclass(kw_only=True, slots=True)
class Part:
    """A process of the service."""

    name: str
    options: Sequence[str]
    process: ServerProcess

    def send(self, number: signal.Signals) -> None:
        """To a process that has ended it does nothing."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)


class ClusterProcesses:
    """Gateways and instances of one artifact. Leaving it ends them."""

    def __init__(self, artifact: Path, registry: str) -> None:
        """registry: what --registry takes."""
        self._artifact = artifact
        self._registry = registry
        self._stack = ExitStack()
        self.parts: dict[str, Part] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in self.parts.values():
            # One that stands still would not hear that it is to end.
            part.send(signal.SIGCONT)
        self._stack.close()

    def add(self, name: str, role: str, options: Sequence[str] = ()) -> Part:
        """Returns once it is ready."""
        given = ["--role", role, "--registry", self._registry, *options]
        if role != "gateway":
            given += ["--name", name]
        part = Part(name=name, options=given, process=self._start(given))
        self.parts[name] = part
        return part

    def restart(self, part: Part) -> None:
        """Start it again after it ended; returns once it is ready."""
        part.process = self._start(part.options)

    def _start(self, options: Sequence[str]) -> ServerProcess:
        process = self._stack.enter_context(ServerProcess(self._artifact, options))
        process.wait_ready()
        return process
