"""The second set of programs of a tensor-parallel artifact: regions on two halves of a step, where that pays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xllm_compile.capture import emit_program
from xllm_compile.graph_jobs import GraphJob, graph_job
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.overlap import predict_overlap
from xllm_compile.graph_passes.pipeline import Pass, run_passes, split_pipeline
from xllm_compile.graph_passes.region import PassReport, RegionGraph
from xllm_compile.report import RegionReport, manifest_entry
from xllm_compile.runtime.ops.spec import SPLIT_SUFFIX
from xllm_compile.runtime.program import RegionProgram
from xllm_compile.targets import Lowering


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitPlan:
    """Buckets whose steps run in halves, and the programs they run; none where nothing is gained."""

    buckets: tuple[int, ...] = ()
    programs: tuple[RegionProgram, ...] = ()
    graphs: tuple[RegionGraph, ...] = ()
    """What the programs were made of, one of each region in order."""
    passes: tuple[PassReport, ...] = ()

    def passes_json(self) -> list[dict[str, Any]]:
        """For the manifest: what was decided for each bucket and what the passes did."""
        return [manifest_entry(report) for report in self.passes]

    def jobs(self, lowering: Lowering) -> list[GraphJob]:
        """One graph per region and bucket."""
        return [
            graph_job(program, lowering.halves_sizes(program, bucket), lowering)
            for program in self.programs
            for bucket in self.buckets
        ]


def plan_split(
    reports: Sequence[RegionReport],
    token_buckets: Sequence[int],
    tensor_parallel_size: int,
    model: CostModel,
    disabled: frozenset[str],
    *,
    last_passes: Sequence[Pass] = (),
    sums_leave_region: bool = True,
) -> SplitPlan:
    """Decide for each bucket, and run the passes on copies of the regions where one bucket gains.

    last_passes: those of the target that come after the split. sums_leave_region: see targets.Lowering.
    """
    passes = split_pipeline(disabled=disabled)
    if tensor_parallel_size == 1 or not passes:
        return SplitPlan()
    passes += last_passes
    decisions = PassReport(name="micro_batch_split", region="buckets")
    layers = [report for report in reports if report.layers]
    buckets = []
    for bucket in token_buckets:
        if bucket < 2:
            decisions.skip(f"bucket {bucket}: one token has no halves")
            continue
        predicted = [
            (
                report.num_runs,
                predict_overlap(
                    report.unlowered,
                    bucket,
                    tensor_parallel_size,
                    model,
                    lowered=report.graph,
                    sums_leave_region=sums_leave_region,
                ),
            )
            for report in layers
        ]
        plain_s, split_s = (sum(n * getattr(p, name) for n, p in predicted) for name in ("plain_s", "split_s"))
        if split_s < plain_s:
            buckets.append(bucket)
        else:
            decisions.skip(
                f"bucket {bucket}: predicted {split_s * 1e3:.3g} ms in halves, {plain_s * 1e3:.3g} ms as one"
            )
    decisions.matches = len(buckets)
    if not buckets:
        return SplitPlan(passes=(decisions,))
    programs, graphs, found = [], [], []
    for report in reports:
        graph = report.unlowered.copy(report.region + SPLIT_SUFFIX)
        found += run_passes(graph, passes)
        programs.append(emit_program(graph, report.layers))
        graphs.append(graph)
    if any(report.name == "micro_batch_split" and not report.matches for report in found):
        # All regions of a step run in halves or none: a region the pass declined says why in its report.
        return SplitPlan(passes=(decisions, *found))
    return SplitPlan(buckets=tuple(buckets), programs=tuple(programs), graphs=tuple(graphs), passes=(decisions, *found))
