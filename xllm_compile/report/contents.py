"""What goes on the report's page, from what the build decided; and the planned timeline as a trace file."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xllm_compile.build_config import BuildConfig
from xllm_compile.build_plan import BuildPlan
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.device_spec import DeviceSpec
from xllm_compile.graph_passes.memory_plan import plan_graph
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.graph_passes.timeline import PlannedNode, chrome_trace, plan_timeline
from xllm_compile.memory_layout import blocks
from xllm_compile.micro_batches import SplitPlan
from xllm_compile.report import INDEX, RegionReport, ReportPage, write_report
from xllm_compile.report.charts import Span

TIMELINE = "timeline.json"
# Tokens in the cache of the decode step that is planned.
_DECODE_CONTEXT = 1024


def write_reports(folder: Path, plan: BuildPlan) -> None:
    """``index.html`` and ``timeline.json`` in ``folder``."""
    config, source, device, reports = plan.config, plan.source, plan.device.spec, plan.reports
    model = source.config
    timelines = list(planned_timelines(config, source.max_model_len, device, reports, plan.split))
    largest = {"T": config.max_num_batched_tokens, "R": 1}
    page = ReportPage(
        title=f"{model.architecture}: {model.num_layers} layers of {model.hidden_size}",
        facts={
            "target": config.target,
            "device of the cost model": device.name,
            "dtype": source.dtype,
            "longest sequence": f"{source.max_model_len} tokens",
            "largest step": f"{config.max_num_batched_tokens} tokens",
            "passes left out": ", ".join(sorted(config.disabled_passes)) or "none",
        },
        regions=reports,
        buckets=plan.buckets,
        timelines=[(name, _spans(planned)) for name, planned in timelines],
        memory=[
            (f"{region.region}, {config.max_num_batched_tokens} tokens", blocks(region, plan_graph(region, largest)))
            for report in reports
            for region in report.lifetimes
        ],
        pool_bytes=plan.activation_bytes,
        halves=plan.split.passes,
        halved_buckets=plan.split.buckets,
    )
    write_report(folder / INDEX, page)
    trace = json.dumps(merged_trace(timelines), separators=(",", ":"))
    (folder / TIMELINE).write_text(trace, encoding="utf-8")


def planned_timelines(
    config: BuildConfig, max_model_len: int, device: DeviceSpec, reports: Sequence[RegionReport], split: SplitPlan
) -> Iterator[tuple[str, list[PlannedNode]]]:
    """Of each kind of layer: one decode, the largest step of a prefill, and the largest that runs in halves."""
    model = CostModel(spec=device)
    context = min(_DECODE_CONTEXT, max_model_len)
    world_size = config.tensor_parallel_size
    steps = {
        f"decode of 1 token, context {context}": StepShape.of(1, context=context, world_size=world_size),
        f"prefill of {config.max_num_batched_tokens} tokens": StepShape.of(
            config.max_num_batched_tokens, world_size=world_size
        ),
    }
    for report in reports:
        if report.layers:
            for name, step in steps.items():
                yield f"{report.region}, {name}", plan_timeline(report.graph, model, step)
    if split.buckets:
        bucket = max(split.buckets)
        step = StepShape.of(bucket, world_size=world_size)
        for report, graph in zip(reports, split.graphs, strict=True):
            if report.layers:
                yield f"{report.region}, prefill of {bucket} tokens in halves", plan_timeline(graph, model, step)


def _spans(planned: Sequence[PlannedNode]) -> list[Span]:
    has_streams = len({node.stream for node in planned}) > 1
    return [
        Span(
            name=node.operator,
            lane=f"{node.unit} {node.stream}" if has_streams else node.unit,
            start=node.start_s,
            end=node.end_s,
        )
        for node in planned
    ]


def merged_trace(timelines: Sequence[tuple[str, Sequence[PlannedNode]]]) -> dict[str, Any]:
    """One Chrome trace with a process for each timeline."""
    events = []
    for process, (name, planned) in enumerate(timelines, 1):
        events += [{**event, "pid": process} for event in chrome_trace(planned, name)["traceEvents"]]
    return {"traceEvents": events, "displayTimeUnit": "ns"}
