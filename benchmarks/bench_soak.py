"""Soak: thousands of random steps through the real runner, promotion on; nothing unexplained, nothing grows."""

import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xllm_compile.benchmarks.artifacts import artifact_of_shape
from xllm_compile.benchmarks.checkpoints import Shape
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.server_process import process_memory
from xllm_compile.runtime.artifact import Manifest, cpu_kernels, read_manifest
from xllm_compile.runtime.model_runner import CompiledModelRunner
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.outputs import GraphCacheStats
from xllm_compile.runtime.promotion import PromotionConfig
from xllm_compile.runtime.step import Step
from xllm_compile.runtime.weights import map_weights

_MIB = 1 << 20
_NUM_SLOTS = 8
_SLOT_TOKENS = 256
_HOT_SHARE = 0.5
"""Of the steps: sizes that keep coming back, so that something is worth promoting."""
_PROMOTION_LIMIT_S = 600.0
_SAMPLES = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class SoakResult:
    steps: int
    seconds: float
    graphs: GraphCacheStats
    """Of the counted steps, and of the promotions before and during them."""
    rss_bytes: Sequence[int]
    """Sampled evenly, the first one after the warm-up."""
    num_nonfinite: int
    """Steps with a logit that is no finite number."""

    @property
    def num_counted(self) -> int:
        return sum(self.graphs.by_outcome().values())

    @property
    def num_eager(self) -> int:
        """Every one would be unexplained here: nothing asks for eager steps, and no graph may fail."""
        return self.graphs.by_outcome()["eager"]

    @property
    def rss_growth_bytes(self) -> int:
        """Between the medians of the first and of the last tenth of the samples."""
        tenth = max(len(self.rss_bytes) // 10, 1)
        first, last = sorted(self.rss_bytes[:tenth]), sorted(self.rss_bytes[-tenth:])
        return last[len(last) // 2] - first[len(first) // 2]


def run_soak(shape: Shape, work_dir: Path, results: Path, command: Sequence[str], *, seed: int, num_steps: int) -> None:
    """Measure and write soak.json."""
    artifact, _ = artifact_of_shape(shape, work_dir, seed=seed)
    store = Path(tempfile.mkdtemp(prefix="soak-", dir=work_dir))
    try:
        result = soak(artifact, store, num_steps=num_steps, seed=seed)
    finally:
        shutil.rmtree(store)
    found = result.graphs
    show_table(
        f"{num_steps} steps of random shapes, {shape.name}",
        ("part", "outcome", "reason", "steps"),
        [(*labels, str(count)) for labels, count in sorted(found.choices.items())],
    )
    raw = {
        "shape": shape.hf_config(),
        "seconds": result.seconds,
        "choices": [[*labels, count] for labels, count in sorted(found.choices.items())],
        "promotions": found.promotions,
        "promoted_bytes": found.promoted_bytes,
        "rss_bytes": list(result.rss_bytes),
    }
    bars = [
        Bar(what="steps", value=result.steps, unit="steps", bar=">= 10000"),
        Bar(what="eager steps", value=result.num_eager, unit="steps", bar="<= 0"),
        Bar(what="steps that were not counted", value=result.steps - result.num_counted, unit="steps", bar="<= 0"),
        Bar(what="steps with logits that are not finite", value=result.num_nonfinite, unit="steps", bar="<= 0"),
        Bar(what="growth of RSS after the warm-up", value=result.rss_growth_bytes / _MIB, unit="MiB", bar="<= 16"),
        Bar(what="graphs promoted", value=found.promotions.get("loaded", 0), unit="sizes", bar=">= 1"),
    ]
    finish(make_record("soak", command, seed=seed, raw=raw, bars=bars), results)


def soak(
    artifact: Path, store: Path, *, num_steps: int, seed: int, promotion_limit_s: float = _PROMOTION_LIMIT_S
) -> SoakResult:
    """``num_steps`` random steps after a warm-up that lasts until the first size was promoted.

    Promoted graphs go to ``store``. Raises RuntimeError when nothing is promoted within ``promotion_limit_s``.
    """
    manifest = read_manifest(artifact)
    native.load_kernels(artifact / cpu_kernels(artifact, manifest).path)
    config = PromotionConfig(store=store, min_steps=64, min_steps_saved=0.0)
    runner = _runner(artifact, manifest, config)
    try:
        steps = random_steps(manifest, seed=seed)
        _warm_up(runner, steps, promotion_limit_s)
        before = runner.graph_cache_stats().choices
        samples, num_nonfinite = [], 0
        began = time.monotonic()
        for index in range(num_steps):
            logits = runner.execute(next(steps))
            num_nonfinite += not bool(torch.isfinite(logits).all())
            if index % max(num_steps // _SAMPLES, 1) == 0:
                samples.append(process_memory(os.getpid())["rss"])
        seconds = time.monotonic() - began
        stats = runner.graph_cache_stats()
    finally:
        runner.close()
    choices = {labels: count - before.get(labels, 0) for labels, count in stats.choices.items()}
    return SoakResult(
        steps=num_steps,
        seconds=seconds,
        graphs=GraphCacheStats(
            choices={labels: count for labels, count in choices.items() if count},
            promotions=stats.promotions,
            promoted_bytes=stats.promoted_bytes,
        ),
        rss_bytes=samples,
        num_nonfinite=num_nonfinite,
    )


def _runner(artifact: Path, manifest: Manifest, promotion: PromotionConfig) -> CompiledModelRunner:
    model = manifest.model
    cache_shape = (_NUM_SLOTS, _SLOT_TOKENS, 2, model.num_kv_heads, model.head_dim)
    return CompiledModelRunner(
        artifact,
        manifest,
        map_weights(artifact / manifest.weights[0].path),
        [torch.zeros(cache_shape, dtype=getattr(torch, model.dtype)) for _ in range(model.num_layers)],
        max_model_len=_SLOT_TOKENS,
        max_num_seqs=_NUM_SLOTS,
        max_num_batched_tokens=manifest.max_num_batched_tokens,
        promotion=promotion,
    )


def _warm_up(runner: CompiledModelRunner, steps: Iterator[Step], limit_s: float) -> None:
    ends = time.monotonic() + limit_s
    say("warming up until a size is promoted")
    while not runner.graph_cache_stats().promotions.get("loaded"):
        runner.execute(next(steps))
        stats = runner.graph_cache_stats().promotions
        if stats.get("no_compiler") or time.monotonic() > ends:
            raise RuntimeError(f"no size was promoted within {limit_s:.0f} s: {stats}")


def random_steps(manifest: Manifest, *, seed: int) -> Iterator[Step]:
    """Steps without end: decodes and prefill chunks of up to _NUM_SLOTS sequences, of any size the artifact takes."""
    rng = random.Random(seed)
    largest = min(manifest.max_num_batched_tokens, _NUM_SLOTS * _SLOT_TOKENS // 2)
    cold = [size for size in range(1, largest + 1) if size not in manifest.token_buckets]
    hot = rng.sample(cold[: max(len(cold) // 2, 3)], 3)
    while True:
        total = rng.choice(hot) if rng.random() < _HOT_SHARE else rng.randint(1, largest)
        num_seqs = rng.randint(max(1, -(-total // (_SLOT_TOKENS // 2))), min(total, _NUM_SLOTS))
        yield random_step(rng, total, num_seqs, manifest.model.vocab_size)


def random_step(rng: random.Random, total: int, num_seqs: int, vocab_size: int) -> Step:
    """``total`` tokens of ``num_seqs`` sequences with random contexts; logits of some of them, sometimes of none."""
    lengths = [total // num_seqs + (index < total % num_seqs) for index in range(num_seqs)]
    before = [rng.randint(0, _SLOT_TOKENS - length) for length in lengths]
    contexts = [start + length for start, length in zip(before, lengths, strict=True)]
    ends = np.cumsum(lengths)
    answered = rng.sample(range(num_seqs), rng.randint(0, num_seqs))

    def ints(values: Any) -> "np.ndarray[Any, np.dtype[np.int32]]":
        return np.array(list(values), dtype=np.int32)

    return Step(
        token_ids=ints(rng.randrange(vocab_size) for _ in range(total)),
        positions=ints(start + i for start, length in zip(before, lengths, strict=True) for i in range(length)),
        rope_len=ints(context for context, length in zip(contexts, lengths, strict=True) for _ in range(length)),
        seq_start=ints([0, *ends]),
        context_len=ints(contexts),
        slot=ints(rng.sample(range(_NUM_SLOTS), num_seqs)),
        logits_at=ints(sorted(ends[index] - 1 for index in answered)),
    )
