"""Whether splitting a step in halves pays: what it hides of the collectives against what smaller products cost.

The link carries one sum after the other; the device computes one node after the other. Layers repeat, so what counts
is the time from one layer's end to the next one's. Where a graph ends only when its sums have arrived, none is hidden
behind the next layer.
"""

from dataclasses import dataclass

from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.micro_batch_split import split_sizes
from xllm_compile.graph_passes.node_cost import region_costs
from xllm_compile.graph_passes.region import RegionGraph
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.runtime.ops.collectives import ALL_REDUCE

_LAYERS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """Predicted time of one layer, as one step and in halves."""

    plain_s: float
    split_s: float

    @property
    def pays(self) -> bool:
        return self.split_s < self.plain_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Of one half: computing, then a collective."""

    compute_s: float
    link_s: float


def predict_overlap(
    region: RegionGraph,
    num_tokens: int,
    world_size: int,
    model: CostModel,
    *,
    lowered: RegionGraph | None = None,
    sums_leave_region: bool = True,
) -> Overlap:
    """``region`` is an unsplit layer as it is split, ``lowered`` as it runs in one where that differs; ``num_tokens``
    (at least 2) those of one prompt."""
    plain = _parts(lowered or region, StepShape.of(num_tokens, world_size=world_size), model)
    sizes = split_sizes(num_tokens).values()
    steps = [
        StepShape(sequences=((size, end),), world_size=world_size)
        for size, end in zip(sizes, (next(iter(sizes)), num_tokens), strict=True)
    ]
    return Overlap(
        plain_s=sum(part.compute_s + part.link_s for part in plain),
        split_s=steady_seconds([_parts(region, step, model) for step in steps], sums_leave_region=sums_leave_region),
    )


def steady_seconds(halves: list[list[Part]], *, sums_leave_region: bool = True) -> float:
    """Time of one layer among equal ones, the parts of the halves alternating."""
    now, link_free = 0.0, 0.0
    arrived = [0.0] * len(halves)
    ends = []
    for _ in range(_LAYERS):
        for parts in zip(*halves, strict=True):
            for half, part in enumerate(parts):
                if not part.compute_s and not part.link_s:
                    continue  # Nothing after the last sum waits for it.
                now = max(now, arrived[half]) + part.compute_s
                if part.link_s:
                    link_free = arrived[half] = max(now, link_free) + part.link_s
        if not sums_leave_region:
            now = max(now, *arrived)
        ends.append(now)
    return ends[-1] - ends[-2]


def _parts(region: RegionGraph, step: StepShape, model: CostModel) -> list[Part]:
    parts, compute_s = [], 0.0
    for node, cost in region_costs(region, step):
        if node.target is ALL_REDUCE:
            parts.append(Part(compute_s=compute_s, link_s=model.seconds(cost)))
            compute_s = 0.0
        else:
            compute_s += model.seconds(cost)
    # What follows the last sum runs on with what the next layer does first.
    return [*parts, Part(compute_s=compute_s, link_s=0.0)]
