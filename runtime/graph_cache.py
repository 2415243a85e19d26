"""Which compiled graph runs a step: the exact bucket, a bucket whose padding pays, the dynamic-shape graph, or eager.

Nothing is ever compiled here. Every choice is counted with its reason, so a shape that misses its bucket shows in
/metrics; a graph that cannot be loaded or fails while it runs gives way to the next choice, and says so once.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from xllm_compile.graph_passes.step_cost import StepTimes
from xllm_compile.runtime.artifact import GraphEntry
from xllm_compile.runtime.compiled_graph import CompiledGraph
from xllm_compile.runtime.program import RegionProgram

logger = logging.getLogger(__name__)

Outcome = Literal["exact", "padded", "dynamic", "eager"]
Reason = Literal[
    "bucket",  # exact: the size has a graph of its own
    "promoted",  # exact: that graph was compiled while serving
    "padding_pays",  # padded: dearer than the size itself, cheaper than the dynamic graph
    "padding_too_dear",  # dynamic: the next bucket is too far
    "above_buckets",  # dynamic: larger than every bucket
    "graph_failed",  # any but exact: the graph that would have been chosen could not be loaded or run
    "enforce_eager",  # eager: asked for by the server's options
    "graph_mode",  # eager: compiled with --graph-mode eager
]
GraphFunction = Callable[[list[Tensor]], list[Tensor]]
DYNAMIC = 0
"""Stands for the size of the dynamic-shape graph."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphChoice:
    """``size`` is what the step is padded to."""

    outcome: Outcome
    size: int
    reason: Reason

    @property
    def is_bucket(self) -> bool:
        return self.outcome in ("exact", "padded")

    @property
    def graph_size(self) -> int:
        """Of the graph that serves it: all sizes that are no bucket share the dynamic one."""
        return self.size if self.is_bucket else DYNAMIC


@dataclass(kw_only=True, slots=True)
class GraphCache:
    """The graphs of one axis of buckets (tokens for embed and layers, logits rows for the head), for its regions.

    ``graphs`` maps (region, size) to its graph, size 0 being the dynamic one; a region that gains nothing from fixed
    shapes (embed) has that one only. ``programs`` run what has no graph. ``never_compiled`` says why there are none.
    One thread at a time.
    """

    programs: Mapping[str, RegionProgram]
    times: StepTimes
    """Predicted at build time; whether padding pays is read from it."""
    graphs: dict[tuple[str, int], GraphFunction] = field(default_factory=dict)
    never_compiled: Reason | None = None
    counts: Counter[tuple[Outcome, Reason]] = field(default_factory=Counter)
    demand: Counter[int] = field(default_factory=Counter)
    """Steps by their own size, whatever ran them."""
    buckets: tuple[int, ...] = ()
    promoted: set[int] = field(default_factory=set)
    """Buckets that the artifact did not bring."""
    failed: set[tuple[str, int]] = field(default_factory=set)
    _eager: dict[str, GraphFunction] = field(default_factory=dict)
    _has_dynamic: bool = False
    _choice: GraphChoice | None = None
    _choices: dict[int, GraphChoice] = field(default_factory=dict)
    """By size, until the graphs change."""
    generation: int = 0
    """Counts the changes to ``graphs``."""

    def __post_init__(self) -> None:
        self._index()

    def choose(self, size: int) -> GraphChoice:
        """Choose for a step of ``size`` and count the choice."""
        choice = self._choices.get(size)
        if choice is None:
            choice = self._choices[size] = self._choose(size)
        self.counts[choice.outcome, choice.reason] += 1
        self.demand[size] += 1
        self._choice = choice
        return choice

    @property
    def last_outcome(self) -> str:
        """Of the last choice, or of what ran in its place; empty before the first."""
        return self._choice.outcome if self._choice else ""

    def _choose(self, size: int) -> GraphChoice:
        if self.never_compiled is not None:
            return GraphChoice(outcome="eager", size=size, reason=self.never_compiled)
        bucket = next((b for b in self.buckets if b >= size), None)
        if bucket == size:
            reason: Reason = "promoted" if size in self.promoted else "bucket"
            return GraphChoice(outcome="exact", size=size, reason=reason)
        has_failed = any(failed == size for _, failed in self.failed)
        if bucket is not None and (not self._has_dynamic or self.times.padding_pays(size, bucket)):
            reason = "padding_pays" if self._has_dynamic and not has_failed else "graph_failed"
            return GraphChoice(outcome="padded", size=bucket, reason=reason)
        if self._has_dynamic:
            reason = "graph_failed" if has_failed else "above_buckets" if bucket is None else "padding_too_dear"
            return GraphChoice(outcome="dynamic", size=size, reason=reason)
        return GraphChoice(outcome="eager", size=size, reason="graph_failed")

    def run(self, region: str, choice: GraphChoice, tensors: list[Tensor]) -> list[Tensor]:
        """The region's outputs. A graph that raises is given up for the next choice, which gets the same tensors.

        Raises what the eager program raises: then the tensors are at fault, and no graph is given up.
        """
        size = self._size_of(region, choice)
        graph = self.graphs.get((region, size))
        if graph is None:
            return self._run_eagerly(region, tensors)
        try:
            return graph(tensors)
        except RuntimeError as err:
            if self.programs[region].has_collectives:
                # Run again on this rank only, its collectives would meet the wrong ones of the others.
                raise
            return self._fall_back(region, size, tensors, err)

    def compiled(self, regions: Iterable[str], choice: GraphChoice) -> list[CompiledGraph] | None:
        """The graphs that `run` would call for the regions; None when one of them has none."""
        found = [self.graphs.get((region, self._size_of(region, choice))) for region in regions]
        graphs = [graph for graph in found if isinstance(graph, CompiledGraph)]
        return graphs if len(graphs) == len(found) else None

    def _size_of(self, region: str, choice: GraphChoice) -> int:
        return choice.graph_size if (region, choice.graph_size) in self.graphs else DYNAMIC

    def _fall_back(self, region: str, size: int, tensors: list[Tensor], err: RuntimeError) -> list[Tensor]:
        # Running a region again is safe: its KV writes put the same values in the same places.
        given_up = {size: err}
        outcome: Outcome = "dynamic"
        dynamic = self.graphs.get((region, DYNAMIC))
        outputs = None
        if size != DYNAMIC and dynamic is not None:
            try:
                outputs = dynamic(tensors)
            except RuntimeError as dynamic_err:
                given_up[DYNAMIC] = dynamic_err
        if outputs is None:
            outcome, outputs = "eager", self._run_eagerly(region, tensors)
        for each, reason in given_up.items():
            self.give_up(region, each, reason)
        self._recount(outcome)
        return outputs

    def _run_eagerly(self, region: str, tensors: list[Tensor]) -> list[Tensor]:
        if region not in self._eager:
            function = self.programs[region].load()
            self._eager[region] = lambda tensors: list(function(*tensors))
        return self._eager[region](tensors)

    def _recount(self, outcome: Outcome) -> None:
        """The step under way ran otherwise than was chosen for it; eager once, eager for good."""
        choice = self._choice
        if choice is None or choice.outcome == "eager":
            return
        self.counts[choice.outcome, choice.reason] -= 1
        self._choice = GraphChoice(outcome=outcome, size=choice.size, reason="graph_failed")
        self.counts[outcome, "graph_failed"] += 1

    def saving(self, size: int) -> float:
        """Share of the predicted time of a step of ``size`` that a graph of its own saves, or would save."""
        larger = next((b for b in self.buckets if b >= size and b not in self.promoted - {size} and b != size), None)
        dynamic = self.times.of_dynamic(size)
        otherwise = dynamic if larger is None else min(self.times.of(larger), dynamic)
        return 1 - self.times.of(size) / otherwise

    def give_up(self, region: str, size: int, reason: Exception) -> None:
        """Never run the graph again; said once, in the log."""
        self.graphs.pop((region, size), None)
        self.failed.add((region, size))
        name = f"bucket {size}" if size else "any size"
        logger.warning(
            "the graph of region %s for %s is given up: %s; such steps take the next choice, and are counted",
            region,
            name,
            " ".join(str(reason).split()),
        )
        self._index()

    def add(self, size: int, graphs: Mapping[str, GraphFunction]) -> None:
        """Take a bucket compiled while serving: its graph of every region that has buckets."""
        self.graphs.update({(region, size): graph for region, graph in graphs.items()})
        self.promoted.add(size)
        self._index()

    def remove(self, size: int) -> None:
        """Let a bucket go. Its steps take the next choice from here on."""
        for key in [key for key in self.graphs if key[1] == size]:
            del self.graphs[key]
        self.promoted.discard(size)
        self._index()

    def _index(self) -> None:
        self.generation += 1
        self._choices.clear()
        compiled = [name for name, program in self.programs.items() if not program.is_eager]
        sized = {region for region, size in [*self.graphs, *self.failed] if size != DYNAMIC}
        sizes = sorted({size for _, size in self.graphs} - {DYNAMIC})
        self._has_dynamic = all((name, DYNAMIC) in self.graphs for name in compiled)
        self.buckets = tuple(
            size
            for size in sizes
            if all((name, size if name in sized else DYNAMIC) in self.graphs for name in compiled)
        )


def build_cache(
    root: Path,
    axis: str,
    times: StepTimes,
    programs: Sequence[RegionProgram],
    entries: Iterable[GraphEntry],
    *,
    enforce_eager: bool,
) -> GraphCache:
    """The cache over ``axis`` ("T" or "R") for the regions of ``programs``. Graphs that cannot be loaded are logged
    and left out."""
    by_name = {program.name: program for program in programs}
    if enforce_eager:
        return GraphCache(programs=by_name, times=times, never_compiled="enforce_eager")
    if all(program.is_eager for program in programs):
        return GraphCache(programs=by_name, times=times, never_compiled="graph_mode")
    graphs: dict[tuple[str, int], GraphFunction] = {}
    failures = []
    for entry in entries:
        if entry.region in by_name:
            key = entry.region, entry.sizes.get(axis, DYNAMIC)
            try:
                graphs[key] = CompiledGraph(root / entry.file.path)
            except RuntimeError as err:
                failures.append((key, err))
    cache = GraphCache(programs=by_name, times=times, graphs=graphs)
    for key, reason in failures:
        cache.give_up(*key, reason)
    return cache
