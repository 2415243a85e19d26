"""Where the milliseconds of a step go: each kernel, the graphs around them, and the host."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.console import finish, show_table
from xllm_compile.benchmarks.kernel_profile import KernelCall, KernelProfiler, group_calls
from xllm_compile.benchmarks.limits import measure_limits
from xllm_compile.benchmarks.load import ForeignLoad
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.runtime.artifact import Manifest, cpu_kernels, read_manifest

_NUM_PREFILLS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfiledStep:
    """One engine step; times on the clock of time.monotonic()."""

    begin_s: float
    end_s: float
    execute_begin_s: float
    execute_end_s: float
    calls: Sequence[KernelCall]

    @property
    def kernels_s(self) -> float:
        return sum(call.seconds for call in self.calls)

    @property
    def between_s(self) -> float:
        """Inside the model runner, outside the kernels: the graphs' wrappers and the loop over layers."""
        return self.execute_end_s - self.execute_begin_s - self.kernels_s

    @property
    def host_s(self) -> float:
        """Outside the model runner: scheduling, sampling, detokenising."""
        return self.end_s - self.begin_s - (self.execute_end_s - self.execute_begin_s)


def run_profile(
    artifact: Path,
    work_dir: Path,
    results: Path,
    command: Sequence[str],
    *,
    seed: int,
    batch: int,
    prompt_tokens: int,
    output_tokens: int,
) -> None:
    """Profile steps of ``batch`` sequences: decodes, or with output_tokens=1 prefills. Writes profile_*.json."""
    manifest = read_manifest(artifact)
    kernels = artifact / cpu_kernels(artifact, manifest).path
    limits = measure_limits(artifact)
    is_prefill = output_tokens == 1
    with ForeignLoad() as load:
        steps = _profile(
            artifact, manifest, KernelProfiler(kernels, work_dir), seed, batch, prompt_tokens, output_tokens
        )
    kind = "prefill" if is_prefill else "decode"
    rows, parts = _table(steps)
    title = (
        f"{kind}, batch {batch}, prompt {prompt_tokens}: {len(steps)} steps; limits {limits.read_gb_per_s:.0f} GB/s,"
        f" {limits.bf16_gemm_gflops:.0f} GFLOP/s"
    )
    show_table(title, ("part", "ms a step", "calls", "us a call", "GB/s", "GFLOP/s"), rows)
    raw = {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "limits": {name: getattr(limits, name) for name in limits.__slots__},
        "foreign_cores": load.cores,
        "num_steps": len(steps),
        "median_ms": parts,
    }
    bars = [Bar(what=what, value=parts[what], unit="ms") for what in ("step", "kernels", "between kernels", "host")]
    name = f"profile_{kind}_b{batch}_{prompt_tokens}"
    finish(make_record(name, command, seed=seed, raw=raw, bars=bars), results)


def _profile(
    artifact: Path,
    manifest: Manifest,
    profiler: KernelProfiler,
    seed: int,
    batch: int,
    prompt_tokens: int,
    output_tokens: int,
) -> list[ProfiledStep]:
    # After the profiler: opening the instance loads the kernels.
    from xllm_compile.runtime.engine import Engine
    from xllm_compile.runtime.instance import open_instance
    from xllm_compile.runtime.instance_config import InstanceConfig
    from xllm_compile.runtime.sampling_params import SamplingParams

    room = prompt_tokens + output_tokens + 1
    # A step's kernels are found by when it ran, so none is planned beside another; repeated prompts are computed.
    config = InstanceConfig(
        max_num_seqs=batch,
        max_model_len=min(manifest.model.max_model_len, room),
        async_scheduling=False,
        prefix_cache=False,
    )
    engine: Engine = open_instance(artifact, config).engine
    rng = random.Random(seed)
    prompts = [[rng.randrange(manifest.model.vocab_size) for _ in range(prompt_tokens)] for _ in range(batch)]
    executions: list[tuple[float, float, int]] = []
    runner: Any = engine._runner
    runner.execute = _timed(runner.execute, executions)
    spans: list[tuple[float, float]] = []

    def generate(num_tokens: int) -> None:
        for index, prompt in enumerate(prompts):
            engine.add_request(
                str(index), prompt, SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
            )
        while engine.has_work:
            began = time.monotonic()
            engine.step()
            spans.append((began, time.monotonic()))

    generate(min(output_tokens, 3))
    for kept in (profiler.clear, executions.clear, spans.clear):
        kept()
    for _ in range(_NUM_PREFILLS if output_tokens == 1 else 1):
        generate(output_tokens)
    calls = profiler.calls()
    return [
        ProfiledStep(
            begin_s=begin,
            end_s=end,
            execute_begin_s=first,
            execute_end_s=last,
            calls=[call for call in calls if first <= call.begin_s <= last],
        )
        for (begin, end), (first, last, num_tokens) in zip(spans, executions, strict=True)
        # Of a decode run only the steps that decode the whole batch and nothing else.
        if output_tokens == 1 or num_tokens == batch
    ]


def _timed(execute: Callable[..., Any], spans: list[tuple[float, float, int]]) -> Callable[..., Any]:
    def timed(step: Any, *arguments: Any) -> Any:
        began = time.monotonic()
        result = execute(step, *arguments)
        spans.append((began, time.monotonic(), len(step.token_ids)))
        return result

    return timed


def _table(steps: Sequence[ProfiledStep]) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """Rows to print, and milliseconds by part for the record. Medians over the steps."""
    if not steps:
        raise RuntimeError("no step was profiled; ask for more output tokens")

    def median_ms(seconds_of: Callable[[ProfiledStep], float]) -> float:
        return round(statistics.median(map(seconds_of, steps)) * 1000, 4)

    parts: dict[str, Any] = {
        "step": median_ms(lambda step: step.end_s - step.begin_s),
        "kernels": median_ms(lambda step: step.kernels_s),
        "between kernels": median_ms(lambda step: step.between_s),
        "host": median_ms(lambda step: step.host_s),
    }
    rows: list[tuple[str, ...]] = [(what, f"{ms:.3f}", "", "", "", "") for what, ms in parts.items()]
    grouped = [group_calls(step.calls) for step in steps]
    by_kernel = {}
    for label in grouped[-1]:
        calls = grouped[-1][label]
        ms = statistics.median(sum(call.seconds for call in group.get(label, ())) for group in grouped) * 1000
        by_kernel[label] = {"ms": round(ms, 4), "calls": len(calls)}
        rates = ("", "")
        if calls[0].out_features:
            weight_bytes = sum(call.weight_bytes for call in calls)
            flops = sum(2 * call.rows * call.columns * call.out_features for call in calls)
            rates = (f"{weight_bytes / ms / 1e6:.1f}", f"{flops / ms / 1e6:.0f}")
        rows.append((label, f"{ms:.3f}", str(len(calls)), f"{ms * 1000 / len(calls):.1f}", *rates))
    return rows, {**parts, "by_kernel": by_kernel}
