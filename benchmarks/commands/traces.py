"""xllm-bench: decisions on recorded traces; nothing is computed."""

from pathlib import Path
from typing import Any

import click

from xllm_compile.benchmarks.commands.options import (
    command_line,
    results_option,
    served_by_option,
    trace_option,
)


@click.command("buckets")
@trace_option("Requests with arrival times.")
@click.option("--name", default="buckets_azure_conv", help="Name of the record.")
@served_by_option
@click.option("--device", default="ascend-910b2", help="On what: a device spec by name.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, help="Most tokens in one step.")
@click.option("--max-seqs", type=click.IntRange(1), default=256, help="Most sequences in one step.")
@results_option
def buckets_command(trace: Path, results: Path, **options: Any) -> None:
    """Buckets chosen for a trace against powers of two; arithmetic only -> NAME.json."""
    from xllm_compile.benchmarks.bench_buckets import run_buckets

    run_buckets(trace, results, command_line(), **options)


@click.command("schedule")
@trace_option("Requests with arrival times.")
@click.option("--name", default="schedule_azure_conv", help="Name of the record.")
@served_by_option
@click.option("--device", default="h200", help="On what: a device spec by name.")
@click.option("--num-requests", type=click.IntRange(2), default=2000, help="From the start of the trace.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), default=20.0, help="Requests per second.")
@click.option("--kv-tokens", type=click.IntRange(1), default=200_000, help="Tokens in the KV cache.")
@click.option("--max-tokens", type=click.IntRange(1), default=2048, help="Most tokens in one step.")
@click.option("--max-seqs", type=click.IntRange(1), default=256, help="Most sequences in one step.")
@results_option
def schedule_command(trace: Path, results: Path, **options: Any) -> None:
    """Scheduling policies on a trace, in simulation; arithmetic only -> NAME.json."""
    from xllm_compile.benchmarks.bench_schedule import run_schedule

    run_schedule(trace, results, command_line(), **options)


@click.command("prefix-cache")
@trace_option("Requests with hash_ids of their blocks.")
@click.option("--name", default="prefix_cache_mooncake", help="Name of the record.")
@click.option(
    "--capacity", "capacities", type=click.IntRange(1), multiple=True, default=(1000, 10000, 50000), help="Blocks."
)
@results_option
def prefix_cache_command(trace: Path, results: Path, name: str, capacities: tuple[int, ...]) -> None:
    """Hit rate of the prefix cache on a trace; nothing is computed -> NAME.json."""
    from xllm_compile.benchmarks.bench_prefix_cache import run_prefix_cache

    run_prefix_cache(trace, results, command_line(), name=name, capacities=capacities)


@click.command("kv-index")
@trace_option("Requests with hash_ids of their blocks.")
@click.option("--name", default="kv_index_mooncake", help="Name of the record.")
@served_by_option
@click.option("--device", default="h200", help="On what: a device spec by name.")
@click.option("--instances", "counts", type=click.IntRange(1), multiple=True, default=(1, 4, 8, 16), help="How many.")
@results_option
def kv_index_command(trace: Path, results: Path, counts: tuple[int, ...], **options: Any) -> None:
    """What routing by cached prefixes is worth on a trace; nothing is computed -> NAME.json."""
    from xllm_compile.benchmarks.bench_kv_index import run_kv_index

    run_kv_index(trace, results, command_line(), counts=counts, **options)


COMMANDS: tuple[click.Command, ...] = (buckets_command, schedule_command, prefix_cache_command, kv_index_command)
