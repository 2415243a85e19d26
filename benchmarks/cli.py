"""xllm-bench: one subcommand per claim; each prints a table and writes one JSON record."""

import sys
from pathlib import Path
from typing import NoReturn

import click

from xllm_compile import __version__
from xllm_compile.benchmarks.commands import engine, graphs, memory, serving, simulate, traces
from xllm_compile.benchmarks.commands.options import results_option

_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}


@click.group(context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="xllm-bench")
def command() -> None:
    """Measure this checkout on this machine.

    Figures are recorded under benchmarks/results/ with command, commit, machine, versions and raw numbers. Run them
    with nothing else on the machine; what others used is recorded beside them.
    """


@command.command("check")
@results_option
@click.option("--strict", is_flag=True, help="Exit with 1 when a bar is not met.")
def check_command(results: Path, strict: bool) -> None:
    """Show every recorded bar, met or not."""
    from xllm_compile.benchmarks.console import show_bars
    from xllm_compile.benchmarks.record import read_records

    rows = [(record.name, bar) for record in read_records(results) for bar in record.bars]
    if not rows:
        raise click.ClickException(f"{results} holds no record with bars; run for example: xllm-bench startup")
    show_bars(f"{results.name}", rows)
    missed = [bar for _, bar in rows if bar.met is False]
    click.echo(f"{sum(bar.met is True for _, bar in rows)} bars met, {len(missed)} not met")
    if strict and missed:
        sys.exit(1)


for subject in (engine, memory, graphs, serving, traces, simulate):
    for subcommand in subject.COMMANDS:
        command.add_command(subcommand)


def main() -> NoReturn:
    """Entry point: what goes wrong is one line and exit code 2."""
    try:
        code = command.main(standalone_mode=False)
    except click.ClickException as err:
        _fail(err.format_message())
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as err:
        _fail(str(err))
    sys.exit(code or 0)


def _fail(message: str) -> NoReturn:
    click.echo(f"xllm-bench: error: {message}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
