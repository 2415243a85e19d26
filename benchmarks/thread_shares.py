"""Whether two parts of a step on a CPU would end sooner side by side, each on a share of the threads. Arithmetic only.

As it is, all threads take the operators of a step in turn. Shares are what the solver of ``core_balance`` finds, on the
sockets that ``bench_cores`` plans with. Nothing is charged for bringing them about, and the parts slow each other down
only where together they read more than the memory gives: no schedule of shares is quicker than this one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from xllm_compile.benchmarks.bench_cores import server_spec
from xllm_compile.graph_passes.core_balance import Branch, balance_cores
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.node_cost import region_costs
from xllm_compile.graph_passes.region import RegionGraph
from xllm_compile.graph_passes.step_shape import StepShape

SHARED_CORES = (2, 4, 8, 16, 32, 64)


def _decode(count: int, context: int) -> StepShape:
    return StepShape.of(count, count, context)


PARTS: Mapping[str, tuple[StepShape, StepShape]] = {
    "decode 2 at 2048, halves": (_decode(1, 2048), _decode(1, 2048)),
    "decode 32 at 128, halves": (_decode(16, 128), _decode(16, 128)),
    "decode 256 at 2048, halves": (_decode(128, 2048), _decode(128, 2048)),
    "two prompts of 256": (StepShape.of(256), StepShape.of(256)),
    "prompt of 448, decode 64 at 2048": (StepShape.of(448), _decode(64, 2048)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SharePlan:
    in_turns_s: float
    """One step with both parts in it, on all cores."""
    shared_s: float
    """Both parts side by side; each reads the weights for itself."""
    cores: tuple[int, int]

    @property
    def ratio(self) -> float:
        return self.shared_s / self.in_turns_s


def plan_shares(region: RegionGraph, parts: tuple[StepShape, StepShape], num_cores: int) -> SharePlan:
    """Of one run of the region. Raises ValueError for a single core: it cannot be shared."""
    models = [CostModel(spec=server_spec(cores)) for cores in range(1, num_cores + 1)]
    costs = [[cost for _, cost in region_costs(region, part)] for part in parts]
    # A CPU's cores do products and token-wise work alike: all are of one kind.
    branches = [
        Branch(name=str(index), cube_s=tuple(model.total_seconds(work) for model in models))
        for index, work in enumerate(costs)
    ]
    found = balance_cores(branches, num_cores, 1, slack=0.0)
    bytes_cold = sum(cost.bytes_cold for work in costs for cost in work)
    whole = StepShape(
        sequences=sum((part.sequences for part in parts), ()), num_logits=sum(part.num_logits for part in parts)
    )
    return SharePlan(
        in_turns_s=models[-1].total_seconds(cost for _, cost in region_costs(region, whole)),
        shared_s=max(found.makespan, bytes_cold / models[-1].spec.memory_bytes_per_s),
        cores=(found.cores[0][0], found.cores[1][0]),
    )
