"""Progress of a build: bars on a terminal, nothing but the summary elsewhere."""

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol


class BuildProgress(Protocol):
    """What the driver reports to."""

    def start(self, stage: str, total: float) -> None:
        """A stage of ``total`` units begins."""

    def advance(self, stage: str, amount: float = 1) -> None: ...


class NoProgress:
    def start(self, stage: str, total: float) -> None:
        return None

    def advance(self, stage: str, amount: float = 1) -> None:
        return None


class TerminalProgress(AbstractContextManager["TerminalProgress"]):
    """One bar per stage on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            # Where there is no terminal rich would still end with an empty line.
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, object] = {}

    def __enter__(self) -> "TerminalProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, stage: str, total: float) -> None:
        self._tasks[stage] = self._progress.add_task(stage, total=total)

    def advance(self, stage: str, amount: float = 1) -> None:
        self._progress.advance(self._tasks[stage], amount)  # type: ignore[arg-type]
