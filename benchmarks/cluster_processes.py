"""A service of several processes, one of which may be ended at any time and started again."""

import os
import signal
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from xllm_compile.benchmarks.host_network import Host
from xllm_compile.benchmarks.server_process import ServerProcess


@dataclass(kw_only=True, slots=True)
class Part:
    """A process of the service."""

    name: str
    role: str
    options: Sequence[str]
    host: Host | None
    process: ServerProcess

    def send(self, number: signal.Signals) -> None:
        """To a process that has ended it does nothing."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)


class ClusterProcesses:
    """Gateways and instances of one artifact. Leaving it ends them."""

    def __init__(self, artifact: Path, registry: str, *, logs: Path | None = None) -> None:
        """registry: what --registry takes. logs: a folder for what they say, by name."""
        self._artifact = artifact
        self._registry = registry
        self._logs = logs
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

    def add(self, name: str, role: str, options: Sequence[str] = (), *, host: Host | None = None) -> Part:
        """Returns once it is ready. On a host it is reached at that host's address, and by anybody."""
        given = ["--role", role, "--registry", self._registry, *options]
        if host is not None:
            given += ["--host", host.address, "--allow-unauthenticated"]
        if role != "gateway":
            given += ["--name", name]
        process = self._start(name, given, host)
        self.parts[name] = part = Part(name=name, role=role, options=given, host=host, process=process)
        process.wait_ready()
        return part

    def restart(self, part: Part) -> None:
        """Start it again after it ended; its process says when it is ready."""
        part.process = self._start(part.name, part.options, part.host)

    def _start(self, name: str, options: Sequence[str], host: Host | None) -> ServerProcess:
        log = None if self._logs is None else self._logs / f"{name}.log"
        prefix = () if host is None else host.command
        return self._stack.enter_context(ServerProcess(self._artifact, options, prefix=prefix, log=log))
