"""The graphs of one model as native calls, one for each size that steps have had; made anew when the graphs change."""

from collections.abc import Sequence

from torch import Tensor

from xllm_compile.runtime.compiled_graph import CompiledStep, GraphChain
from xllm_compile.runtime.graph_cache import GraphCache, GraphChoice


class Chains:
    """The layers' graphs as chains, one for each size that steps have had, made anew when the graphs change."""

    def __init__(self, layers: Sequence[tuple[str, Tensor, list[Tensor]]]) -> None:
        self._regions = [region for region, _, _ in layers]
        self._own = [[kv_cache, *weights] for _, kv_cache, weights in layers]
        self._chains: dict[tuple[str, int], GraphChain | None] = {}
        self._generations: dict[str, int] = {}

    def of(self, graphs: GraphCache, suffix: str, choice: GraphChoice) -> GraphChain | None:
        """None where a layer has no compiled graph for this choice."""
        if self._generations.get(suffix) != graphs.generation:
            self._generations[suffix] = graphs.generation
            self._chains = {key: chain for key, chain in self._chains.items() if key[0] != suffix}
        key = suffix, choice.graph_size
        if key not in self._chains:
            compiled = graphs.compiled([region + suffix for region in self._regions], choice)
            self._chains[key] = None if compiled is None else GraphChain(compiled, self._own)
        return self._chains[key]


class CompiledSteps:
    """Whole steps on the graphs of one model, one for each pair of sizes that layers and head have had; made anew when
    the graphs change."""

    def __init__(self, layers: Sequence[tuple[str, list[Tensor]]], head: list[Tensor]) -> None:
        """The regions of embed and layers in order, each with the tensors that it always gets; those of the head."""
        self._layers = layers
        self._own = [*(own for _, own in layers), head]
        self._steps: dict[tuple[int, int], tuple[tuple[int, int], CompiledStep | None]] = {}
        """With the generations of the graphs that it has."""

    def of(self, graphs: GraphCache, layers: GraphChoice, heads: GraphCache, head: GraphChoice) -> CompiledStep | None:
        """None where a region has no compiled graph for these choices."""
        key = layers.graph_size, head.graph_size
        generations = graphs.generation, heads.generation
        known = self._steps.get(key)
        if known is None or known[0] != generations:
            found = graphs.compiled([region for region, _ in self._layers], layers)
            last = heads.compiled(["head"], head)
            step = None if found is None or last is None else CompiledStep([*found, *last], self._own)
            known = self._steps[key] = generations, step
        return known[1]
