"""xllm-bench simulate: services of many instances, the policies that serve on predicted steps."""

from pathlib import Path
from typing import Any

import click

from xllm_compile.benchmarks.commands.options import (
    F,
    command_line,
    planned_options,
    results_option,
    targets_options,
    work_dir_option,
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
@click.option(
    "--scheduling-policy",
    type=click.Choice(["fcfs", "deadline"]),
    default="deadline",
    help="Of instances, as xllm-serve has it: deadline is what they do with TTFT targets.",
)
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
@click.option(
    "--tide",
    type=click.Path(path_type=Path),
    help="ServeGen trace of a day: the first trace is played once more, its arrivals as this one's rise and fall.",
)
@click.option("--name", default="colocation", help="Name of the record.")
@planned_options
@click.option("--instances", "num_instances", type=click.IntRange(2), default=8)
@click.option("--requests", "num_requests", type=click.IntRange(100), default=2000, help="Online ones of each trace.")
@targets_options
@click.option(
    "--online-share",
    "online_shares",
    type=click.FloatRange(0, min_open=True),
    multiple=True,
    default=(0.7, 0.85, 1.0),
    show_default=True,
    help="Of the online rate that the service sustains without offline requests.",
)
@click.option("--seeds", type=click.IntRange(1), default=2, help="Each begins elsewhere in the trace.")
@results_option
def simulate_colocation_command(
    traces: tuple[Path, ...], ttft_slo: float, tpot_slo: float, results: Path, **options: Any
) -> None:
    """Offline work beside online work within its targets -> colocation.json and .html."""
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


def live_options(function: F) -> F:
    """Options of what runs services of slowed-down instances on this machine."""
    for option in reversed(
        (
            work_dir_option("Where the artifact is kept between runs."),
            click.option("--slow-down", type=click.FloatRange(1), default=32.0, help="As xllm-serve has it."),
            click.option("--shrink", type=click.IntRange(1), default=4, help="Lengths are so many times shorter."),
            click.option("--repeats", type=click.IntRange(1), default=2, help="Of what the simulator is to know."),
            click.option("--seed", type=int, default=1, help="Of prompts."),
            targets_options,
            results_option,
        )
    ):
        function = option(function)
    return function


def _live_setting(options: dict[str, Any]) -> Any:
    """Takes what belongs to it out of the options."""
    from xllm_compile.benchmarks.bench_validate import LiveSetting

    targets = {f"{name}_s": options.pop(name) for name in ("ttft_slo", "tpot_slo")}
    return LiveSetting(**targets, **{name: options.pop(name) for name in ("slow_down", "shrink", "repeats", "seed")})


@simulate.command("validate")
@click.argument("traces", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--name", default="simulation_validated", help="Name of the record.")
@click.option(
    "--share",
    "shares",
    type=click.FloatRange(0, min_open=True),
    multiple=True,
    default=(0.6, 0.9),
    help="Of the rate that the simulated service sustains; may be repeated.",
)
@click.option("--seconds", type=click.FloatRange(1), default=75.0, help="Of arrivals at each rate.")
@click.option(
    "--requests",
    "least_requests",
    type=click.IntRange(2),
    default=100,
    help="Arrivals at each rate go on until there are so many.",
)
@click.option("--plays", "num_plays", type=click.IntRange(1), default=3, help="Of these arrivals, one after the other.")
@live_options
def simulate_validate_command(traces: tuple[Path, ...], **options: Any) -> None:
    """The simulator against four live instances, on the same arrivals -> simulation_validated.json."""
    from xllm_compile.benchmarks.bench_validate import run_validate

    setting = _live_setting(options)
    run_validate(traces, command=command_line(), setting=setting, **options)


@simulate.command("live-roles")
@click.argument("traces", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--name", default="live_roles", help="Name of the record.")
@click.option("--seconds", type=click.FloatRange(1), default=9.0, help="About those of each of two stretches.")
@click.option(
    "--requests", "least_requests", type=click.IntRange(2), default=60, help="Of each stretch, however long they take."
)
@click.option("--tries", "max_tries", type=click.IntRange(1), default=3, help="Rates of each case on each trace.")
@live_options
def simulate_live_roles_command(traces: tuple[Path, ...], **options: Any) -> None:
    """Rates that four live instances sustain, with dynamic roles and without -> live_roles.json and .html."""
    from xllm_compile.benchmarks.bench_live_roles import run_live_roles

    setting = _live_setting(options)
    run_live_roles(traces, command=command_line(), setting=setting, **options)


COMMANDS: tuple[click.Command, ...] = (simulate,)
