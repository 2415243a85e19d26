"""Buckets chosen for a trace against powers of two, as many graphs each. Arithmetic only: nothing is run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.console import finish, show_table
from xllm_compile.benchmarks.planned_models import planned_regions
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.bucket_plan import predict_step_times, seconds_per_key
from xllm_compile.graph_passes.buckets import choose_buckets, padded_tokens
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.device_spec import device_spec
from xllm_compile.graph_passes.step_cost import StepTimes
from xllm_compile.graph_passes.step_replay import replay_steps
from xllm_compile.request_trace import TraceError, read_trace

# Every row counts, and nothing but a bucket can run a step: the fewest padded tokens there can be.
_ROWS_ONLY = StepTimes(sizes=(1, 2), seconds=(1.0, 2.0), dynamic_overhead=1e12)


def run_buckets(
    trace: Path,
    results: Path,
    command: Sequence[str],
    *,
    name: str,
    model: str,
    device: str,
    max_tokens: int,
    max_seqs: int,
) -> None:
    """Replay the trace and write NAME.json."""
    requests = read_trace(trace)
    if requests[0].arrival_s is None:
        raise TraceError(f"trace {trace} has no arrival times; without them nothing can be replayed")
    start = requests[0].arrival_s
    regions, costs = planned_regions(model), CostModel(spec=device_spec(device))
    times = predict_step_times(regions, costs, max_tokens)["T"]
    key_s = seconds_per_key(regions, costs)
    histogram = replay_steps(
        [((request.arrival_s or 0.0) - start, request.prompt_tokens, request.output_tokens) for request in requests],
        lambda tokens, keys: times.of(tokens) + keys * key_s,
        max_tokens=max_tokens,
        max_seqs=max_seqs,
    )
    powers = _powers_of_two(max_tokens)
    choices = {
        "powers of two": powers,
        "fewest padded tokens": choose_buckets(histogram, max_tokens, len(powers), _ROWS_ONLY),
        "least time": choose_buckets(histogram, max_tokens, len(powers), times),
    }
    figures = {what: _figures(histogram, buckets, times) for what, buckets in choices.items()}
    base = figures["powers of two"]
    bars = [
        Bar(
            what="padded tokens of the fewest, against powers of two, every step on a bucket",
            value=figures["fewest padded tokens"]["padded_tokens"] / base["padded_tokens"],
            unit="x",
            bar="< 0.5",
        ),
        Bar(
            what="padded tokens of the build's choice, against powers of two, every step on a bucket",
            value=figures["least time"]["padded_tokens"] / base["padded_tokens"],
            unit="x",
            bar="< 0.5",
        ),
        # Beside the dynamic-shape graph only steps that gain from padding are padded; the build minimises time.
        Bar(
            what="padded tokens of the build's choice, against powers of two, beside the dynamic-shape graph",
            value=figures["least time"]["padded_tokens_beside_dynamic"] / base["padded_tokens_beside_dynamic"],
            unit="x",
        ),
        Bar(
            what="predicted time of all steps: the build's choice against powers of two",
            value=figures["least time"]["step_seconds"] / base["step_seconds"],
            unit="x",
            bar="<= 1",
        ),
    ]
    raw = {
        "trace": trace.name,
        "num_requests": len(requests),
        "model": model,
        "device_spec": costs.spec.to_json(),
        "max_num_batched_tokens": max_tokens,
        "max_num_seqs": max_seqs,
        "num_graphs": len(powers),
        "step_times": times.to_json(),
        "seconds_per_key": key_s,
        "histogram": [[size, count] for size, count in histogram.items()],
        "choices": {what: {"buckets": list(buckets), **figures[what]} for what, buckets in choices.items()},
    }
    show_table(
        f"{trace.name}: {len(powers)} graphs for steps of up to {max_tokens} tokens",
        ("choice", "padded tokens", "beside the dynamic graph", "seconds", "buckets"),
        [
            (
                what,
                f"{f['padded_tokens']:.0f}",
                f"{f['padded_tokens_beside_dynamic']:.0f}",
                f"{f['step_seconds']:.1f}",
                " ".join(map(str, choices[what])),
            )
            for what, f in figures.items()
        ],
    )
    finish(make_record(name, command, seed=0, raw=raw, bars=bars), results)


def _powers_of_two(largest: int) -> tuple[int, ...]:
    return (*(1 << bit for bit in range((largest - 1).bit_length())), largest)


def _figures(histogram: Mapping[int, float], buckets: Sequence[int], times: StepTimes) -> dict[str, Any]:
    seconds = 0.0
    for size, count in histogram.items():
        bucket = min(b for b in buckets if b >= size)
        seconds += count * (times.of(size) if bucket == size else min(times.of(bucket), times.of_dynamic(size)))
    return {
        "padded_tokens": padded_tokens(histogram, buckets),
        "padded_tokens_beside_dynamic": padded_tokens(histogram, buckets, times),
        "step_seconds": seconds,
    }
