"""Planned timelines of a layer on a device we do not have: idle time of both units, before and after. Arithmetic only.

Before: every operator on one stream, with all cores. After: branches side by side, with cores as the balance pass gave;
where that is planned to take longer, it is declined and after is as before.

And whether the CPU's one kind of cores would gain by being shared by two parts of a step, by their number.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.console import finish, show_table
from xllm_compile.benchmarks.planned_models import deepseek_v3_layer, planned_regions, two_micro_batches
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.thread_shares import PARTS, SHARED_CORES, plan_shares
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.cube_vector_balance import cube_vector_balance
from xllm_compile.graph_passes.device_spec import DeviceSpec, device_spec
from xllm_compile.graph_passes.region import RegionGraph
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.graph_passes.timeline import PlannedNode, chrome_trace, idle_share, makespan, plan_timeline


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    name: str
    before: tuple[RegionGraph, StepShape]
    after: tuple[RegionGraph, StepShape]
    """Balanced; its nodes may have streams already."""


def run_balance(results: Path, command: Sequence[str], *, device: str, traces: Path | None) -> None:
    """Plan, and write cube_vector_balance.json; traces for Perfetto go to the folder ``traces``."""
    model = CostModel(spec=device_spec(device))
    raw: dict[str, Any] = {"device_spec": model.spec.to_json(), "cases": {}}
    bars, rows = [], []
    for case in _cases():
        before = plan_timeline(*_with_model(case.before, model))
        region, step = case.after
        report = cube_vector_balance(region, model, step)
        after = plan_timeline(region, model, step)
        is_declined = makespan(after) > makespan(before)
        after = before if is_declined else after
        plans = {"before": before, "after": after}
        raw["cases"][case.name] = {
            "step": {"before": _step_json(case.before[1]), "after": _step_json(step)},
            "is_declined": is_declined,
            "matches": report.matches,
            "skips": report.skips,
            "core_shares": _shares(region),
            **{when: _figures(plan, model.spec) for when, plan in plans.items()},
        }
        bars.append(
            Bar(
                what=f"{case.name}: planned time, after against before",
                value=makespan(after) / makespan(before),
                unit="x",
                bar="<= 1",
            )
        )
        for when, plan in plans.items():
            idle = idle_share(plan, model.spec)
            rows.append(
                (case.name, when, f"{makespan(plan) * 1e6:.0f}", f"{idle['cube']:.0%}", f"{idle['vector']:.0%}")
            )
            bars += [
                Bar(what=f"{case.name}: {unit} idle {when}", value=idle[unit], unit="share")
                for unit in ("cube", "vector")
            ]
            if traces is not None:
                traces.mkdir(parents=True, exist_ok=True)
                path = traces / f"{''.join(c if c.isalnum() else '_' for c in case.name)}_{when}.json"
                path.write_text(json.dumps(chrome_trace(plan, f"{case.name}, {when}")))
    show_table(f"Planned on {device}", ("layer", "", "us", "cube idle", "vector idle"), rows)
    raw["thread_shares"], share_bars = _thread_shares()
    bars += share_bars
    finish(make_record("cube_vector_balance", command, seed=0, raw=raw, bars=bars), results)


def _thread_shares() -> tuple[dict[str, Any], list[Bar]]:
    """Two parts of a step side by side on a CPU: figures by model, parts and cores, and the least ratio of any."""
    raw: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    ratios: dict[int, list[float]] = {cores: [] for cores in SHARED_CORES}
    for name in ("qwen3-0.6b", "qwen3-8b"):
        _, (layer, _), _ = planned_regions(name)
        for what, parts in PARTS.items():
            plans = {cores: plan_shares(layer, parts, cores) for cores in SHARED_CORES}
            raw[f"{name}, {what}"] = {str(cores): asdict(plan) for cores, plan in plans.items()}
            rows.append((f"{name}: {what}", *(f"{plan.ratio:.2f}" for plan in plans.values())))
            for cores, plan in plans.items():
                ratios[cores].append(plan.ratio)
    title = "A layer on a CPU, planned: two parts on shares of so many cores, against taking turns with all"
    show_table(title, ("parts", *(str(cores) for cores in SHARED_CORES)), rows)
    bars = [
        Bar(
            what=f"CPU of {cores} cores, two parts side by side: least planned time, against in turns",
            value=min(found),
            unit="x",
            # Where none gains, --explain and the documents say rightly that the CPU needs no such lowering.
            bar=">= 1" if cores <= 8 else "",
        )
        for cores, found in ratios.items()
    ]
    return raw, bars


def _with_model(what: tuple[RegionGraph, StepShape], model: CostModel) -> tuple[RegionGraph, CostModel, StepShape]:
    return what[0], model, what[1]


def _cases() -> list[Case]:
    _, (qwen, _), _ = planned_regions("qwen3-8b")
    cases = []
    for name, whole, half in (
        ("prefill of 4096", StepShape.of(4096, sequences=2), StepShape.of(2048, sequences=1)),
        ("decode of 256 at 2048", _decode(256, 2048), _decode(128, 2048)),
    ):
        # Half a batch per stream: a dense layer alone is one chain, nothing in it can run side by side.
        cases.append(Case(name=f"Qwen3-8B layer, {name}", before=(qwen, whole), after=(two_micro_batches(qwen), half)))
    for batch in (64, 256):
        step = _decode(batch, 4096, logits=batch * 8 // 16)
        cases.append(
            Case(
                name=f"DeepSeek-V3-shaped layer, decode of {batch} at 4096",
                before=(deepseek_v3_layer(), step),
                after=(deepseek_v3_layer(), step),
            )
        )
    return cases


def _decode(batch: int, context: int, logits: int | None = None) -> StepShape:
    return StepShape.of(batch, sequences=batch, context=context, logits=logits)


def _figures(plan: Sequence[PlannedNode], spec: DeviceSpec) -> dict[str, Any]:
    idle = idle_share(plan, spec)
    total = makespan(plan)
    return {
        "seconds": total,
        "idle_share": idle,
        "idle_s": {unit: share * total for unit, share in idle.items()},
        "nodes": [[n.name, n.unit, n.stream, n.cores, n.start_s, n.end_s] for n in plan],
    }


def _shares(region: RegionGraph) -> dict[str, dict[str, int]]:
    """Of each stream that has one."""
    return {
        node.meta.get("stream") or "main": dict(node.meta["core_share"])
        for node in region.graph.nodes
        if "core_share" in node.meta
    }


def _step_json(step: StepShape) -> dict[str, int]:
    return {"tokens": step.num_tokens, "sequences": len(step.sequences), "context": step.sizes["M"]}
