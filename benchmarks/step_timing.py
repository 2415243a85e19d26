"""Whole steps of an artifact, timed through the runtime's own runner, and what the cost model says of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from xllm_compile.benchmarks.planned_models import passed_regions
from xllm_compile.benchmarks.timing import Summary, measure
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.device_spec import DeviceSpec
from xllm_compile.graph_passes.node_cost import step_seconds
from xllm_compile.graph_passes.region import RegionGraph
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.models.config import DecoderConfig
from xllm_compile.runtime.artifact import Manifest, read_manifest
from xllm_compile.runtime.model_runner import CompiledModelRunner
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.step import Step
from xllm_compile.runtime.weights import map_weights

Sequences = tuple[tuple[int, int], ...]
"""(new tokens, context once they are written) of each sequence of a step; each yields one row of logits."""


def step_of(sequences: Sequences, vocab_size: int, seed: int) -> Step:
    rng = np.random.default_rng(seed)

    def ints(values: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.array(values, dtype=np.int32)

    news = [new for new, _ in sequences]
    return Step(
        token_ids=rng.integers(vocab_size, size=sum(news)).astype(np.int32),
        positions=ints([at for new, context in sequences for at in range(context - new, context)]),
        rope_len=ints([context for new, context in sequences for _ in range(new)]),
        seq_start=ints(np.cumsum([0, *news]).tolist()),
        context_len=ints([context for _, context in sequences]),
        slot=ints(list(range(len(sequences)))),
        logits_at=ints((np.cumsum(news) - 1).tolist()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedModel:
    """An artifact opened for timing: its runner, one that has the dynamic-shape graphs only, and its costs."""

    manifest: Manifest
    runner: CompiledModelRunner
    dynamic: CompiledModelRunner
    regions: Sequence[tuple[RegionGraph, int]]

    @classmethod
    def open(cls, root: Path, cases: Sequence[Sequences]) -> "TimedModel":
        """With a cache that holds every case. Raises what opening an artifact raises."""
        manifest = read_manifest(root)
        if manifest.tensor_parallel_size > 1 or manifest.target != "cpu":
            raise ValueError(
                f"{root} is for {manifest.target} on {manifest.tensor_parallel_size} ranks; time a cpu one"
            )
        largest = max(sum(new for new, _ in case) for case in cases)
        longest = max(context for case in cases for _, context in case)
        if largest > manifest.max_num_batched_tokens or longest > manifest.model.max_model_len:
            raise ValueError(
                f"{root} takes {manifest.max_num_batched_tokens} tokens a step and {manifest.model.max_model_len} a"
                f" sequence, {largest} and {longest} are needed; compile with --max-num-batched-tokens {largest}"
                f" --max-model-len {longest}"
            )
        native.load_kernels(root / "graphs/kernels.so")
        weights = map_weights(root / manifest.weights[0].path)
        model = manifest.model
        lengths = [
            max((case[slot][1] for case in cases if len(case) > slot), default=0)
            for slot in range(max(map(len, cases)))
        ]
        shape = (len(lengths), max(lengths), *model.kv_layer_shape)
        caches = []
        for _ in range(model.num_layers):
            cache = torch.empty(shape, dtype=getattr(torch, model.kv_cache_dtype))
            for slot, length in enumerate(lengths):
                # Pages that were never written all read as one page of zeros, from the cache.
                cache[slot, :length] = 0.01
            caches.append(cache)

        def runner(manifest: Manifest) -> CompiledModelRunner:
            return CompiledModelRunner(
                root,
                manifest,
                weights,
                caches,
                max_model_len=max(lengths),
                max_num_seqs=len(lengths),
                max_num_batched_tokens=manifest.max_num_batched_tokens,
            )

        only_dynamic = replace(manifest, graphs=tuple(graph for graph in manifest.graphs if not graph.sizes))
        config = DecoderConfig.from_json(manifest.model_config)
        return cls(
            manifest=manifest,
            runner=runner(manifest),
            dynamic=runner(only_dynamic),
            regions=passed_regions(config, getattr(torch, model.dtype)),
        )

    def measure(self, sequences: Sequences, *, seed: int, repeats: int, is_dynamic: bool = False) -> Summary:
        step = step_of(sequences, self.manifest.model.vocab_size, seed)
        runner = self.dynamic if is_dynamic else self.runner
        return measure(lambda: runner.execute(step), warmup=2, repeats=repeats)

    def predict(self, sequences: Sequences, spec: DeviceSpec) -> float:
        """On the graphs the runtime would choose."""
        tokens, rows = sum(new for new, _ in sequences), len(sequences)
        padded_tokens, is_dynamic = self._choice("T", self.manifest.token_buckets, tokens)
        padded_rows, _ = self._choice("R", self.manifest.logits_buckets, rows)
        shape = StepShape(sequences=sequences, num_logits=rows, padded_tokens=padded_tokens, padded_logits=padded_rows)
        seconds = step_seconds(self.regions, shape, CostModel(spec=spec))
        return seconds * (spec.dynamic_overhead if is_dynamic else 1.0)

    def _choice(self, axis: str, buckets: Sequence[int], size: int) -> tuple[int, bool]:
        """(padded size, whether on the dynamic graph), as the graph cache chooses."""
        bucket = self.manifest.step_times[axis].bucket_for(size, sorted(buckets))
        return (size, True) if bucket is None else (bucket, False)
