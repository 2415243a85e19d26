"""From a model's regions to programs: captured, passed, and cut where the graph mode wants pieces."""

from collections import Counter
from collections.abc import Sequence

import torch

from xllm_compile.build_config import BuildConfig
from xllm_compile.build_error import BuildError
from xllm_compile.build_plan import Source
from xllm_compile.capture import capture_region, emit_program
from xllm_compile.device import choose_device
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.memory_plan import lifetimes
from xllm_compile.graph_passes.partition import partition, runs_eagerly
from xllm_compile.graph_passes.pipeline import Pass, run_passes
from xllm_compile.graph_passes.region import RegionGraph
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.models.decoder import EMBED_WEIGHT, Region, build_regions, pool_region
from xllm_compile.pass_catalogue import passes_left_out
from xllm_compile.progress import BuildProgress
from xllm_compile.report import RegionReport
from xllm_compile.runtime.program import RegionProgram
from xllm_compile.targets import lowering_for


def make_programs(
    source: Source, config: BuildConfig, progress: BuildProgress
) -> tuple[list[RegionProgram], list[RegionReport]]:
    """Capture every region and run the passes on it. What pools embeddings is no part of a step's cost or memory plan,
    and has no report."""
    regions = build_regions(source.config, source.tensor_parallel_size, source.kv_cache_dtype)
    passes = passes_of(source, config)
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


def passes_of(source: Source, config: BuildConfig) -> list[Pass]:
    device = choose_device(config.target, config.device_spec)
    tied = frozenset({EMBED_WEIGHT}) if source.config.tie_word_embeddings else frozenset[str]()
    return lowering_for(config.target).pipeline(
        tied_weights=tied,
        max_model_len=source.max_model_len,
        disabled=passes_left_out(config),
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
