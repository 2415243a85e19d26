"""Async scheduling on and off: decode throughput, and how long the device stands still between two steps.

The device's threads are counted: with one fewer than there are cores the host's work has a core of its own, as beside
an accelerator; with as many as there are cores, planning and streaming take their time from the kernels either way.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from xllm_compile.benchmarks.artifacts import artifact_of_demo, artifact_of_shape
from xllm_compile.benchmarks.checkpoints import Shape
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.decode_steps import time_decode
from xllm_compile.benchmarks.load import ForeignLoad, wait_quiet
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.timing import Summary, measure_in_turns, summarise
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.instance import open_instance
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.resources import num_cpus
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams

ON, OFF = "on", "off"
_BATCHES = (1, 8, 32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Of one model, number of threads and batch, in rounds: seconds a step, and the share of it that is a gap."""

    step_s: dict[str, Summary]
    gap_share: dict[str, Summary]

    @property
    def speedup(self) -> float:
        """Throughput with it over without, the median of neighbouring runs."""
        pairs = zip(self.step_s[OFF].values, self.step_s[ON].values, strict=True)
        return summarise([off / on for off, on in pairs]).median


def run_async(
    shape: Shape,
    work_dir: Path,
    results: Path,
    command: Sequence[str],
    *,
    seed: int,
    rounds: int,
    output_tokens: int,
    prompt_tokens: int,
) -> None:
    """Measure demo-code and the shape, write async_scheduling.json."""
    say(f"compiling demo-code and {shape.name}")
    artifacts = {
        "demo-code": artifact_of_demo(work_dir),
        shape.name: artifact_of_shape(shape, work_dir, seed=seed)[0],
    }
    found: dict[str, dict[int, dict[int, Found]]] = {}
    foreign = {}
    for name, artifact in artifacts.items():
        engines = {
            mode: _open(artifact, is_async=mode == ON, max_len=prompt_tokens + output_tokens) for mode in (ON, OFF)
        }
        wait_quiet()
        with ForeignLoad() as load:
            found[name] = {}
            for num_threads in sorted({max(1, num_cpus() - 1), num_cpus()}):
                native.set_num_threads(num_threads)
                found[name][num_threads] = {
                    batch: _measure(engines, batch, prompt_tokens, output_tokens, seed=seed, rounds=rounds)
                    for batch in _BATCHES
                }
        foreign[name] = load.cores
        for engine in engines.values():
            engine.close()
    _show(found)
    raw = {
        "shape": shape.hf_config(),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "foreign_cores": foreign,
        "found": {
            name: {
                f"{threads} threads, batch {batch}": {
                    "step_s": {mode: each.step_s[mode].to_json() for mode in (ON, OFF)},
                    "gap_share": {mode: each.gap_share[mode].to_json() for mode in (ON, OFF)},
                }
                for threads, by_batch in by_threads.items()
                for batch, each in by_batch.items()
            }
            for name, by_threads in found.items()
        },
    }
    finish(make_record("async_scheduling", command, seed=seed, raw=raw, bars=_bars(found)), results)


def _open(artifact: Path, *, is_async: bool, max_len: int) -> Engine:
    config = InstanceConfig(max_model_len=max_len, max_num_seqs=max(_BATCHES), async_scheduling=is_async)
    return open_instance(artifact, config).engine


def _measure(
    engines: Mapping[str, Engine], batch: int, prompt_tokens: int, output_tokens: int, *, seed: int, rounds: int
) -> Found:
    step_s: dict[str, list[float]] = {mode: [] for mode in engines}
    gap_share: dict[str, list[float]] = {mode: [] for mode in engines}

    rng = random.Random(seed)
    prompts = [[rng.randrange(3, 1000) for _ in range(prompt_tokens)] for _ in range(batch)]
    params = SamplingParams(
        temperature=0, ignore_eos=True, max_tokens=output_tokens, output_kind=RequestOutputKind.DELTA
    )

    def decode(mode: str) -> None:
        found = time_decode(engines[mode], prompts, params)
        step_s[mode].append(found.step_s)
        gap_share[mode].append(found.gap_share)

    measure_in_turns({mode: partial(decode, mode) for mode in engines}, warmup=1, repeats=rounds)
    # The first run of each is the warm-up.
    return Found(
        step_s={mode: summarise(values[1:]) for mode, values in step_s.items()},
        gap_share={mode: summarise(values[1:]) for mode, values in gap_share.items()},
    )


def _show(found: Mapping[str, Mapping[int, Mapping[int, Found]]]) -> None:
    rows = [
        (
            name,
            str(threads),
            str(batch),
            *(f"{each.step_s[mode].median * 1e3:.3f}" for mode in (OFF, ON)),
            *(f"{each.gap_share[mode].median:.1%}" for mode in (OFF, ON)),
            f"{each.speedup:.3f}",
        )
        for name, by_threads in found.items()
        for threads, by_batch in by_threads.items()
        for batch, each in by_batch.items()
    ]
    columns = ("model", "threads", "batch", "off, ms", "on, ms", "gap off", "gap on", "speed-up")
    show_table("decode steps, async scheduling off and on", columns, rows)


def _bars(found: Mapping[str, Mapping[int, Mapping[int, Found]]]) -> list[Bar]:
    bars = []
    for name, by_threads in found.items():
        for threads, by_batch in by_threads.items():
            for batch, each in by_batch.items():
                what = f"{name}, {threads} threads, batch {batch}"
                gap = each.gap_share[ON].median * 100
                bars += [
                    Bar(what=f"{what}: gap between steps", value=gap, unit="% of a step", bar="<= 3"),
                    Bar(what=f"{what}: throughput on over off", value=each.speedup, unit="times"),
                ]
    return bars
