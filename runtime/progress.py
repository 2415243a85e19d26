"""The progress bar of offline generation. Imported only where stderr is a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xllm_compile.runtime.llm import ProgressReport


@contextmanager
def progress_bar(total: int) -> Iterator[ProgressReport]:
    """Shows finished prompts and generated tokens per second; yields the function that moves it."""
    columns = (
        TextColumn("prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("prompts", total=total, rate="")

        def report(*, num_finished: int, num_tokens: int) -> None:
            elapsed_s = progress.tasks[0].elapsed or 0.0
            rate = f"{num_tokens / elapsed_s:.1f} tokens/s" if elapsed_s > 0 else ""
            progress.update(task, completed=num_finished, rate=rate)

        yield report
