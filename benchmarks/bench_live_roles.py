"""What dynamic roles are worth live: the rate that a service sustains with them, with fixed pools, and in turns.

Every case is four slowed-down instances of demo-code behind a gateway, asked over HTTP. The same two stretches of the
trace are played in all of them, at rates around what the simulator foretells for them; how they differ tells how far a
rate can be trusted.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.artifacts import artifact_of_demo
from xllm_compile.benchmarks.bench_validate import (
    ENOUGH,
    ROLES,
    LiveSetting,
    Served,
    figures_of_live,
    highest_simulated,
    measure,
    sampled_profile,
    shrunk,
    simulate,
    sustained,
    window,
)
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.live_cluster import LiveCluster, Replay
from xllm_compile.benchmarks.load import ForeignLoad
from xllm_compile.benchmarks.rate_search import bracket, crossing
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.simulation.chart import attainment_chart, page, timeline_chart
from xllm_compile.benchmarks.simulation.cluster import Cluster, ClusterRules
from xllm_compile.benchmarks.simulation.hardware import Hardware
from xllm_compile.benchmarks.simulation.requests import SimRequest, read_requests
from xllm_compile.request_trace import TraceRequest
from xllm_compile.scheduler.policies.roles import RoleRules
from xllm_compile.scheduler.policies.routing import PolicyName, RoutingRules

OURS = "dynamic SLO-aware"
_STRETCHES = 2
_EQUAL = 0.97


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveCase:
    routing: PolicyName
    roles: tuple[str, ...]
    is_dynamic: bool = False

    def rules(self, setting: LiveSetting) -> ClusterRules:
        """Of the simulation."""
        roles = RoleRules(ttft_slo_s=setting.ttft_slo_s, tpot_slo_s=setting.tpot_slo_s) if self.is_dynamic else None
        return ClusterRules(routing=RoutingRules(policy=self.routing), roles=roles, truth_factor=1.0)


CASES = {
    "round robin, 2P2D": LiveCase(routing="round_robin", roles=ROLES),
    "minimal load, 2P2D": LiveCase(routing="load", roles=ROLES),
    OURS: LiveCase(routing="slo", roles=("mix",) * len(ROLES), is_dynamic=True),
}


@dataclass(slots=True)
class Search:
    """Of one case on one trace: shares of requests that met both targets, by rate."""

    expected: float
    """Requests a second, as simulated."""
    stretches: list[dict[float, float]] = field(default_factory=lambda: [{} for _ in range(_STRETCHES)])

    @property
    def rates(self) -> list[float]:
        """Sustained, by stretch."""
        return [crossing(points, ENOUGH) for points in self.stretches]

    @property
    def rate(self) -> float:
        return crossing(self.points, ENOUGH)

    @property
    def points(self) -> dict[float, float]:
        """All stretches together."""
        tried = sorted(self.stretches[0])
        return {rate: statistics.mean(points[rate] for points in self.stretches) for rate in tried}

    def to_json(self) -> dict[str, Any]:
        return {
            "simulated": self.expected,
            "live": self.rate,
            "by_stretch": self.rates,
            "points": [[rate, *(points[rate] for points in self.stretches)] for rate in sorted(self.stretches[0])],
        }


@dataclass(kw_only=True, slots=True)
class _Timelines:
    live: list[tuple[float, int, int]]
    simulated: list[tuple[float, int, int]]
    end_s: float
    num_flips: int
    num_simulated_flips: int


def run_live_roles(
    traces: Sequence[Path],
    work_dir: Path,
    results: Path,
    command: Sequence[str],
    *,
    name: str,
    setting: LiveSetting,
    seconds: float,
    least_requests: int,
    max_tries: int,
) -> None:
    """seconds: about those of a stretch of arrivals; it has least_requests at the least. max_tries: rates of each case
    and trace. Writes NAME.json and NAME.html."""
    say("compiling demo-code")
    artifact = artifact_of_demo(work_dir)
    workloads = {path.stem: shrunk(read_requests(path), setting.shrink, artifact) for path in traces}
    say("the steps of one instance")
    profile, samples = sampled_profile(artifact, setting)
    hardware: Hardware | None = None
    stretches: dict[str, list[Sequence[TraceRequest]]] = {}
    found: dict[str, dict[str, Search]] = {stem: {} for stem in workloads}
    timelines: dict[str, _Timelines] = {}
    with ForeignLoad() as foreign:
        for case_name, case in CASES.items():
            say(f"{case_name}: starting")
            gateway_options = [*setting.gateway_options(case.routing), *(["--dynamic-roles"] * case.is_dynamic)]
            with LiveCluster(
                artifact, case.roles, gateway_options=gateway_options, instance_options=setting.instance_options()
            ) as cluster:
                if hardware is None:
                    say("the ways of an idle service")
                    measured = measure(cluster, artifact, profile, samples, setting)
                    hardware = measured.hardware
                    for stem, trace in workloads.items():
                        rate = sustained(trace, seconds, hardware, setting, least_requests=least_requests)
                        count = max(least_requests, round(rate * seconds))
                        stretches[stem] = [trace[at * count : (at + 1) * count] for at in range(_STRETCHES)]
                for stem in workloads:
                    player = _Player(cluster, stretches[stem], case, hardware, setting)
                    found[stem][case_name] = player.search(f"{stem}, {case_name}", max_tries)
                    if case.is_dynamic:
                        timelines[stem] = player.timelines(found[stem][case_name].rate)
    bars, charts = [], []
    for stem, searches in found.items():
        bars += _bars(stem, searches)
        curves = {case: sorted(search.points.items()) for case, search in searches.items()}
        charts.append(attainment_chart(f"{stem}: requests that met both targets, live", curves, ENOUGH))
        lines = timelines[stem]
        charts.append(timeline_chart(f"{stem}: live instances at the rate of dynamic roles", lines.live, lines.end_s))
        charts.append(timeline_chart(f"{stem}: simulated, the same arrivals", lines.simulated, lines.end_s))
    _show(found, setting)
    raw = {
        "setting": asdict(setting),
        "instance_options": setting.instance_options(),
        "num_requests": {stem: [len(stretch) for stretch in both] for stem, both in stretches.items()},
        "measured": measured.to_json(),
        "traces": {stem: {case: one.to_json() for case, one in searches.items()} for stem, searches in found.items()},
        "timelines": {stem: asdict(lines) for stem, lines in timelines.items()},
        "foreign_cores": foreign.cores,
    }
    finish(make_record(name, command, seed=setting.seed, raw=raw, bars=bars), results)
    (results / f"{name}.html").write_text(page(charts))


class _Player:
    """Plays stretches of one trace to one live case."""

    def __init__(
        self,
        cluster: LiveCluster,
        stretches: Sequence[Sequence[TraceRequest]],
        case: LiveCase,
        hardware: Hardware,
        setting: LiveSetting,
    ) -> None:
        self._cluster, self._stretches, self._case = cluster, stretches, case
        self._hardware, self._setting = hardware, setting
        self._replays: dict[float, Replay] = {}

    def simulated(self) -> float:
        """The rate that the simulator foretells for these stretches."""

        def measure(rate: float) -> float:
            runs = [self._simulate(self._arrivals(stretch, rate)) for stretch in self._stretches]
            return statistics.mean(served.attainment for served, _ in runs)

        return highest_simulated(measure)

    def search(self, what: str, max_tries: int) -> Search:
        search = Search(expected=self.simulated())

        def measure(rate: float) -> float:
            for stretch, points in zip(self._stretches, search.stretches, strict=True):
                points[rate], self._replays[rate] = self._play(stretch, rate)
            share = search.points[rate]
            say(f"{what}: {share:.1%} met at {rate:.2f} requests/s")
            return share

        bracket(measure, ENOUGH, start=search.expected, max_tries=max_tries)
        return search

    def timelines(self, rate: float) -> _Timelines:
        """Who did what live on the last stretch, at the rate that was tried next to this one, and in simulation."""
        tried = min(self._replays, key=lambda other: abs(math.log(other / rate)))
        replay = self._replays[tried]
        _, simulated = self._simulate(self._arrivals(self._stretches[-1], tried))
        return _Timelines(
            live=replay.timeline,
            simulated=simulated.timeline,
            end_s=max(replay.ended_s - replay.began_s, simulated.now),
            num_flips=replay.num_flips,
            num_simulated_flips=simulated.num_flips,
        )

    def _play(self, stretch: Sequence[TraceRequest], rate: float) -> tuple[float, Replay]:
        arrivals = self._arrivals(stretch, rate)
        replay = self._cluster.replay(arrivals, seed=self._setting.seed)
        return figures_of_live(arrivals, replay).attainment, replay

    def _simulate(self, arrivals: Sequence[SimRequest]) -> tuple[Served, Cluster]:
        return simulate(arrivals, self._hardware, self._setting, self._case.rules(self._setting))

    def _arrivals(self, stretch: Sequence[TraceRequest], rate: float) -> list[SimRequest]:
        return window(stretch, rate, len(stretch) / rate, self._setting)


def _bars(stem: str, searches: Mapping[str, Search]) -> list[Bar]:
    ours, bars = searches[OURS], []
    for case, other in searches.items():
        if case == OURS:
            continue
        by_stretch = [mine / max(theirs, 1e-9) for mine, theirs in zip(ours.rates, other.rates, strict=True)]
        spread = max(by_stretch) - min(by_stretch)
        limit = _EQUAL if spread >= 1 - _EQUAL else 1.0
        bars.append(
            Bar(
                what=f"{stem}: rate of {OURS} over {case} (stretches differ by {spread:.2f})",
                value=ours.rate / max(other.rate, 1e-9),
                unit="x",
                bar=f">= {limit:g}",
            )
        )
    return bars


def _show(found: Mapping[str, Mapping[str, Search]], setting: LiveSetting) -> None:
    for stem, searches in found.items():
        show_table(
            f"{stem}: requests/s of which {ENOUGH:.0%} meet TTFT {setting.ttft_slo_s:g} s and TPOT "
            f"{setting.tpot_slo_s:g} s",
            ("policy", "live", "by stretch", "simulated"),
            [
                (case, f"{one.rate:.2f}", ", ".join(f"{rate:.2f}" for rate in one.rates), f"{one.expected:.2f}")
                for case, one in searches.items()
            ],
        )
