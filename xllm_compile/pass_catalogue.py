"""Every pass there is, in order: what it did to this model, or why it was not run."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from xllm_compile.build_config import BuildConfig
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.device_spec import device_spec
from xllm_compile.graph_passes.pipeline import Pass, cpu_pipeline, npu_pipeline, split_pipeline
from xllm_compile.graph_passes.quantisation import Quantisation
from xllm_compile.graph_passes.region import PassReport
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.micro_batches import SplitPlan
from xllm_compile.report import RegionReport
from xllm_compile.runtime.ops.spec import SPLIT_SUFFIX

_SPLIT_PASSES = tuple(step.name for step in split_pipeline())


@dataclass(kw_only=True, slots=True)
class PassRow:
    """One pass of the catalogue."""

    name: str
    summary: str
    reports: dict[str, list[PassReport]] = field(default_factory=dict)
    """By region; several where a region is in pieces."""
    reason: str = ""
    """Why it was not run; empty where it was."""

    def matches(self, region: str) -> int:
        return sum(report.matches for report in self.reports.get(region, ()))

    def operators(self, region: str) -> tuple[int, int]:
        """How many operators the region called before the pass, and after."""
        found = self.reports.get(region, ())
        return sum(sum(r.ops_before.values()) for r in found), sum(sum(r.ops_after.values()) for r in found)


def pass_rows(config: BuildConfig, regions: Sequence[RegionReport], split: SplitPlan) -> list[PassRow]:
    """The catalogue, in the order in which a build for ``config`` runs it; ``split``: the halves of steps."""
    rows = {name: PassRow(name=name, summary=summary) for name, summary in _summaries().items()}
    for region in regions:
        for report in region.passes:
            rows[report.name].reports.setdefault(region.region, []).append(report)
    for report in split.passes:
        if report.name not in _SPLIT_PASSES:
            continue  # The target's lowering, counted on the whole step already.
        rows[report.name].reports.setdefault(report.region.removesuffix(SPLIT_SUFFIX), []).append(report)
    for row in rows.values():
        # What was decided about buckets is reported beside the regions.
        if not any(region.region in row.reports for region in regions):
            row.reason = _reason(row.name, config)
    return list(rows.values())


def passes_left_out(config: BuildConfig) -> frozenset[str]:
    """Those of ``config.disabled_passes`` that the target's pipelines would run.

    Raises ValueError for a name that is not in the catalogue, and for a pass beside the pipelines that the build needs.
    """
    names = list(_summaries())
    for name in sorted(config.disabled_passes):
        if name not in names:
            raise ValueError(f"no pass is named {name!r}; passes: {', '.join(names)}")
        if name == "memory_plan":
            raise ValueError("pass 'memory_plan' cannot be left out: it changes no graph, and sizes the memory of all")
        if name == "partition" and config.graph_mode == "partial":
            raise ValueError("--graph-mode partial asks for the pass 'partition'; leave out one of the two")
    return config.disabled_passes & {*(step.name for step in _pipelines()[config.target]), *_SPLIT_PASSES}


def _pipelines() -> dict[str, list[Pass]]:
    """By target, with everything that can be asked for."""
    return {
        "cpu": cpu_pipeline(quantisation=Quantisation(scheme="int8")),
        "npu": npu_pipeline(max_model_len=1, model=CostModel(spec=device_spec("ascend-910b2")), step=StepShape.of(1)),
    }


def _summaries() -> dict[str, str]:
    passes = [step for pipeline in _pipelines().values() for step in pipeline]
    summaries = {step.name: step.summary for step in [*passes, *split_pipeline()]}
    # Not in a pipeline: the driver runs the first on what a pipeline leaves, and plans memory for the result.
    summaries |= {
        "partition": "a layer cut at its attention, which runs eagerly",
        "memory_plan": "an offset in the shared pool for every intermediate",
        "quantise": "weights as int8 or int4 with scales",
    }
    return summaries


def _reason(name: str, config: BuildConfig) -> str:
    targets = [target for target, pipeline in _pipelines().items() if name in [step.name for step in pipeline]]
    if name in config.disabled_passes:
        return f"left out by --disable-pass {name}"
    if name in _SPLIT_PASSES:
        return _reason_without_halves(config)
    if name == "partition":
        return "not asked for: --graph-mode partial" if config.target == "cpu" else "only for --target cpu"
    if name == "cube_vector_balance" and config.target == "cpu":
        return "only for --target npu: a CPU's cores do both, and its graphs run one operator after the other on all"
    if config.target not in targets:
        return f"only for --target {' or '.join(targets)}"
    return "not asked for: --quantize"


def _reason_without_halves(config: BuildConfig) -> str:
    if config.tensor_parallel_size == 1:
        return "needs --tensor-parallel-size 2 or more: there is no sum to hide"
    if config.graph_mode != "full":
        return "needs --graph-mode full"
    if "micro_batch_split" in config.disabled_passes:
        return "needs micro_batch_split, which is left out"
    return "no bucket gains by it, see below"
