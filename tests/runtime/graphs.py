"""Graphs that only tell which one ran, steps of new sequences, and the real runner of an artifact."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xllm_compile.graph_passes.step_cost import StepTimes
from xllm_compile.runtime.artifact import Manifest, read_manifest
from xllm_compile.runtime.graph_cache import GraphCache
from xllm_compile.runtime.model_runner import CompiledModelRunner
from xllm_compile.runtime.program import RegionProgram
from xllm_compile.runtime.step import Step
from xllm_compile.runtime.weights import map_weights

# Reading the weights takes as long as computing 20 tokens.
TIMES = StepTimes(sizes=(1, 2), seconds=(21.0, 22.0), dynamic_overhead=1.1)


def program(name, *, is_eager=False):
    """Its eager run doubles its input."""
    code = "def forward(self, x):\n    return (x * 2,)\n"
    return RegionProgram(name=name, code=code, inputs=(), weights=(), layers=(), is_eager=is_eager)


def graph(region, size):
    """Graphs are told apart by what they return."""
    return lambda tensors: [(region, size)]


def cache(*buckets, regions=("layer",)):
    graphs = {("embed", 0): graph("embed", 0)}
    graphs |= {(region, size): graph(region, size) for region in regions for size in (0, *buckets)}
    return GraphCache(programs={name: program(name) for name in ("embed", *regions)}, times=TIMES, graphs=graphs)


def step_of(lengths, vocab_size, seed):
    """A step whose sequences start new: lengths of their prompts."""
    rng = np.random.default_rng(seed)

    def ints(values):
        return np.array(list(values), dtype=np.int32)

    total = sum(lengths)
    return Step(
        token_ids=rng.integers(vocab_size, size=total).astype(np.int32),
        positions=ints(i for length in lengths for i in range(length)),
        rope_len=ints(length for length in lengths for _ in range(length)),
        seq_start=ints(np.cumsum([0, *lengths])),
        context_len=ints(lengths),
        slot=ints(range(len(lengths))),
        logits_at=ints(np.cumsum(lengths) - 1),
    )


def compiled_runner(
    root: Path, *, max_model_len: int = 80, **options: Any
) -> tuple[CompiledModelRunner, Manifest, list[Tensor]]:
    """The artifact's runner on an empty KV cache of 8 slots, its manifest, and the cache's layers. The kernels must be
    loaded; ``options`` are the runner's own."""
    manifest = read_manifest(root)
    model = manifest.model
    layers = [torch.zeros(8, max_model_len, 2, model.num_kv_heads, model.head_dim) for _ in range(model.num_layers)]
    runner = CompiledModelRunner(
        root,
        manifest,
        map_weights(root / manifest.weights[0].path),
        layers,
        max_model_len=max_model_len,
        max_num_seqs=8,
        max_num_batched_tokens=min(max_model_len, manifest.max_num_batched_tokens),
        **options,
    )
    return runner, manifest, layers
