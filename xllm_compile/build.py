"""The build driver: a model directory in, an artifact out. ``build`` reads as the list of what happens."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from xllm_compile.atomic_dir import atomic_directory
from xllm_compile.bucket_plan import (
    pick_buckets,
    predict_step_times,
    read_workload,
    seconds_per_key,
    step_histogram,
)
from xllm_compile.build_config import BuildConfig
from xllm_compile.build_key import build_key, tokenizer_files
from xllm_compile.build_plan import BuildPlan, Source
from xllm_compile.capture import capture_region, emit_program, locate_operator
from xllm_compile.describe import describe
from xllm_compile.device import ChosenDevice, choose_device
from xllm_compile.graph_jobs import list_jobs
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.memory_plan import lifetimes
from xllm_compile.graph_passes.partition import partition, runs_eagerly
from xllm_compile.graph_passes.pipeline import Pass, run_passes
from xllm_compile.graph_passes.quantisation import Quantisation
from xllm_compile.graph_passes.region import RegionGraph
from xllm_compile.graph_passes.step_cost import StepTimes
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.graph_store import GraphStore, graph_key, link_or_copy
from xllm_compile.machine import available_memory_bytes, cache_dir, free_disk_bytes, num_cpus
from xllm_compile.micro_batches import SplitPlan, plan_split
from xllm_compile.models.checkpoint import FLOAT_DTYPES, Checkpoint
from xllm_compile.models.config import DecoderConfig, read_hf_config
from xllm_compile.models.decoder import EMBED_WEIGHT, Region, build_regions, checkpoint_shapes, pool_region
from xllm_compile.models.registry import read_model_config
from xllm_compile.models.rope import rope_constants
from xllm_compile.models.stored_quantisation import StoredQuantisation, read_stored_quantisation
from xllm_compile.models.tensor_parallel import rank_shape
from xllm_compile.progress import BuildProgress
from xllm_compile.report import BucketReport, RegionReport
from xllm_compile.report.contents import write_reports
from xllm_compile.request_trace import TraceRequest
from xllm_compile.runtime import artifact
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.ops.spec import WeightSpec
from xllm_compile.runtime.program import RegionProgram
from xllm_compile.targets import Lowering, UnsupportedOperatorError, lowering_for
from xllm_compile.weight_builder import artifact_weights, build_weights, num_bytes, weights_key
from xllm_compile.workers import build_kernels, compile_graph, stop_workers, worker_pool

GRAPH_STORE_BYTES = 2 << 30
_WORKER_BYTES = 900 << 20


class BuildError(ValueError):
    """The build cannot go on; the message names the next step."""


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


def read_source(config: BuildConfig) -> Source:
    """Read and check everything about the model but the values of its weights."""
    hf_config = read_hf_config(config.model_dir)
    model = read_model_config(hf_config)
    rank_shape(model, config.tensor_parallel_size)
    limit = model.max_position_embeddings
    # Rotary scaling stretches the trained length; max_position_embeddings already says so for all but "dynamic".
    reach = int(limit * model.rope.factor) if model.rope.rope_type == "dynamic" else limit
    max_model_len = config.max_model_len or limit
    if max_model_len > reach:
        raise ValueError(f"max_model_len={max_model_len} is above the model's limit of {reach} positions; lower it")
    if "tokenizer.json" not in tokenizer_files(config.model_dir):
        raise ValueError(
            f"{config.model_dir} has no tokenizer.json; save it there with"
            " AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    stored = read_stored_quantisation(hf_config)
    checkpoint = Checkpoint(config.model_dir)
    _check_checkpoint(checkpoint, model, stored)
    dtype = config.dtype
    if dtype == "auto":
        is_float32 = checkpoint.tensor(EMBED_WEIGHT).dtype == FLOAT_DTYPES["F32"]
        dtype = "float32" if is_float32 else "bfloat16"
    return Source(
        hf_config=hf_config,
        config=model,
        checkpoint=checkpoint,
        checkpoint_hash=checkpoint.content_hash(),
        dtype=dtype,
        kv_cache_dtype=dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        max_model_len=max_model_len,
        tensor_parallel_size=config.tensor_parallel_size,
        stored=stored,
        quantisation=_quantisation(config, stored),
    )


def _check_checkpoint(checkpoint: Checkpoint, model: DecoderConfig, stored: StoredQuantisation | None) -> None:
    shapes = checkpoint_shapes(model)
    matrices = {name: shape for name, shape in shapes.items() if stored and ".layers." in name and len(shape) == 2}
    if stored is not None:
        stored.check(checkpoint, matrices)
    checkpoint.check({name: shape for name, shape in shapes.items() if name not in matrices})


def _quantisation(config: BuildConfig, stored: StoredQuantisation | None) -> Quantisation | None:
    if stored is None:
        return config.quantisation
    if config.quantisation is not None:
        raise ValueError(
            f"--quantize {config.quantisation.scheme}: {config.model_dir} is quantised already (quant_method"
            f" {stored.method!r}); leave --quantize out, or give the unquantised checkpoint"
        )
    group_size = stored.group_size if stored.num_bits == 4 else None
    return Quantisation(scheme=stored.scheme, group_size=group_size, stored_by=stored.method)


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
        last_passes=[step for step in _pipeline(source, config) if step.after_split],
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


def make_programs(
    source: Source, config: BuildConfig, progress: BuildProgress
) -> tuple[list[RegionProgram], list[RegionReport]]:
    """Capture every region and run the passes on it. What pools embeddings is no part of a step's cost or memory plan,
    and has no report."""
    regions = build_regions(source.config, source.tensor_parallel_size, source.kv_cache_dtype)
    passes = _pipeline(source, config)
    progress.start("capture and passes", len(regions))
    programs, reports = [], []
    for region in regions:
        pieces, report = _make_programs(region, source.dtype, passes, config.graph_mode)
        programs += pieces
        reports.append(report)
        progress.advance("capture and passes")
    if lowering_for(config.target).has_pooling:
        programs += _make_programs(pool_region(source.config), source.dtype, passes, config.graph_mode)[0]
    return programs, reports


def _pipeline(source: Source, config: BuildConfig) -> list[Pass]:
    device = choose_device(config.target, config.device_spec)
    tied = frozenset({EMBED_WEIGHT}) if source.config.tie_word_embeddings else frozenset[str]()
    return lowering_for(config.target).pipeline(
        tied_weights=tied,
        max_model_len=source.max_model_len,
        disabled=config.disabled_passes,
        quantisation=source.quantisation,
        model=CostModel(spec=device.spec),
        step=StepShape.of(config.max_num_batched_tokens, world_size=config.tensor_parallel_size),
    )


def _make_programs(
    region: Region, dtype: str, passes: Sequence[Pass], graph_mode: str
) -> tuple[list[RegionProgram], RegionReport]:
    """One program, or the pieces of a partial graph."""
    graph = capture_region(region, getattr(torch, dtype))
    before, captured = graph.op_counts(), graph.module.code
    last = [step for step in passes if step.after_split]
    passes_reports = run_passes(graph, [step for step in passes if not step.after_split])
    unlowered = graph.copy(graph.name) if last else graph
    passes_reports += run_passes(graph, last)
    pieces = [graph]
    if graph_mode == "partial":
        pieces, partition_report = partition(graph)
        partition_report.ops_before, partition_report.ops_after = graph.op_counts(), _op_counts(pieces)
        passes_reports.append(partition_report)
        if partition_report.skips:
            raise BuildError(
                f"region {region.name} cannot be cut at its attention: {', '.join(partition_report.skips)};"
                " compile with --graph-mode full"
            )
    plans = [lifetimes(piece) for piece in pieces]
    for piece, (_, plan_report) in zip(pieces, plans, strict=True):
        plan_report.ops_before = plan_report.ops_after = piece.op_counts()
        passes_reports.append(plan_report)
    programs = [
        emit_program(
            piece,
            region.layers,
            is_piece=len(pieces) > 1,
            is_eager=graph_mode == "eager" or (len(pieces) > 1 and runs_eagerly(piece.graph.nodes)),
        )
        for piece in pieces
    ]
    return programs, RegionReport(
        region=region.name,
        layers=region.layers,
        passes=passes_reports,
        ops_before=before,
        ops_after=graph.op_counts(),
        captured=captured.strip(),
        final="\n".join(program.code for program in programs),
        graph=graph,
        unlowered=unlowered,
        lifetimes=[plan for plan, _ in plans],
    )


def _op_counts(pieces: Sequence[RegionGraph]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(piece.op_counts())
    return dict(sorted(counts.items()))


def open_store(output: Path, suffix: str) -> GraphStore:
    """The user's graph cache, which also finds the graphs of the artifact about to be replaced."""
    store = GraphStore(cache_dir() / "graphs", suffix)
    try:
        store.root.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise BuildError(
            f"cannot write the graph cache {store.root} ({err}); set XDG_CACHE_HOME to a folder you own"
        ) from err
    if artifact.is_artifact(output):
        try:
            for entry in artifact.read_manifest(output).graphs:
                if artifact.is_intact(output, entry.file):
                    store.adopt(entry.key, output / entry.file.path)
        except artifact.ArtifactMismatchError:
            pass  # A damaged artifact has nothing to give; it is replaced whole.
    return store


def check_resources(config: BuildConfig, weights: Sequence[WeightSpec], num_graphs: int) -> int:
    """Number of workers that fit. Raises BuildError when disk or memory cannot hold the build."""
    sizes = [num_bytes(spec) for spec in weights]
    disk_needed = config.tensor_parallel_size * sum(sizes) + num_graphs * (2 << 20)
    disk_free = free_disk_bytes(config.output.parent)
    if disk_free < disk_needed:
        raise BuildError(
            f"{config.output} needs {disk_needed >> 20} MiB, {disk_free >> 20} MiB are free there;"
            " free some space or choose another -o"
        )
    memory_needed = max(map(_bytes_while_made, weights)) + _WORKER_BYTES
    memory_free = available_memory_bytes()
    if memory_free < memory_needed:
        raise BuildError(
            f"the build needs about {memory_needed >> 20} MiB of memory, {memory_free >> 20} MiB are free;"
            " stop other processes or compile on a larger machine"
        )
    affordable = 1 + (memory_free - memory_needed) // _WORKER_BYTES
    return int(min(config.jobs or num_cpus(), affordable, num_graphs + 1))


def produce(
    root: Path,
    plan: BuildPlan,
    store: GraphStore,
    num_workers: int,
    progress: BuildProgress,
) -> int:
    """Compile what is missing while the weights are written, and link all of it into the artifact.

    Returns how many graphs were compiled.
    """
    config, source, jobs = plan.config, plan.source, plan.jobs
    lowering = lowering_for(config.target)
    kernels_key = graph_key(["kernels", native.kernel_source_hash(), torch.__version__, lowering.compiler_version()])
    missing = {job.key: job for job in jobs if store.find(job.key) is None}
    scratch = root / ".scratch"
    scratch.mkdir()
    progress.start("graphs", len(jobs))
    progress.advance("graphs", len(jobs) - len(missing))
    with worker_pool(config.target, num_workers, scratch) as pool:
        futures: dict[Future[None], str] = {}
        regions: dict[Future[None], str] = {}
        if lowering.has_kernels and store.find(kernels_key) is None:
            futures[pool.submit(build_kernels, config.target, str(store.path(kernels_key)))] = "kernels"
        for job in missing.values():
            output = str(store.path(job.key))
            future = pool.submit(compile_graph, config.target, job.program.to_json(), job.sizes, output)
            futures[future] = job.file
            regions[future] = job.program.name
        try:
            place_weights(root, config.output, source, plan.weights, progress)
            for future in as_completed(futures):
                try:
                    future.result()
                except UnsupportedOperatorError as err:
                    raise BuildError(_unsupported(config.target, source, regions[future], err)) from err
                if futures[future] != "kernels":
                    progress.advance("graphs")
        except BaseException:
            stop_workers(pool)
            raise
    for job in jobs:
        link_or_copy(_found(store, job.key), root / job.file)
    if lowering.has_kernels:
        link_or_copy(_found(store, kernels_key), root / artifact.KERNELS)
    shutil.rmtree(scratch)
    return len(missing)


def _unsupported(target: str, source: Source, region_name: str, error: UnsupportedOperatorError) -> str:
    # The pieces of a partial graph are named after their region.
    all_regions = [*build_regions(source.config, source.tensor_parallel_size), pool_region(source.config)]
    regions = sorted(all_regions, key=lambda region: len(region.name))
    region = next(region for region in reversed(regions) if region_name.startswith(region.name))
    operator = error.operators[0]
    place = locate_operator(region, getattr(torch, source.dtype), operator)
    return (
        f"region {region_name} uses {operator}{f' ({place})' if place else ''}, which the {target} target cannot lower;"
        " write it with operators it has, or add one with a kernel to runtime/ops"
    )


def _found(store: GraphStore, key: str) -> Path:
    path = store.find(key)
    if path is None:
        raise BuildError(f"graph {key} vanished from {store.root} while building; run the build again")
    return path


def place_weights(
    root: Path, previous: Path, source: Source, weights: Sequence[WeightSpec], progress: BuildProgress
) -> None:
    """Write each rank's weights file, or link the previous artifact's when they are the same."""
    num_ranks = source.tensor_parallel_size
    total = num_ranks * sum(num_bytes(spec) for spec in weights)
    computed = rope_constants(source.config)
    key = weights_key(source.checkpoint_hash, weights, computed, source.stored)
    progress.start("weights", total)
    if artifact.is_artifact(previous):
        try:
            manifest = artifact.read_manifest(previous)
            intact = all(artifact.is_intact(previous, entry) for entry in manifest.weights)
            if manifest.weights_key == key and len(manifest.weights) == num_ranks and intact:
                for entry in manifest.weights:
                    link_or_copy(previous / entry.path, root / entry.path)
                progress.advance("weights", total)
                return
        except artifact.ArtifactMismatchError:
            pass  # Written anew below.
    for rank in range(num_ranks):
        path = root / artifact.weights_path(rank, num_ranks)
        build_weights(
            path,
            source.checkpoint,
            computed,
            weights,
            lambda done: progress.advance("weights", done),
            rank=rank,
            stored=source.stored,
        )


def _bytes_while_made(spec: WeightSpec) -> int:
    """A tensor is held as read, converted and packed while it is written; one to be rounded as four float32."""
    if not spec.quantised:
        return 3 * num_bytes(spec)
    elements = num_bytes(spec) * (2 if spec.quantised == "int4" else 1)
    return 16 * elements
