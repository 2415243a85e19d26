"""Services of many instances in simulation: what routing and roles are worth, and how many instances fit."""

import math
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.simulation.chart import attainment_chart, page, timeline_chart
from xllm_compile.benchmarks.simulation.cluster import Cluster, ClusterRules, attainment
from xllm_compile.benchmarks.simulation.goodput import Goodput, highest_rate
from xllm_compile.benchmarks.simulation.hardware import Hardware, planned_hardware
from xllm_compile.benchmarks.simulation.instance import DEFAULT_ORDER
from xllm_compile.benchmarks.simulation.requests import online, read_requests, scaled, tidal
from xllm_compile.request_trace import TraceRequest
from xllm_compile.runtime.policies.order import Order
from xllm_compile.runtime.policies.order import PolicyName as OrderName
from xllm_compile.scheduler.cluster.state import Pool
from xllm_compile.scheduler.policies.roles import RoleRules
from xllm_compile.scheduler.policies.routing import PolicyName, RoutingRules

# Qwen3-8B: 36 layers of 8 KV heads of 128, keys and values of two bytes. Of a device of 64 GB the weights take 16.4,
# and a tenth is left to everything else.
KV_BYTES_PER_TOKEN = 36 * 2 * 8 * 128 * 2
KV_BYTES = 0.9 * 64e9 - 16.4e9
# A network of 200 Gbit/s to each device.
LINK_BYTES_PER_S = 25e9
# The prompt tokens that ride in a step of a decoding instance should not hold up the others for long.
MAX_NUM_BATCHED_TOKENS = 2048
ENOUGH = 0.9
# Of the day that is drawn for its length.
_DAY_PARTS = 96


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    ttft_slo_s: float
    tpot_slo_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One way to run the service."""

    policy: PolicyName
    pools: tuple[Pool, ...]
    is_dynamic: bool = False
    order: Order = DEFAULT_ORDER

    def cluster(self, hardware: Hardware, targets: Targets, seed: int) -> Cluster:
        role_rules = RoleRules(ttft_slo_s=targets.ttft_slo_s, tpot_slo_s=targets.tpot_slo_s)
        return Cluster(
            hardware=hardware,
            pools=self.pools,
            rules=ClusterRules(
                routing=RoutingRules(policy=self.policy),
                roles=role_rules if self.is_dynamic else None,
                order=self.order,
            ),
            seed=seed,
        )


def role_cases(num_instances: int) -> dict[str, Case]:
    """The last is ours; the others are what it is held against."""

    def split(num_prefills: int) -> tuple[Pool, ...]:
        return (Pool.PREFILL,) * num_prefills + (Pool.DECODE,) * (num_instances - num_prefills)

    half, more = num_instances // 2, num_instances * 3 // 4
    return {
        f"round robin, {half}P{num_instances - half}D": Case(policy="round_robin", pools=split(half)),
        f"minimal load, {half}P{num_instances - half}D": Case(policy="load", pools=split(half)),
        f"minimal load, {more}P{num_instances - more}D": Case(policy="load", pools=split(more)),
        "minimal load, not disaggregated": Case(policy="load", pools=(Pool.MIX,) * num_instances),
        "dynamic SLO-aware": Case(policy="slo", pools=split(half), is_dynamic=True),
    }


def run_dynamic_roles(
    traces: Sequence[Path],
    results: Path,
    command: Sequence[str],
    *,
    name: str,
    model: str,
    device: str,
    num_instances: int,
    targets: Targets,
    seeds: int,
    bars: Sequence[float],
    max_requests: int | None,
    scheduling_policy: OrderName,
) -> None:
    """The rate at which 90 % of requests meet both targets, of every case on every trace; writes NAME.json and .html.

    bars: of each trace, what the last case must reach over minimal load on as many prefills as decodes.
    """
    hardware = hardware_of(model, device)
    order = Order(scheduling_policy)
    cases = {what: replace(case, order=order) for what, case in role_cases(num_instances).items()}
    ours, base = list(cases)[-1], list(cases)[1]
    figures: dict[str, Any] = {}
    found_bars: list[Bar] = []
    charts: list[str] = []
    for path, bar in zip(traces, bars, strict=True):
        trace = read_requests(path, max_requests)
        began = time.perf_counter()
        with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            search = partial(_goodput, trace=trace, hardware=hardware, targets=targets, seeds=seeds)
            found = dict(zip(cases, pool.map(search, cases.values()), strict=True))
        say(f"{path.name}: {time.perf_counter() - began:.0f} s")
        figures[path.name] = {case: goodput.to_json() for case, goodput in found.items()}
        found_bars += _role_bars(path.name, found, ours, base, bar)
        charts.append(
            attainment_chart(
                f"{path.name}: requests that met both targets",
                {case: goodput.points for case, goodput in found.items()},
                ENOUGH,
            )
        )
        cluster = cases[ours].cluster(hardware, targets, 0)
        cluster.run(online(scaled(trace, found[ours].median, 0), targets.ttft_slo_s, targets.tpot_slo_s))
        figures[path.name]["role changes at the median rate"] = cluster.num_flips
        charts.append(timeline_chart(f"{path.name}: instances at that rate", cluster.timeline, cluster.now))
        show_table(
            f"{path.name}: requests/s at which {ENOUGH:.0%} meet TTFT {targets.ttft_slo_s:g} s, TPOT "
            f"{targets.tpot_slo_s:g} s",
            ("policy", "median", "lowest", "highest"),
            [
                (case, f"{one.median:.2f}", f"{min(one.rates):.2f}", f"{max(one.rates):.2f}")
                for case, one in found.items()
            ],
        )
    raw = settings(model, device, hardware, num_instances) | {
        "scheduling_policy": scheduling_policy,
        "targets": asdict(targets),
        "seeds": seeds,
        "max_requests": max_requests,
        "traces": figures,
    }
    finish(make_record(name, command, seed=0, raw=raw, bars=found_bars), results)
    (results / f"{name}.html").write_text(page(charts))


def run_scale(
    trace: Path,
    results: Path,
    command: Sequence[str],
    *,
    name: str,
    model: str,
    device: str,
    num_instances: int,
    num_requests: int,
    hours: float,
    targets: Targets,
) -> None:
    """How long it takes to simulate a day of very many instances; writes NAME.json.

    Arrivals rise and fall by 80 % once over the time, lengths are drawn from the trace.
    """
    hardware, rng = hardware_of(model, device), random.Random(0)
    day = [1 + 0.8 * math.sin(math.tau * (part + 0.5) / _DAY_PARTS) for part in range(_DAY_PARTS)]
    lengths = read_requests(trace)
    arrivals = tidal(
        [
            replace(rng.choice(lengths), arrival_s=time_s)
            for time_s in sorted(rng.uniform(0, 3600 * hours) for _ in range(num_requests))
        ],
        day,
    )
    requests = online(arrivals, targets.ttft_slo_s, targets.tpot_slo_s)
    half = num_instances // 2
    cluster = Case(policy="slo", pools=(Pool.PREFILL,) * half + (Pool.DECODE,) * (num_instances - half)).cluster(
        hardware, targets, 0
    )
    began, cpu_began = time.perf_counter(), time.process_time()
    cluster.run(requests)
    host_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    busy = sum(instance.busy_s for instance in cluster.instances.values()) / num_instances / cluster.now
    raw = settings(model, device, hardware, num_instances) | {
        "trace": trace.name,
        "num_requests": num_requests,
        "simulated_s": cluster.now,
        "host_s": host_s,
        "cpu_s": cpu_s,
        "num_events": cluster.num_events,
        "busy_share": busy,
        "attainment": attainment(requests),
    }
    what = f"{num_instances} instances, {hours:g} h, {num_requests} requests"
    bars = [
        Bar(what=f"{what}: wall-clock", value=host_s / 60, unit="min"),
        Bar(what=f"{what}: time of one core", value=cpu_s / 60, unit="min"),
        Bar(what="time of one core per request", value=1e6 * cpu_s / num_requests, unit="us"),
    ]
    finish(make_record(name, command, seed=0, raw=raw, bars=bars), results)


def hardware_of(model: str, device: str) -> Hardware:
    return planned_hardware(
        model,
        device,
        kv_bytes_per_token=KV_BYTES_PER_TOKEN,
        kv_bytes=KV_BYTES,
        link_bytes_per_s=LINK_BYTES_PER_S,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
    )


def settings(model: str, device: str, hardware: Hardware, num_instances: int) -> dict[str, Any]:
    """What the figures hold for."""
    rules = ClusterRules(routing=RoutingRules())
    return {
        "model": model,
        "device": device,
        "num_instances": num_instances,
        "kv_tokens": hardware.kv_tokens,
        "link_bytes_per_s": hardware.link_bytes_per_s,
        "max_num_seqs": hardware.max_num_seqs,
        "max_num_batched_tokens": hardware.max_num_batched_tokens,
        "report_s": rules.report_s,
        "roles_s": rules.roles_s,
        "truth_factor": rules.truth_factor,
        "scheduling_policy": rules.order.policy,
    }


def _goodput(case: Case, trace: list[TraceRequest], hardware: Hardware, targets: Targets, seeds: int) -> Goodput:
    def measure(rate: float, seed: int) -> float:
        requests = online(scaled(trace, rate, seed), targets.ttft_slo_s, targets.tpot_slo_s)
        case.cluster(hardware, targets, seed).run(requests)
        return attainment(requests)

    return highest_rate(measure, lambda share: share >= ENOUGH, range(seeds), start=2.0 * len(case.pools))


def _role_bars(trace: str, found: dict[str, Goodput], ours: str, base: str, bar: float) -> list[Bar]:
    others = [case for case in found if case != ours]
    best = max(others, key=lambda case: found[case].median)
    return [
        Bar(
            what=f"{trace}: rate of {ours} over {case}",
            value=found[ours].median / max(found[case].median, 1e-9),
            unit="x",
            bar=f">= {bar:g}" if case == base else "",
        )
        for case in others
    ] + [
        Bar(
            what=f"{trace}: rate of {ours} over the best of the others",
            value=found[ours].median / max(found[best].median, 1e-9),
            unit="x",
        )
    ]
