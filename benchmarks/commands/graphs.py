"""xllm-bench: kernels, the graphs that call them, and the device specs that predict them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from xllm_compile.benchmarks.commands.options import (
    command_line,
    model_options,
    results_option,
    shape_of,
    work_dir_option,
)


def _pass_on(function: Callable[[tuple[str, ...]], None]) -> click.Command:
    """A subcommand with a command line of its own, --help included."""
    settings = {"ignore_unknown_options": True, "help_option_names": []}
    taken = click.argument("arguments", nargs=-1, type=click.UNPROCESSED)(function)
    return click.command(context_settings=settings, add_help_option=False)(taken)


@click.command("profile")
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.option("--batch", type=click.IntRange(1), default=1, help="Sequences at the same time.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128)
@click.option("--output-tokens", type=click.IntRange(1), default=33, help="1 profiles the prefill.")
@work_dir_option("Scratch folder.")
@click.option("--seed", type=int, default=1234, help="Of the prompts.")
@results_option
def profile_command(artifact: Path, results: Path, **options: Any) -> None:
    """Milliseconds of a step by kernel, between kernels and on the host -> profile_KIND.json."""
    from xllm_compile.benchmarks.bench_profile import run_profile

    run_profile(artifact, command=command_line(), results=results, **options)


@_pass_on
def kernels(arguments: tuple[str, ...]) -> None:
    """Each kernel against the machine's limits and oneDNN."""
    from xllm_compile.benchmarks import bench_kernels

    bench_kernels.main.main(args=list(arguments), prog_name="xllm-bench kernels", standalone_mode=False)


@_pass_on
def parity(arguments: tuple[str, ...]) -> None:
    """Greedy tokens against transformers in float32."""
    from xllm_compile.benchmarks.parity import main as run

    run.main(args=list(arguments), prog_name="xllm-bench parity", standalone_mode=False)


@click.command("call-overhead")
@click.option("--repeats", type=click.IntRange(1), default=30, help="Rounds of both ways.")
@click.option("--seed", type=int, default=1234)
@results_option
def call_overhead_command(results: Path, repeats: int, seed: int) -> None:
    """Weights as inputs of a graph against weights as its constants -> graph_call_overhead.json."""
    from xllm_compile.benchmarks.weights_as_inputs import run_call_overhead

    run_call_overhead(results, command_line(), seed=seed, repeats=repeats)


@click.command("calibrate")
@click.argument("artifact", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False)
@model_options
@click.option("--repeats", type=click.IntRange(1), default=5, help="Of each measurement.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the spec here instead of the user's cache."
)
def calibrate_command(
    artifact: Path | None, shape: str, work_dir: Path, seed: int, results: Path, **options: Any
) -> None:
    """Fit the cost model to this machine, on ARTIFACT or a model of --shape -> a device spec and cost_model_cpu.json.

    Builds on this machine choose buckets by the spec from then on.
    """
    import os

    # Before torch is loaded: workers of its OpenMP that spin after a call would take a core from the kernels' pool.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from xllm_compile.benchmarks.bench_calibrate import run_calibrate

    run_calibrate(shape_of(shape), artifact, work_dir, results, command_line(), seed=seed, **options)


@click.command("balance")
@click.option("--device", default="ascend-910b2", help="On what: a device spec by name.")
@click.option("--traces", type=click.Path(path_type=Path), help="Folder for Chrome traces of the plans.")
@results_option
def balance_command(device: str, traces: Path | None, results: Path) -> None:
    """Planned idle time of cube and vector units, before and after balancing -> cube_vector_balance.json."""
    from xllm_compile.benchmarks.bench_balance import run_balance

    run_balance(results, command_line(), device=device, traces=traces)


@click.command("cores")
@click.option("--model", "models", multiple=True, default=("qwen3-0.6b", "qwen3-8b"), help="Planned; may be repeated.")
@results_option
def cores_command(models: tuple[str, ...], results: Path) -> None:
    """Planned steps on 1 to 64 cores, and on two NUMA nodes -> cpu_cores_planned.json and .html."""
    from xllm_compile.benchmarks.bench_cores import run_cores

    run_cores(results, command_line(), models=models)


@click.command("overlap")
@model_options
@click.option("--layers", type=click.IntRange(1), default=6, help="Layers of the shape that are run.")
@click.option("--tokens", type=click.IntRange(2), default=512, help="Tokens of the prefill step.")
@click.option("--small-tokens", type=click.IntRange(2), default=8, help="Of one where splitting should not pay.")
@click.option("--repeats", type=click.IntRange(1), default=15)
@click.option("--share", type=click.FloatRange(0.05, 0.9), default=0.4, help="Of communication in the unsplit step.")
def overlap_command(
    shape: str,
    work_dir: Path,
    results: Path,
    seed: int,
    layers: int,
    tokens: int,
    small_tokens: int,
    repeats: int,
    share: float,
) -> None:
    """Communication that steps in halves hide, over a link of limited rate (needs root) -> overlap_tp2.json."""
    from xllm_compile.benchmarks.bench_overlap import run_overlap

    run_overlap(
        shape_of(shape).with_layers(layers),
        work_dir,
        results,
        command_line(),
        seed=seed,
        tokens=tokens,
        small_tokens=small_tokens,
        repeats=repeats,
        share=share,
    )


COMMANDS: tuple[click.Command, ...] = (
    profile_command,
    kernels,
    parity,
    call_overhead_command,
    calibrate_command,
    balance_command,
    cores_command,
    overlap_command,
)
