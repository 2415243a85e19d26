"""The simulator held against a live service: the same arrivals through both, on the step times of one live instance.

The live service is xllm-serve, a gateway and four slowed-down instances of demo-code on this machine, asked over HTTP.
The simulator gets what was measured of one instance's steps and of an idle service's ways, and nothing else.

Where a request goes turns on milliseconds, and where the next ones go on that: the medians of two live runs on the same
arrivals were 25 % apart. So there are several runs of both, and their requests are taken together.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from xllm_compile.benchmarks.artifacts import artifact_of_demo
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.live_calibration import Calibration, calibrate, hardware_of
from xllm_compile.benchmarks.live_cluster import LiveCluster, Replay
from xllm_compile.benchmarks.load import ForeignLoad
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.simulation.cluster import Cluster, ClusterRules
from xllm_compile.benchmarks.simulation.goodput import highest_rate
from xllm_compile.benchmarks.simulation.hardware import Hardware
from xllm_compile.benchmarks.simulation.requests import SimRequest, online, read_requests, scaled
from xllm_compile.benchmarks.simulation.step_samples import StepSample, fit_errors, fit_profile, sample_steps
from xllm_compile.benchmarks.timing import percentile
from xllm_compile.request_trace import TraceRequest
from xllm_compile.runtime.artifact import read_manifest
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.scheduler.cluster.state import Pool, StepProfile
from xllm_compile.scheduler.policies.routing import RoutingRules

POOLS = (Pool.PREFILL, Pool.PREFILL, Pool.DECODE, Pool.DECODE)
ROLES = ("prefill", "prefill", "decode", "decode")
_MAX_NUM_SEQS = 64
_KV_BYTES = 512 << 20
_APART = 1.15
ENOUGH = 0.9
_PERCENTS = (50, 90)
# Simulated runs on the same arrivals, which take a moment each.
_NUM_SIMULATED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveSetting:
    """What live services are run with."""

    slow_down: float
    shrink: int
    """Prompts and outputs of a trace are so many times shorter: demo-code takes 2048 tokens."""
    ttft_slo_s: float
    tpot_slo_s: float
    repeats: int
    """Of what is measured for the simulator."""
    seed: int

    def instance_options(self) -> list[str]:
        return [
            *("--threads", "1", "--slow-down", f"{self.slow_down:g}", "--max-num-seqs", str(_MAX_NUM_SEQS)),
            *("--kv-memory", str(_KV_BYTES), "--no-prefix-cache", "--no-graph-promotion", *self.targets()),
        ]

    def gateway_options(self, routing: str) -> list[str]:
        return ["--routing", routing, *self.targets()]

    def targets(self) -> list[str]:
        return [
            *("--ttft-slo-ms", f"{1e3 * self.ttft_slo_s:g}"),
            *("--tpot-slo-ms", f"{1e3 * self.tpot_slo_s:g}"),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the simulator runs on, and where it is from."""

    profile: StepProfile
    samples: Sequence[StepSample]
    calibration: Calibration
    hardware: Hardware

    def to_json(self) -> dict[str, Any]:
        return {
            "profile": asdict(self.profile),
            "samples": [[list(sample.load), sample.seconds] for sample in self.samples],
            "profile_error_median": percentile(sorted(fit_errors(self.profile, self.samples)), 50),
            "calibration": self.calibration.to_json(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """Figures of one run or of several, live or simulated. Seconds; TPOT is of requests with two tokens and more."""

    ttft_s: list[float]
    tpot_s: list[float]
    tokens_per_s: float
    num_failed: int
    attainment: float

    def to_json(self) -> dict[str, Any]:
        return {
            "ttft_s": {str(percent): percentile(self.ttft_s, percent) for percent in _PERCENTS},
            "tpot_s": {str(percent): percentile(self.tpot_s, percent) for percent in _PERCENTS},
            "tokens_per_s": self.tokens_per_s,
            "num_failed": self.num_failed,
            "attainment": self.attainment,
        }


def together(runs: Sequence[Served]) -> Served:
    """Of runs on the same arrivals."""
    return Served(
        ttft_s=sorted(chain.from_iterable(run.ttft_s for run in runs)),
        tpot_s=sorted(chain.from_iterable(run.tpot_s for run in runs)),
        tokens_per_s=fmean(run.tokens_per_s for run in runs),
        num_failed=sum(run.num_failed for run in runs),
        attainment=fmean(run.attainment for run in runs),
    )


def run_validate(
    traces: Sequence[Path],
    work_dir: Path,
    results: Path,
    command: Sequence[str],
    *,
    name: str,
    setting: LiveSetting,
    shares: Sequence[float],
    seconds: float,
    least_requests: int,
    num_plays: int,
) -> None:
    """shares: of the rate at which the simulated service still keeps the targets of 90 %; seconds: of arrivals at each.

    They go on until there are least_requests, of which medians can be told. The live service is sent them num_plays
    times, one after the other. Writes NAME.json.
    """
    say("compiling demo-code")
    artifact = artifact_of_demo(work_dir)
    workloads = {path.stem: shrunk(read_requests(path), setting.shrink, artifact) for path in traces}
    say("the steps of one instance")
    profile, samples = sampled_profile(artifact, setting)
    figures: dict[str, Any] = {}
    bars: list[Bar] = []
    options = setting.instance_options()
    with (
        LiveCluster(
            artifact, ROLES, gateway_options=setting.gateway_options("slo"), instance_options=options
        ) as cluster,
        ForeignLoad() as foreign,
    ):
        say("the ways of an idle service")
        measured = measure(cluster, artifact, profile, samples, setting)
        for stem, trace in workloads.items():
            most = sustained(trace, seconds, measured.hardware, setting, least_requests=least_requests)
            for share in shares:
                rate = share * most
                say(f"{stem} at {rate:.2f} requests/s")
                live_runs, simulated_runs = [], []
                for _ in range(num_plays):
                    arrivals = window(trace, rate, seconds, setting, least_requests)
                    live_runs.append(figures_of_live(arrivals, cluster.replay(arrivals, seed=setting.seed)))
                for seed in range(_NUM_SIMULATED):
                    arrivals = window(trace, rate, seconds, setting, least_requests)
                    simulated_runs.append(simulate(arrivals, measured.hardware, replace(setting, seed=seed))[0])
                live, simulated = together(live_runs), together(simulated_runs)
                figures[f"{stem}, {share:.0%} load"] = {
                    "requests/s": rate,
                    "num_requests": len(arrivals),
                    "live": live.to_json(),
                    "live runs": [run.to_json() for run in live_runs],
                    "simulated": simulated.to_json(),
                    "simulated runs": [run.to_json() for run in simulated_runs],
                }
                bars += _bars(f"{stem}, {share:.0%} load", live, simulated)
    _show(figures)
    raw = {
        "setting": asdict(setting),
        "pools": "2P2D",
        "routing": "slo",
        "instance_options": options,
        "seconds": seconds,
        "least_requests": least_requests,
        "measured": measured.to_json(),
        "runs": figures,
        "foreign_cores": foreign.cores,
    }
    finish(make_record(name, command, seed=setting.seed, raw=raw, bars=bars), results)


def shrunk(trace: Sequence[TraceRequest], factor: int, artifact: Path) -> list[TraceRequest]:
    """With lengths divided by the factor, rounded up, and cut where the model takes no more."""
    longest = read_manifest(artifact).model.max_model_len

    def one(request: TraceRequest) -> TraceRequest:
        num_output_tokens = min(-(-request.output_tokens // factor), longest // 2)
        num_prompt_tokens = min(-(-request.prompt_tokens // factor), longest - num_output_tokens)
        return TraceRequest(request.arrival_s, num_prompt_tokens, num_output_tokens)

    return [one(request) for request in trace]


def sampled_profile(artifact: Path, setting: LiveSetting) -> tuple[StepProfile, list[StepSample]]:
    config = InstanceConfig(
        max_num_seqs=_MAX_NUM_SEQS,
        kv_memory_bytes=_KV_BYTES,
        prefix_cache=False,
        async_scheduling=False,
        warm_up=True,
        slow_down=setting.slow_down,
    )
    samples = sample_steps(artifact, config, repeats=setting.repeats, seed=setting.seed)
    return fit_profile(samples), samples


def measure(
    cluster: LiveCluster,
    artifact: Path,
    profile: StepProfile,
    samples: Sequence[StepSample],
    setting: LiveSetting,
) -> Measured:
    """Of a cluster of ROLES that nobody uses."""
    found = calibrate(cluster, profile, num_decodes=2, seed=setting.seed)
    say(", ".join(f"{key} {value:.4g}" for key, value in found.to_json().items()))
    hardware = hardware_of(cluster, profile, found, read_manifest(artifact).max_num_batched_tokens)
    return Measured(profile=profile, samples=samples, calibration=found, hardware=hardware)


def sustained(
    trace: Sequence[TraceRequest],
    seconds: float,
    hardware: Hardware,
    setting: LiveSetting,
    rules: ClusterRules | None = None,
    least_requests: int = 2,
) -> float:
    """Requests a second of which nine in ten meet both targets, in simulation."""

    def measure(rate: float) -> float:
        return simulate(window(trace, rate, seconds, setting, least_requests), hardware, setting, rules)[0].attainment

    return highest_simulated(measure)


def highest_simulated(measure: Callable[[float], float]) -> float:
    """Requests a second up to which the share of them that meet both targets, by measure, is enough."""
    return highest_rate(
        lambda rate, _: measure(rate), lambda share: share >= ENOUGH, (0,), start=2.0, precision=0.05
    ).median


def window(
    trace: Sequence[TraceRequest], rate: float, seconds: float, setting: LiveSetting, least_requests: int = 2
) -> list[SimRequest]:
    """The first requests of the trace, scaled in time to so many a second: those of so many seconds, but the least."""
    start_s = trace[0].arrival_s or 0.0
    count = max(least_requests, round(rate * seconds))
    first = [replace(one, arrival_s=(one.arrival_s or 0.0) - start_s) for one in trace[:count]]
    arrivals = online(scaled(first, rate, 0), setting.ttft_slo_s, setting.tpot_slo_s)
    for one in arrivals:
        one.max_output_tokens = one.num_output_tokens
    return arrivals


def simulate(
    arrivals: Sequence[SimRequest], hardware: Hardware, setting: LiveSetting, rules: ClusterRules | None = None
) -> tuple[Served, Cluster]:
    rules = rules or ClusterRules(routing=RoutingRules(policy="slo"), truth_factor=1.0)
    cluster = Cluster(hardware=hardware, pools=POOLS, rules=rules, seed=setting.seed)
    cluster.run(arrivals)
    served = [one for one in arrivals if one.first_token_s is not None]
    figures = Served(
        ttft_s=sorted(one.first_token_s - one.arrival_s for one in served if one.first_token_s is not None),
        tpot_s=sorted(one.tpot_s for one in served if one.num_output_tokens > 1),
        tokens_per_s=sum(one.num_output_tokens for one in served) / cluster.now,
        num_failed=len(arrivals) - len(served),
        attainment=sum(one.is_met for one in arrivals) / len(arrivals),
    )
    return figures, cluster


def figures_of_live(arrivals: Sequence[SimRequest], replay: Replay) -> Served:
    """Notes first tokens and ends in the arrivals, as the simulation does."""
    for one, result in zip(arrivals, replay.results, strict=True):
        if result.error is not None:
            one.is_refused = True
            continue
        one.first_token_s = result.token_times[0] - replay.began_s
        one.finished_s = result.token_times[-1] - replay.began_s
    served = [one for one in arrivals if one.first_token_s is not None]
    return Served(
        ttft_s=sorted(one.ttft_s for one in served if one.ttft_s is not None),
        tpot_s=sorted(one.tpot_s for one in served if one.num_output_tokens > 1),
        tokens_per_s=sum(one.num_output_tokens for one in served) / (replay.ended_s - replay.began_s),
        num_failed=len(arrivals) - len(served),
        attainment=sum(one.is_met for one in arrivals) / len(arrivals),
    )


def _bars(what: str, live: Served, simulated: Served) -> list[Bar]:
    bars = [Bar(what=f"{what}: requests that failed live", value=live.num_failed, unit="", bar="<= 0")]
    for percent in _PERCENTS:
        for metric in ("ttft_s", "tpot_s"):
            ratio = percentile(getattr(simulated, metric), percent) / percentile(getattr(live, metric), percent)
            bars.append(_bar(f"{what}: {metric[:4].upper()} p{percent}", ratio, percent == _PERCENTS[0]))
    bars.append(_bar(f"{what}: tokens/s", simulated.tokens_per_s / live.tokens_per_s, True))
    return bars


def _bar(what: str, ratio: float, has_bar: bool) -> Bar:
    """However the two are apart."""
    return Bar(
        what=f"{what}, simulated and live apart by",
        value=max(ratio, 1 / ratio),
        unit="x",
        bar=f"<= {_APART}" if has_bar else "",
    )


def _show(figures: dict[str, Any]) -> None:
    rows = []
    for what, run in figures.items():
        for kind in ("live", "simulated"):
            found = run[kind]
            cells = [f"{1e3 * found[key][str(percent)]:.1f}" for key in ("ttft_s", "tpot_s") for percent in _PERCENTS]
            rows.append((f"{what}: {kind}", *cells, f"{found['tokens_per_s']:.1f}", f"{found['attainment']:.3f}"))
    columns = ("run", "TTFT p50, ms", "p90", "TPOT p50, ms", "p90", "tokens/s", "targets met")
    show_table("the same arrivals, live and simulated", columns, rows)
