"""Runs each graph once before the first request: nobody's first token pays for what happens only once.

On the CPU that is the pages of the weights, which are mapped and not read until then, the pages of the activation
pool and of each library's code, and the kernels' threads. A graph runs on a step of padding: rows that belong to no
sequence, which write no KV and attend to nothing. One layer of a kind stands for all that share its graphs; the last
and smallest step runs every layer, for the weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from xllm_compile.runtime.graph_cache import DYNAMIC, GraphCache
from xllm_compile.runtime.program import RegionProgram, concrete_shape

# Export takes 0 and 1 for constants: a dynamic graph is traced for sizes from 2 on.
_SMALLEST = 2


def warm_up(cache: GraphCache, calls: Sequence[tuple[str, list[Tensor]]]) -> None:
    """Run the graphs of ``cache``, the largest bucket first: the pool reaches its peak once, and later steps fit below.

    ``calls`` are those of a whole step in order: the region, and the tensors after its metadata (KV cache, weights).
    A graph that fails is given up as it would be in a step. Nothing is counted. Ranks of a tensor-parallel instance
    do this together; for them a failure raises RuntimeError.
    """
    sizes = sorted({size for _, size in cache.graphs} - {DYNAMIC}, reverse=True)
    if any(size == DYNAMIC for _, size in cache.graphs):
        sizes.append(DYNAMIC)
    for size in sizes:
        warmed: set[str] = set()
        for region, tensors in calls:
            if region not in warmed or size == sizes[-1]:
                warmed.add(region)
                _run(cache, region, size, tensors)


def _run(cache: GraphCache, region: str, size: int, tensors: list[Tensor]) -> None:
    graph, program = cache.graphs.get((region, size)), cache.programs[region]
    if graph is None:
        return
    try:
        outputs = graph([*_padding(program, size or _SMALLEST), *tensors])
    except RuntimeError as err:
        if program.has_collectives:
            raise
        cache.give_up(region, size, err)
        return
    if program.has_collectives:
        for output in outputs:
            # A sum may still be on its way, to a tensor that nobody would hold.
            torch.ops._c10d_functional.wait_tensor(output)


def _padding(program: RegionProgram, size: int) -> list[Tensor]:
    """Zeros for every input but the KV cache: all sequences start and end at row 0."""
    second = size // 2
    sizes = {"T": size, "S": size, "S1": size + 1, "R": size, "TA": size - second, "TB": second}
    return [
        torch.zeros(*concrete_shape(spec, sizes), dtype=getattr(torch, spec.dtype))
        for spec in program.inputs
        if spec.name != "kv_cache"
    ]
