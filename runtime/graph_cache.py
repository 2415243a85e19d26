"""Which compiled graph runs a step: the exact bucket, a bucket whose padding pays, the dynamic-shape graph, or eager.

Nothing is ever compiled here; every choice is counted, so a shape that misses its bucket shows in /metrics.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from xllm_compile.graph_passes.step_cost import DYNAMIC_OVERHEAD, step_cost
from xllm_compile.runtime.artifact import GraphEntry
from xllm_compile.runtime.program import RegionProgram

Outcome = Literal["exact", "padded", "dynamic", "eager"]
GraphFunction = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketChoice:
    """``size`` is what the step is padded to."""

    outcome: Outcome
    size: int


@dataclass(kw_only=True, slots=True)
class GraphCache:
    """The graphs of one axis of buckets (tokens for embed and layers, logits rows for the head), for its regions.

    ``buckets`` are the compiled sizes; ``graphs`` maps (region, size) to its graph, size 0 being the dynamic one.
    With no graphs at all every step runs ``eager``.
    """

    buckets: Sequence[int]
    graphs: dict[tuple[str, int], GraphFunction]
    eager: dict[str, GraphFunction]
    counts: dict[str, int] = field(default_factory=lambda: {"exact": 0, "padded": 0, "dynamic": 0, "eager": 0})

    def choose(self, size: int) -> BucketChoice:
        """Choose for a step of ``size`` and count the choice."""
        choice = self._choose(size)
        self.counts[choice.outcome] += 1
        return choice

    def _choose(self, size: int) -> BucketChoice:
        if not self.graphs:
            return BucketChoice(outcome="eager", size=size)
        bucket = next((b for b in self.buckets if b >= size), None)
        if bucket == size:
            return BucketChoice(outcome="exact", size=size)
        if bucket is not None and step_cost(bucket) <= step_cost(size) * DYNAMIC_OVERHEAD:
            return BucketChoice(outcome="padded", size=bucket)
        return BucketChoice(outcome="dynamic", size=size)

    def graph(self, region: str, choice: BucketChoice) -> GraphFunction:
        if choice.outcome == "eager":
            return self.eager[region]
        # A region that gains nothing from fixed shapes (embed) has its dynamic graph only.
        return self.graphs.get((region, choice.size)) or self.graphs[region, 0]


def load_graph(path: Path) -> GraphFunction:
    """The entry of a compiled graph. The kernels it calls must be loaded first."""
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)
    # The method keeps the runner, and with it the library, alive.
    run: GraphFunction = runner.run
    return run


def build_cache(
    root: Path,
    axis: str,
    buckets: Sequence[int],
    programs: Sequence[RegionProgram],
    entries: Sequence[GraphEntry],
    *,
    enforce_eager: bool,
) -> GraphCache:
    """The cache over ``axis`` ("T" or "R") for the regions of ``programs``."""
    names = {program.name for program in programs}
    graphs = (
        {}
        if enforce_eager
        else {
            (entry.region, entry.sizes.get(axis, 0)): load_graph(root / entry.file.path)
            for entry in entries
            if entry.region in names
        }
    )
    eager = {program.name: _eager(program) for program in programs} if enforce_eager else {}
    return GraphCache(buckets=tuple(sorted(buckets)), graphs=graphs, eager=eager)


def _eager(program: RegionProgram) -> GraphFunction:
    function = program.load()
    return lambda tensors: list(function(*tensors))
