"""What every subcommand prints: progress on stderr, tables and the record's path on stdout."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from xllm_compile.benchmarks.record import Bar, Record

_out = Console(highlight=False)
_err = Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """One line of progress."""
    _err.print(message, style="dim", markup=False)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The first column is text, the others are figures."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    _out.print(table)


def show_bars(title: str, rows: Iterable[tuple[str, Bar]]) -> None:
    """Bars with the record each belongs to."""
    cells = []
    for name, bar in rows:
        met = {True: "[green]met[/green]", False: "[red]not met[/red]", None: ""}[bar.met]
        cells.append((name, bar.what, f"{bar.value:.4g} {bar.unit}".strip(), bar.bar, met))
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("record", "what"):
        table.add_column(column, overflow="fold")
    for column in ("measured", "bar", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    _out.print(table)


def finish(record: Record, folder: Path) -> None:
    """Write the record and print its bars."""
    path = record.write(folder)
    show_bars(record.name, [(record.name, bar) for bar in record.bars])
    _out.print(f"wrote {path}", markup=False)
