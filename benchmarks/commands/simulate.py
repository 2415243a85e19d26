"""xllm-bench simulate: services of many instances, the policies that serve on predicted steps."""

from pathlib import Path
from typing import Any

import click

from xllm_compile.benchmarks.commands.options import (
    command_line,
    planned_options,
    results_option,
    targets_options,
)


@click.group("simulate")
def simulate() -> None:
    """Services of many instances in simulation: the policies that serve, on predicted steps."""


@simulate.command("roles")
@click.argument("traces", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--bar", "bars", type=float, multiple=True, help="Of each trace: x over minimal load on fixed pools.")
@click.option("--name", default="dynamic_roles", help="Name of the record.")
@planned_options
@click.option("--instances", "num_instances", type=click.IntRange(4), default=8)
@targets_options
@click.option("--seeds", type=click.IntRange(1), default=3, help="Each begins elsewhere in the trace.")
@click.option("--requests", "max_requests", type=click.IntRange(100), help="The first of each trace only.")
@results_option
def simulate_roles_command(
    traces: tuple[Path, ...], bars: tuple[float, ...], ttft_slo: float, tpot_slo: float, results: Path, **options: Any
) -> None:
    """Rates that fixed pools and dynamic ones sustain -> dynamic_roles.json and .html."""
    from xllm_compile.benchmarks.bench_simulate import Targets, run_dynamic_roles

    if bars and len(bars) != len(traces):
        raise click.UsageError(f"{len(bars)} of --bar for {len(traces)} traces; give one for each, or none")
    targets = Targets(ttft_slo_s=ttft_slo, tpot_slo_s=tpot_slo)
    run_dynamic_roles(traces, results, command_line(), targets=targets, bars=bars or (1.0,) * len(traces), **options)


@simulate.command("colocation")
@click.argument("traces", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--lengths", type=click.Path(path_type=Path), required=True, help="Trace whose lengths offline requests have."
)
@click.option("--name", default="colocation", help="Name of the record.")
@planned_options
@click.option("--instances", "num_instances", type=click.IntRange(2), default=8)
@click.option("--requests", "num_requests", type=click.IntRange(100), default=2000, help="Online ones of each trace.")
@targets_options
@click.option("--seeds", type=click.IntRange(1), default=2, help="Each begins elsewhere in the trace.")
@results_option
def simulate_colocation_command(
    traces: tuple[Path, ...], ttft_slo: float, tpot_slo: float, results: Path, **options: Any
) -> None:
    """Offline work beside online work within its targets -> colocation.json."""
    from xllm_compile.benchmarks.bench_colocation import run_colocation
    from xllm_compile.benchmarks.bench_simulate import Targets

    targets = Targets(ttft_slo_s=ttft_slo, tpot_slo_s=tpot_slo)
    run_colocation(traces, results, command_line(), targets=targets, **options)


@simulate.command("scale")
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--name", default="simulation_scale", help="Name of the record.")
@planned_options
@click.option("--instances", "num_instances", type=click.IntRange(2), default=1000)
@click.option("--requests", "num_requests", type=click.IntRange(2), default=500_000)
@click.option("--hours", type=click.FloatRange(0, min_open=True), default=24.0)
@targets_options
@results_option
def simulate_scale_command(trace: Path, ttft_slo: float, tpot_slo: float, results: Path, **options: Any) -> None:
    """How long a day of very many instances takes to simulate -> simulation_scale.json."""
    from xllm_compile.benchmarks.bench_simulate import Targets, run_scale

    run_scale(trace, results, command_line(), targets=Targets(ttft_slo_s=ttft_slo, tpot_slo_s=tpot_slo), **options)


COMMANDS: tuple[click.Command, ...] = (simulate,)
