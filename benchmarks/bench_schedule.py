"""Scheduling policies side by side on one trace, in simulation: what each class of requests gets. Nothing is run."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.console import finish, show_table
from xllm_compile.benchmarks.planned_models import planned_regions
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.schedule_simulation import SimulatedEngine, SimulatedSequence
from xllm_compile.benchmarks.timing import percentile
from xllm_compile.bucket_plan import predict_step_times, seconds_per_key
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.device_spec import device_spec
from xllm_compile.request_trace import TraceError, TraceRequest, read_trace
from xllm_compile.runtime.local_scheduler import SchedulingRules
from xllm_compile.runtime.policies.admission import HORIZON
from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.runtime.policies.order import Order, PolicyName
from xllm_compile.runtime.policies.state import Limits
from xllm_compile.runtime.step_predictor import StepPrior

# What the machine is slower by than the build believes: the predictor has to find out.
_MACHINE_FACTOR = 1.3


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestClass:
    """A part of the trace's requests."""

    share: float
    ttft_slo_s: float | None
    tpot_slo_s: float | None
    priority: int
    is_offline: bool = False


CLASSES = {
    "interactive": RequestClass(share=0.5, ttft_slo_s=0.5, tpot_slo_s=0.030, priority=0),
    "relaxed": RequestClass(share=0.3, ttft_slo_s=5.0, tpot_slo_s=0.100, priority=1),
    "offline": RequestClass(share=0.2, ttft_slo_s=None, tpot_slo_s=None, priority=2, is_offline=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    policy: PolicyName
    horizon: int = HORIZON
    has_classes: bool = True
    """Without, the scheduler knows of no targets, priorities and offline requests."""


CASES = {
    "one class, horizon 0": Case(policy="fcfs", horizon=0, has_classes=False),
    "one class, horizon 256": Case(policy="fcfs", horizon=256, has_classes=False),
    "one class": Case(policy="fcfs", has_classes=False),
    "fcfs": Case(policy="fcfs"),
    "priority": Case(policy="priority"),
    "deadline": Case(policy="deadline"),
}


def run_schedule(
    trace: Path,
    results: Path,
    command: Sequence[str],
    *,
    name: str,
    model: str,
    device: str,
    num_requests: int,
    rate: float,
    kv_tokens: int,
    max_tokens: int,
    max_seqs: int,
) -> None:
    """Simulate every case and write NAME.json. Raises TraceError for a trace without arrival times."""
    requests = _scaled(trace, num_requests, rate)
    regions, costs = planned_regions(model), CostModel(spec=device_spec(device))
    table = predict_step_times(regions, costs, max_tokens)["T"]
    key_s = seconds_per_key(regions, costs)
    prior = StepPrior(
        by_tokens=table.of, token_s=table.of(max_tokens) / max_tokens, sequence_s=1e-6, key_s=key_s, pair_s=1e-11
    )

    def truth(load: StepLoad) -> float:
        return _MACHINE_FACTOR * (table.of(load.num_tokens) + key_s * load.num_keys)

    figures: dict[str, dict[str, Any]] = {}
    for what, case in CASES.items():
        began = time.perf_counter()
        engine = SimulatedEngine(
            rules=SchedulingRules(order=Order(case.policy), admission_horizon=case.horizon),
            limits=Limits(max_num_seqs=max_seqs, max_num_batched_tokens=max_tokens),
            num_kv_tokens=kv_tokens,
            prior=prior,
            truth=truth,
        )
        arrivals = _sequences(requests, has_classes=case.has_classes)
        engine.run(arrivals)
        figures[what] = _figures(arrivals, engine) | {"host_s": time.perf_counter() - began}
    raw = {
        "trace": trace.name,
        "num_requests": len(requests),
        "requests_per_s": rate,
        "model": model,
        "device_spec": costs.spec.to_json(),
        "machine_factor": _MACHINE_FACTOR,
        "kv_tokens": kv_tokens,
        "max_num_batched_tokens": max_tokens,
        "max_num_seqs": max_seqs,
        "cases": figures,
    }
    _show(trace, rate, figures)
    finish(make_record(name, command, seed=0, raw=raw, bars=_bars(figures)), results)


def _scaled(trace: Path, num_requests: int, rate: float) -> list[TraceRequest]:
    """The first requests, their arrivals brought closer so that they come at ``rate`` per second."""
    requests = read_trace(trace)[:num_requests]
    start, end = requests[0].arrival_s, requests[-1].arrival_s
    if start is None or end is None or end <= start:
        raise TraceError(f"trace {trace} has no arrival times; without them nothing can be simulated")
    scale = (len(requests) - 1) / (end - start) / rate
    return [
        TraceRequest(((request.arrival_s or 0.0) - start) * scale, request.prompt_tokens, max(1, request.output_tokens))
        for request in requests
    ]


def _sequences(requests: Sequence[TraceRequest], *, has_classes: bool) -> list[SimulatedSequence]:
    dealt = random.Random(0).choices(list(CLASSES), [kind.share for kind in CLASSES.values()], k=len(requests))
    sequences = []
    for number, (request, name) in enumerate(zip(requests, dealt, strict=True)):
        kind = CLASSES[name]
        sequence = SimulatedSequence(
            number=number,
            kind=name,
            arrival_s=request.arrival_s or 0.0,
            num_prompt_tokens=request.prompt_tokens,
            num_outputs_wanted=request.output_tokens,
            max_tokens=max(1024, request.output_tokens),
        )
        if has_classes:
            sequence.ttft_slo_s, sequence.tpot_slo_s = kind.ttft_slo_s, kind.tpot_slo_s
            sequence.priority, sequence.is_offline = kind.priority, kind.is_offline
        sequences.append(sequence)
    return sequences


def _figures(sequences: Sequence[SimulatedSequence], engine: SimulatedEngine) -> dict[str, Any]:
    found: dict[str, Any] = {
        "num_steps": engine.num_steps,
        "simulated_s": engine.now,
        "tokens_per_s": sum(sequence.num_outputs for sequence in sequences) / engine.now,
        "num_preemptions": sum(sequence.num_preemptions for sequence in sequences),
    }
    for name, kind in CLASSES.items():
        served = [sequence for sequence in sequences if sequence.kind == name and sequence.first_token_s is not None]
        tpots = [tpot for sequence in served if (tpot := sequence.tpot_s) is not None]
        found[name] = {
            "num_served": len(served),
            **{f"ttft_p{q}_s": percentile([sequence.ttft_s for sequence in served], q) for q in (50, 99)},
            **{f"tpot_p{q}_s": percentile(tpots, q) for q in (50, 99)},
            "attainment": sum(_meets(sequence, kind) for sequence in served) / max(1, len(served)),
            "num_preemptions": sum(sequence.num_preemptions for sequence in served),
        }
    return found


def _meets(sequence: SimulatedSequence, kind: RequestClass) -> bool:
    """Both targets of its class, whatever the scheduler knew of them."""
    tpot_s = sequence.tpot_s
    in_time = kind.ttft_slo_s is None or sequence.ttft_s <= kind.ttft_slo_s
    return in_time and (kind.tpot_slo_s is None or tpot_s is None or tpot_s <= kind.tpot_slo_s)


def _bars(figures: dict[str, dict[str, Any]]) -> list[Bar]:
    base, online = figures["one class"], ("interactive", "relaxed")

    def attained(case: dict[str, Any]) -> float:
        served = sum(case[kind]["num_served"] for kind in online)
        return float(sum(case[kind]["attainment"] * case[kind]["num_served"] for kind in online) / max(1, served))

    bars = [
        Bar(
            what=f"tokens per second: admission for {HORIZON} steps against admission for {horizon}",
            value=base["tokens_per_s"] / figures[f"one class, horizon {horizon}"]["tokens_per_s"],
            unit="x",
            bar=">= 1",
        )
        for horizon in (0, 256)
    ]
    for what in ("fcfs", "priority", "deadline"):
        more = attained(figures[what]) - attained(base)
        bars.append(
            Bar(what=f"online requests with both targets met: {what}, over one class", value=more, unit="share")
        )
    best = max(attained(figures[what]) for what in ("priority", "deadline"))
    bars.append(
        Bar(
            what="online requests with both targets met: the better of priority and deadline, over one class",
            value=best - attained(base),
            unit="share",
            bar=">= 0",
        )
    )
    return bars


def _show(trace: Path, rate: float, figures: dict[str, dict[str, Any]]) -> None:
    rows = [
        (
            what,
            kind,
            f"{case[kind]['ttft_p50_s']:.2f} / {case[kind]['ttft_p99_s']:.2f}",
            f"{case[kind]['tpot_p50_s'] * 1e3:.1f} / {case[kind]['tpot_p99_s'] * 1e3:.1f}",
            f"{case[kind]['attainment']:.1%}",
            str(case[kind]["num_preemptions"]),
            f"{case['tokens_per_s']:.0f}",
        )
        for what, case in figures.items()
        for kind in CLASSES
    ]
    show_table(
        f"{trace.name} at {rate:g} requests/s",
        ("policy", "class", "TTFT p50/p99 s", "TPOT p50/p99 ms", "targets met", "preempted", "tokens/s"),
        rows,
    )
