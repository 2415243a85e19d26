"""What each pass is worth: the same model compiled with one pass left out in turn, all run side by side.

Every variant is an artifact of its own over the same weights file; their graphs are loaded into one process and take
turns, so a pass's figure is a ratio of neighbouring runs. Passes that the target cannot do without are listed, not
measured.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xllm_compile.benchmarks.artifacts import compile_model
from xllm_compile.benchmarks.checkpoints import Shape, checkpoint
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.load import ForeignLoad, wait_quiet
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.timing import Summary, measure_in_turns, percentile, summarise
from xllm_compile.graph_passes.pipeline import cpu_pipeline
from xllm_compile.runtime.artifact import cpu_kernels, read_manifest
from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.model_runner import CompiledModelRunner
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.step import Step
from xllm_compile.runtime.weights import map_weights

ALL = "all passes"
_CONTEXT = 128
_PREFILL = 512
_BATCHES = (1, 8)


def run_ablation(
    shape: Shape, work_dir: Path, results: Path, command: Sequence[str], *, seed: int, rounds: int
) -> None:
    """Compile the variants, measure and write ablation_SHAPE.json."""
    passes = cpu_pipeline()
    optional = [step.name for step in passes if step.required_in is None]
    required = [step.name for step in passes if step.required_in is not None]
    model_dir = checkpoint(shape, work_dir, seed=seed)
    prefill = min(_PREFILL, shape.max_position_embeddings // 2)
    artifacts = {}
    for name in (ALL, *optional):
        say(f"compiling: {name if name == ALL else f'without {name}'}")
        artifacts[name] = work_dir / "artifacts" / f"{shape.name}-ablation-{name.replace(' ', '-')}.xllm"
        buckets = ",".join(str(size) for size in (*_BATCHES, prefill))
        options = ["--buckets", buckets, "--max-num-batched-tokens", str(prefill)]
        options += [] if name == ALL else ["--disable-pass", name]
        compile_model(model_dir, artifacts[name], options)
    runners = _open(artifacts, prefill)
    cases = {f"decode batch {batch}, context {_CONTEXT}": _decode_step(batch) for batch in _BATCHES}
    cases[f"prefill {prefill}"] = _prefill_step(prefill)
    wait_quiet()
    with ForeignLoad() as load:
        seconds = {case: _measure(runners, step, rounds) for case, step in cases.items()}
    _show(seconds)
    raw = {
        "required": required,
        "foreign_cores": load.cores,
        "seconds": {
            case: {name: summary.to_json() for name, summary in found.items()} for case, found in seconds.items()
        },
        "slowdown_quartiles": {
            case: {name: _quartiles(found[name], found[ALL]) for name in optional} for case, found in seconds.items()
        },
    }
    bars = [
        Bar(what=f"{case} without {name}", value=_ratio(found[name], found[ALL]).median, unit="x time")
        for case, found in seconds.items()
        for name in optional
    ]
    record_name = f"ablation_{shape.name.replace('-', '_').replace('.', '_')}"
    finish(make_record(record_name, command, seed=seed, raw=raw, bars=bars), results)


def _open(artifacts: Mapping[str, Path], prefill: int) -> dict[str, CompiledModelRunner]:
    """One runner per variant, over one KV cache: they run the same steps in turns."""
    manifests = {name: read_manifest(root) for name, root in artifacts.items()}
    model = manifests[ALL].model
    native.load_kernels(artifacts[ALL] / cpu_kernels(artifacts[ALL], manifests[ALL]).path)
    room = max(prefill, _CONTEXT) + 1
    page_slack = 2 << 20
    config = KVCacheConfig(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=getattr(torch, model.dtype),
        max_model_len=room,
        num_slots=max(_BATCHES),
        kv_memory_bytes=max(_BATCHES) * (room * model.kv_bytes_per_token * 9 // 8 + page_slack),
    )
    cache = KVCache(config)
    for _ in range(config.num_slots):
        # Nothing but mapped pages may be touched.
        has_room = cache.extend(cache.allocate(), room)
        assert has_room
    return {
        name: CompiledModelRunner(
            root,
            manifests[name],
            map_weights(root / manifests[name].weights[0].path),
            cache.layers,
            max_model_len=room,
            max_num_seqs=max(_BATCHES),
            max_num_batched_tokens=prefill,
        )
        for name, root in artifacts.items()
    }


def _decode_step(batch: int) -> Step:
    ones = np.ones(batch, dtype=np.int32)
    return Step(
        token_ids=np.arange(batch, dtype=np.int32),
        positions=ones * (_CONTEXT - 1),
        rope_len=ones * _CONTEXT,
        seq_start=np.arange(batch + 1, dtype=np.int32),
        context_len=ones * _CONTEXT,
        slot=np.arange(batch, dtype=np.int32),
        logits_at=np.arange(batch, dtype=np.int32),
    )


def _prefill_step(tokens: int) -> Step:
    return Step(
        token_ids=np.arange(tokens, dtype=np.int32),
        positions=np.arange(tokens, dtype=np.int32),
        rope_len=np.full(tokens, tokens, dtype=np.int32),
        seq_start=np.array([0, tokens], dtype=np.int32),
        context_len=np.array([tokens], dtype=np.int32),
        slot=np.zeros(1, dtype=np.int32),
        logits_at=np.array([tokens - 1], dtype=np.int32),
    )


def _measure(runners: Mapping[str, CompiledModelRunner], step: Step, rounds: int) -> dict[str, Summary]:
    runs: dict[str, Callable[[], object]] = {name: partial(runner.execute, step) for name, runner in runners.items()}
    return measure_in_turns(runs, warmup=2, repeats=rounds)


def _ratio(without: Summary, base: Summary) -> Summary:
    return summarise([a / b for a, b in zip(without.values, base.values, strict=True)])


def _quartiles(without: Summary, base: Summary) -> list[float]:
    return [round(percentile(_ratio(without, base).values, percent), 4) for percent in (25, 50, 75)]


def _show(seconds: Mapping[str, Mapping[str, Summary]]) -> None:
    rows: list[tuple[str, ...]] = []
    for name in next(iter(seconds.values())):
        cells: list[Any] = [name if name == ALL else f"without {name}"]
        for found in seconds.values():
            low, middle, high = _quartiles(found[name], found[ALL])
            cells.append(f"{found[name].median * 1000:.2f} ms  {middle:.3f} ({low:.3f} to {high:.3f})")
        rows.append(tuple(cells))
    show_table("Time of a step, and against all passes (quartiles)", ("variant", *seconds), rows)
