"""The build driver: a model directory in, an artifact out. ``build`` reads as the list of what happens."""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xllm_compile.atomic_dir import atomic_directory
from xllm_compile.bucket_plan import (
    pick_buckets,
    predict_step_times,
    read_workload,
    seconds_per_key,
    step_histogram,
)
from xllm_compile.build_config import BuildConfig
from xllm_compile.build_error import BuildError
from xllm_compile.build_key import build_key, tokenizer_files
from xllm_compile.build_output import check_resources, open_store, produce
from xllm_compile.build_plan import BuildPlan, Source
from xllm_compile.describe import describe
from xllm_compile.device import ChosenDevice, choose_device
from xllm_compile.graph_jobs import list_jobs
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.step_cost import StepTimes
from xllm_compile.micro_batches import SplitPlan, plan_split
from xllm_compile.progress import BuildProgress
from xllm_compile.region_programs import make_programs, passes_of
from xllm_compile.report import BucketReport, RegionReport
from xllm_compile.report.contents import write_reports
from xllm_compile.request_trace import TraceRequest
from xllm_compile.runtime import artifact
from xllm_compile.source_reader import read_source
from xllm_compile.targets import Lowering, lowering_for
from xllm_compile.weight_builder import artifact_weights

GRAPH_STORE_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildResult:
    output: Path
    is_up_to_date: bool
    seconds: float
    num_graphs: int = 0
    num_compiled: int = 0
    notes: tuple[str, ...] = ()
    """What a user asked for and did not wholly get."""


def build(config: BuildConfig, progress: BuildProgress) -> BuildResult:
    """Compile ``config.model_dir`` to an artifact at ``config.output``.

    Raises ValueError (and subclasses) for a bad model or option, BuildError, native.CompilerNotFoundError, OSError
    (disk full). Whatever happens, ``config.output`` is the old artifact or the new one, never part of either.
    """
    began = time.monotonic()
    check_output(config.output)
    lowering = lowering_for(config.target)
    lowering.check()
    source = read_source(config)
    compiler = lowering.compiler_version()
    device, workload = choose_device(config.target, config.device_spec), read_workload(config)
    key = build_key(config, source, workload, device, compiler)
    if is_up_to_date(config.output, key, lowering):
        return BuildResult(output=config.output, is_up_to_date=True, seconds=time.monotonic() - began)
    plan = make_plan(config, source, device, workload, compiler, key, progress)
    store = open_store(config.output, lowering.graph_suffix)
    num_workers = check_resources(config, plan.weights, len(plan.jobs))
    with atomic_directory(config.output) as root:
        for folder in ("graphs", "weights", artifact.TOKENIZER, artifact.REPORT):
            (root / folder).mkdir()
        num_compiled = produce(root, plan, store, num_workers, progress)
        for name in tokenizer_files(config.model_dir):
            shutil.copyfile(config.model_dir / name, root / artifact.TOKENIZER / name)
        write_reports(root / artifact.REPORT, plan)
        artifact.write_manifest(root, describe(root, plan))
    store.trim(GRAPH_STORE_BYTES)
    return BuildResult(
        output=config.output,
        is_up_to_date=False,
        seconds=time.monotonic() - began,
        num_graphs=len(plan.jobs),
        num_compiled=num_compiled,
        notes=tuple(_quantisation_notes(config, plan.reports)),
    )


def _quantisation_notes(config: BuildConfig, reports: Sequence[RegionReport]) -> Iterator[str]:
    """Products of the layers that keep their dtype although the layers are to be quantised."""
    for report in reports:
        for entry in report.passes:
            if entry.name == "quantise" and report.region.startswith("layer"):
                for reason, count in entry.skips.items():
                    yield (
                        f"--quantize {config.quantisation.label if config.quantisation else ''}: {count} of"
                        f" {entry.matches + sum(entry.skips.values())} products of region {report.region} stay as they"
                        f" are: {reason}"
                    )


def check_output(output: Path) -> None:
    """Raise BuildError when there is something at ``output`` that is no artifact: it would be deleted."""
    is_free = output.is_dir() and (artifact.is_artifact(output) or not any(output.iterdir()))
    if output.exists() and not is_free:
        raise BuildError(f"{output} exists and is no artifact; remove it or choose another -o")


def make_plan(
    config: BuildConfig,
    source: Source,
    device: ChosenDevice,
    workload: Sequence[TraceRequest],
    compiler: str,
    key: str,
    progress: BuildProgress,
) -> BuildPlan:
    """Everything that is decided before the first file is written."""
    lowering = lowering_for(config.target)
    programs, reports = make_programs(source, config, progress)
    times, buckets = plan_buckets(config, workload, device, reports)
    split = plan_halves(config, source, reports, buckets.tokens, device)
    return BuildPlan(
        config=config,
        source=source,
        device=device,
        compiler=compiler,
        key=key,
        programs=programs,
        reports=reports,
        step_times=times,
        buckets=buckets,
        split=split,
        weights=artifact_weights(programs),
        jobs=[*list_jobs(programs, buckets.tokens, buckets.logits, lowering), *split.jobs(lowering)],
    )


def plan_buckets(
    config: BuildConfig, workload: Sequence[TraceRequest], device: ChosenDevice, reports: Sequence[RegionReport]
) -> tuple[dict[str, StepTimes], BucketReport]:
    """Predicted times by axis, and the buckets chosen by them."""
    regions, model = [(report.graph, report.num_runs) for report in reports], CostModel(spec=device.spec)
    times = predict_step_times(regions, model, config.max_num_batched_tokens)
    key_s = seconds_per_key(regions, model)
    histogram = step_histogram(workload, config.max_num_batched_tokens, times["T"], key_s)
    return times, pick_buckets(config, histogram, times["T"])


def plan_halves(
    config: BuildConfig,
    source: Source,
    reports: Sequence[RegionReport],
    token_buckets: Sequence[int],
    device: ChosenDevice,
) -> SplitPlan:
    """Which buckets run in halves; none where the graph mode has no such graphs."""
    return plan_split(
        reports,
        token_buckets if config.graph_mode == "full" else (),
        config.tensor_parallel_size,
        CostModel(spec=device.spec),
        config.disabled_passes,
        last_passes=[step for step in passes_of(source, config) if step.after_split],
        sums_leave_region=lowering_for(config.target).sums_leave_region,
    )


def is_up_to_date(output: Path, key: str, lowering: Lowering) -> bool:
    """Whether ``output`` is a whole artifact of this very build."""
    if not artifact.is_artifact(output):
        return False
    try:
        manifest = artifact.read_manifest(output)
        artifact.check_artifact(output, manifest, lowering.features())
    except artifact.ArtifactMismatchError:
        return False
    return manifest.build_key == key
