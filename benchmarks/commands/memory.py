"""xllm-bench: memory of weights and KV, and KV from process to process."""

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


@click.command("memory")
@model_options
@click.option("--streams", type=click.IntRange(1), default=8, help="Requests at the same time.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=512)
@click.option("--output-tokens", type=click.IntRange(2), default=128)
def memory_command(
    shape: str, work_dir: Path, seed: int, results: Path, streams: int, prompt_tokens: int, output_tokens: int
) -> None:
    """Memory of xllm-serve beyond its weights and KV cache -> memory.json."""
    from xllm_compile.benchmarks.bench_memory import run_memory

    run_memory(
        shape_of(shape),
        work_dir,
        results,
        command_line(),
        seed=seed,
        num_streams=streams,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )


@click.command("weights-memory")
@work_dir_option("Scratch; half a GB.")
@results_option
@click.option("--rounds", type=click.IntRange(1), default=21, help="Rounds of both ways in turns.")
def weights_memory_command(work_dir: Path, results: Path, rounds: int) -> None:
    """Weights mapped from a file against a copy in huge pages: opening and decode -> weights_memory.json."""
    from xllm_compile.benchmarks.bench_weights_memory import run_weights_memory

    run_weights_memory(work_dir, results, command_line(), rounds=rounds)


@click.command("xtensor")
@click.option("--sequences", type=click.IntRange(1), default=64, help="Running at the same time.")
@click.option("--steps", type=click.IntRange(1), default=2000, help="Decode steps that are played.")
@click.option("--context", type=click.IntRange(16), default=2048, help="Keys per sequence of the attention.")
@click.option("--batch", type=click.IntRange(1), default=4, help="Sequences of the attention.")
@click.option("--rounds", type=click.IntRange(1), default=61, help="Of the attention kernels, in turns.")
@click.option(
    "--step-ms", type=click.FloatRange(0, min_open=True), default=100.0, help="Step that latency is set against."
)
@click.option("--prompt-token-ms", type=click.FloatRange(0), default=1.2, help="What a prompt token adds to it.")
@results_option
def xtensor_command(results: Path, **options: Any) -> None:
    """Memory, allocation and attention of mapped ranges against a block table -> xtensor_memory.json."""
    from xllm_compile.benchmarks.bench_xtensor import run_xtensor

    run_xtensor(results, command_line(), **options)


@click.command("transfer")
@click.option("--rounds", type=click.IntRange(1), default=25, help="Of 64 MiB, all ways in turns.")
@click.option("--small-rounds", type=click.IntRange(1), default=200, help="Of each smaller size.")
@results_option
def transfer_command(results: Path, **options: Any) -> None:
    """KV from process to process by each way, against copying and plain TCP -> transfer.json."""
    from xllm_compile.benchmarks.bench_transfer import run_transfer

    run_transfer(results, command_line(), **options)


COMMANDS: tuple[click.Command, ...] = (memory_command, weights_memory_command, xtensor_command, transfer_command)
