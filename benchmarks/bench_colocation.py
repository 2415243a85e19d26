"""How much offline work rides beside online work within its targets, in simulation. Nothing is run on a device.

How much more than the baselines depends on how full the service is: beside little online work all of them fill the
devices, and beside as much as it was built for the baselines have no place for any.
"""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.bench_simulate import Targets, hardware_of, settings
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.simulation.chart import curves_chart, page
from xllm_compile.benchmarks.simulation.cluster import Cluster, ClusterRules, attainment
from xllm_compile.benchmarks.simulation.goodput import Goodput, highest_rate
from xllm_compile.benchmarks.simulation.hardware import Hardware
from xllm_compile.benchmarks.simulation.requests import SimRequest, offline, online, read_requests, scaled, tidal
from xllm_compile.request_trace import TraceRequest, read_rates
from xllm_compile.runtime.policies.order import Order
from xllm_compile.scheduler.cluster.state import Pool
from xllm_compile.scheduler.policies.colocation import ColocationRules
from xllm_compile.scheduler.policies.routing import RoutingRules

MODES = ("base P/D", "online priority", "co-location")
# Online requests that may miss a target, and what they may miss without any offline one.
_VIOLATIONS, _VIOLATIONS_ALONE = 0.03, 0.01
# Offline requests a second that are tried first. The search gives up below 1/64 of it.
_FIRST_RATE = 4.0
# Offline requests are sustained when so many of them are finished so soon behind the last arrival.
_FINISHED, _GRACE_S = 0.97, 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Everything but the rates."""

    hardware: Hardware
    pools: tuple[Pool, ...]
    targets: Targets
    trace: list[TraceRequest]
    """Of online requests."""
    lengths: list[TraceRequest]
    """Of offline ones."""

    def serve(self, mode: str, online_rate: float, offline_rate: float, seed: int) -> list[SimRequest]:
        arrivals = online(scaled(self.trace, online_rate, seed), self.targets.ttft_slo_s, self.targets.tpot_slo_s)
        beside = offline(
            self.lengths,
            offline_rate,
            arrivals[-1].arrival_s,
            seed,
            first_number=len(arrivals),
            gives_way=mode != MODES[0],
        )
        is_colocated = mode == MODES[-1]
        rules = ClusterRules(
            # What the device does not get to waits: nobody is turned away.
            routing=RoutingRules(policy="slo", max_wait_s=math.inf, spreads_offline=is_colocated),
            colocation=ColocationRules(tpot_slo_s=self.targets.tpot_slo_s) if is_colocated else None,
            # By deadline what has no target would wait for all others, and the base is to know of no such thing.
            order=Order("fcfs"),
        )
        requests = sorted([*arrivals, *beside], key=lambda one: one.arrival_s)
        Cluster(hardware=self.hardware, pools=self.pools, rules=rules, seed=seed).run(requests)
        return requests


def violations(requests: Sequence[SimRequest]) -> float:
    """Share of online requests that missed a target; 1 where offline ones pile up."""
    until_s = requests[-1].arrival_s + _GRACE_S
    beside = [one for one in requests if one.ttft_slo_s is None]
    num_finished = sum(one.finished_s is not None and one.finished_s <= until_s for one in beside)
    return 1.0 if num_finished < _FINISHED * len(beside) else 1.0 - attainment(requests)


def most_offline_rate(setting: Setting, online_rate: float, grace_s: float = 0.0) -> float:
    """Offline requests a second beyond which no policy gets: with them the devices compute all the time, as cheaply as
    they can. grace_s: time behind the last arrival in which what waits may still be finished, but for those requests
    that need not be: the longest.
    """
    hardware, factor = setting.hardware, ClusterRules(routing=RoutingRules()).truth_factor

    def seconds_of(requests: Sequence[TraceRequest]) -> list[float]:
        return sorted(factor * hardware.least_s(one.prompt_tokens, one.output_tokens) for one in requests)

    seconds = len(setting.trace) / online_rate
    free_s = len(setting.pools) * (seconds + grace_s) - sum(seconds_of(setting.trace))
    each_s = seconds_of(setting.lengths)
    num_finished = math.ceil(_FINISHED * len(each_s)) if grace_s else len(each_s)
    return free_s / (seconds * sum(each_s[:num_finished]) / len(each_s))


def run_colocation(
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
    num_requests: int,
    lengths: Path,
    tide: Path | None,
    online_shares: Sequence[float],
) -> None:
    """Highest offline rates at 3 % online violations, of every mode on every trace; writes NAME.json and NAME.html.

    Online requests come at each of these shares of the rate that the base sustains without any offline one. The first
    trace comes once more with its arrivals moved by the day of ``tide``, a ServeGen trace.
    """
    half = num_instances // 2
    workloads = {path.stem: read_requests(path, num_requests) for path in traces}
    rates = read_rates(tide) if tide else []
    if rates:
        workloads = {f"{traces[0].stem}, tidal": tidal(workloads[traces[0].stem], rates)} | workloads
    figures: dict[str, Any] = {}
    bars: list[Bar] = []
    charts: list[str] = []
    hardware = hardware_of(model, device)
    for what, trace in workloads.items():
        setting = Setting(
            hardware=hardware,
            pools=(Pool.PREFILL,) * half + (Pool.DECODE,) * (num_instances - half),
            targets=targets,
            trace=trace,
            lengths=read_requests(lengths),
        )
        alone = _online_goodput(setting, float(num_instances)).median
        say(f"{what}: {alone:.2f} online requests/s without offline ones")
        cases = [(share, mode) for share in online_shares for mode in MODES]
        with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            search = partial(_offline_goodput, setting=setting, online_rate=alone, seeds=seeds)
            found = dict(zip(cases, pool.map(search, cases), strict=True))
        by_share = {share: {mode: found[share, mode] for mode in MODES} for share in online_shares}
        full = {share: _devices_full(setting, share * alone) for share in online_shares}
        figures[what] = {"online requests/s without offline ones": alone} | {
            f"{share:.0%} of them": {
                "devices full, steady": full[share][0],
                "devices full, with the time behind the last arrival": full[share][1],
            }
            | {mode: one.to_json() for mode, one in modes.items()}
            for share, modes in by_share.items()
        }
        for share, modes in by_share.items():
            bars += _bars(f"{what}, {share:.0%} online", modes, *full[share], is_tidal=what.endswith("tidal"))
        curves = {mode: [(share, by_share[share][mode].median) for share in online_shares] for mode in MODES}
        curves["devices full"] = [(share, full[share][0]) for share in online_shares]
        charts.append(curves_chart(f"{what}: offline requests/s", "share of the online rate sustained alone", curves))
        show_table(
            f"{what}: offline requests/s, {_VIOLATIONS:.0%} of online ones late at most",
            ("online", *MODES, "devices full"),
            [
                (f"{share:.0%}", *(f"{one.median:.2f}" for one in modes.values()), f"{full[share][0]:.2f}")
                for share, modes in by_share.items()
            ],
        )
    raw = settings(model, device, hardware, num_instances) | {
        "scheduling_policy": "fcfs",
        "pools": f"{half}P{num_instances - half}D",
        "targets": asdict(targets),
        "offline lengths": lengths.stem,
        "tide": {"trace": tide.name, "rates": rates} if tide else None,
        "seeds": seeds,
        "num_requests": num_requests,
        "violations": _VIOLATIONS,
        "online_shares": list(online_shares),
        "rules": asdict(ColocationRules(tpot_slo_s=targets.tpot_slo_s)),
        "workloads": figures,
    }
    finish(make_record(name, command, seed=0, raw=raw, bars=bars), results)
    (results / f"{name}.html").write_text(page(charts))


def _online_goodput(setting: Setting, start: float) -> Goodput:
    """Of the base without offline requests."""
    return highest_rate(
        lambda rate, seed: violations(setting.serve(MODES[0], rate, 0.0, seed)),
        lambda share: share <= _VIOLATIONS_ALONE,
        (0,),
        start=start,
        precision=0.05,
    )


def _offline_goodput(case: tuple[float, str], setting: Setting, online_rate: float, seeds: int) -> Goodput:
    """case: share of the online rate, and the mode."""
    share, mode = case
    return highest_rate(
        lambda rate, seed: violations(setting.serve(mode, share * online_rate, rate, seed)),
        lambda share: share <= _VIOLATIONS,
        range(seeds),
        start=_FIRST_RATE,
        precision=0.05,
    )


def _devices_full(setting: Setting, online_rate: float) -> tuple[float, float]:
    """Offline requests a second that no policy exceeds: steady, and with the time behind the last arrival."""
    return most_offline_rate(setting, online_rate), most_offline_rate(setting, online_rate, _GRACE_S)


def _bars(what: str, found: Mapping[str, Goodput], steady: float, most: float, *, is_tidal: bool) -> list[Bar]:
    """Beside what was reached, what any policy could: the ratios to baselines end where the devices are full."""
    # What sustains not even the lowest rate tried is taken to sustain that one.
    base, priority, ours = (max(found[mode].median, _FIRST_RATE / 64) for mode in MODES)
    return [
        Bar(
            what=f"{what}: offline requests/s, {MODES[2]} over {MODES[0]}",
            value=ours / base,
            unit="x",
            bar=">= 3" if is_tidal else ">= 1.17",
        ),
        Bar(
            what=f"{what}: offline requests/s, {MODES[2]} over {MODES[1]}",
            value=ours / priority,
            unit="x",
            bar=">= 3" if is_tidal else ">= 1.75",
        ),
        Bar(what=f"{what}: the most that any policy could reach over {MODES[0]}", value=most / base, unit="x"),
        Bar(what=f"{what}: the most that any policy could reach over {MODES[1]}", value=most / priority, unit="x"),
        Bar(
            what=f"{what}: offline requests/s, {MODES[2]} over those that fill the devices",
            value=100 * ours / steady,
            unit="%",
            bar=">= 90",
        ),
    ]
