"""Prometheus metrics of one serving process. Names follow vLLM's, prefixed xllm_."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xllm_compile.runtime.memory.kv_tiers import TierStats
from xllm_compile.runtime.outputs import (
    EngineStats,
    HandOverStats,
    RequestMetrics,
    ReservationStats,
    SpeculationStats,
)
from xllm_compile.scheduler.finished_times import FinishedTimes
from xllm_compile.scheduler.limits import StreamLimiter

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TPOT_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_E2E_S = (0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)

OUTCOMES = ("ok", "refused", "abort", "error")
"""How a generation request ended: refused is any 4xx and 503, abort a client that left, error any other 5xx."""
APIS = ("http", "grpc")
PROMOTION_EVENTS = ("compiled", "loaded", "failed", "evicted", "no_compiler")
FINISH_REASONS = ("stop", "length", "abort", "handed_over")


class ServiceMetrics:
    """Histograms are filled once per finished request; engine numbers are read from its stats at scrape time."""

    def __init__(self, stats: Callable[[], EngineStats], limiter: StreamLimiter) -> None:
        self.process = CollectorRegistry()
        """What is not of one model, and is counted where requests come in."""
        self.model = CollectorRegistry()
        self._ttft = self._histogram("xllm_time_to_first_token_seconds", "Arrival to first token", _TTFT_S)
        self._tpot = self._histogram(
            "xllm_time_per_output_token_seconds", "Mean gap between a request's tokens after the first", _TPOT_S
        )
        self._e2e = self._histogram("xllm_e2e_request_latency_seconds", "Arrival to last token", _E2E_S)
        self._requests = Counter(
            "xllm_requests", "Generation requests by how they ended", ["api", "outcome"], registry=self.process
        )
        self._finished = Counter(
            "xllm_request_finished", "Completions by finish reason", ["reason"], registry=self.model
        )
        self._slo = Counter(
            "xllm_slo_requests",
            "Finished requests that had a target, by target and outcome",
            ["target", "outcome"],
            registry=self.model,
        )
        self.ttft_times = FinishedTimes()
        self.tpot_times = FinishedTimes()
        # Series that exist from the start show as 0 instead of missing.
        for api in APIS:
            for outcome in OUTCOMES:
                self._requests.labels(api, outcome)
        for reason in FINISH_REASONS:
            self._finished.labels(reason)
        for target, outcome in product(("ttft", "tpot"), ("met", "missed")):
            self._slo.labels(target, outcome)
        self.process.register(_Streams(limiter))
        self.model.register(_Snapshot(stats))

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(name, text, buckets=tuple(buckets), registry=self.model)

    def observe(self, times: RequestMetrics, num_tokens: int) -> None:
        """Times of one finished engine request with completions of num_tokens."""
        if times.first_token_s is None or times.last_token_s is None:
            return
        if not times.is_resumed:
            ttft_s = times.first_token_s - times.arrival_s
            self._ttft.observe(ttft_s)
            self.ttft_times.add(times.last_token_s, ttft_s)
            self._count_slo("ttft", ttft_s, times.ttft_slo_s)
        self._e2e.observe(times.last_token_s - times.arrival_s)
        if num_tokens > 1:
            tpot_s = (times.last_token_s - times.first_token_s) / (num_tokens - 1)
            self._tpot.observe(tpot_s)
            self.tpot_times.add(times.last_token_s, tpot_s)
            self._count_slo("tpot", tpot_s, times.tpot_slo_s)

    def _count_slo(self, target: str, seconds: float, slo_s: float | None) -> None:
        if slo_s is not None:
            self._slo.labels(target, "met" if seconds <= slo_s else "missed").inc()

    def count_finished(self, reason: str) -> None:
        self._finished.labels(reason).inc()

    def count_request(self, api: str, outcome: str) -> None:
        self._requests.labels(api, outcome).inc()

    def num_requests(self) -> Mapping[str, float]:
        """By outcome, of all APIs."""
        return _totals(self._requests, "outcome")

    def num_targets(self) -> Mapping[str, float]:
        """Requests that had one, by target and outcome: ttft_met."""
        return _totals(self._slo, "target", "outcome")

    def register(self, collector: Collector) -> None:
        """Show what it has as well, of the process."""
        self.process.register(collector)


def _totals(counter: Counter, *labels: str) -> Mapping[str, float]:
    """A counter's values by these of its labels, joined by _."""
    totals: dict[str, float] = defaultdict(float)
    for metric in counter.collect():
        for sample in metric.samples:
            totals["_".join(sample.labels[label] for label in labels)] += sample.value
    return totals


def render(models: Mapping[str, ServiceMetrics]) -> bytes:
    """The text that Prometheus reads; with a label model_name where there are several models.

    Requests come in at the first one.
    """
    first = next(iter(models.values()))
    registry = first.model
    if len(models) > 1:
        registry = CollectorRegistry()
        registry.register(_ByModel(models))
    return generate_latest(first.process) + generate_latest(registry)


class _ByModel(Collector):
    """The metrics of several models, each family once."""

    def __init__(self, models: Mapping[str, ServiceMetrics]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for model_name, metrics in self._models.items():
            for metric in metrics.model.collect():
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    family.samples.append(sample._replace(labels={"model_name": model_name, **sample.labels}))
        yield from families.values()


class _Streams(Collector):
    """The limiter's state as of the scrape."""

    def __init__(self, limiter: StreamLimiter) -> None:
        self._limiter = limiter

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("xllm_open_streams", "Generations open over HTTP and gRPC", self._limiter.num_open)
        refused = self._limiter.num_refused
        yield CounterMetricFamily("xllm_streams_refused", "Generations refused by --max-streams", refused)


class _Snapshot(Collector):
    """The engine's state as of the scrape."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("xllm_num_requests_running", "Sequences in the running batch", stats.num_running)
        yield GaugeMetricFamily("xllm_num_requests_waiting", "Sequences waiting for a place", stats.num_waiting)
        usage = stats.kv_tokens_used / stats.kv_tokens_total if stats.kv_tokens_total else 0.0
        yield GaugeMetricFamily("xllm_kv_cache_usage_ratio", "Used part of the KV cache, 0 to 1", usage)
        yield GaugeMetricFamily("xllm_kv_cache_tokens_used", "Tokens in the KV cache", stats.kv_tokens_used)
        yield GaugeMetricFamily("xllm_kv_cache_tokens_capacity", "Tokens the KV cache can hold", stats.kv_tokens_total)
        pages = GaugeMetricFamily("xllm_kv_pages", "Physical pages of the KV cache by state", labels=["state"])
        for state, count in stats.kv_pages.items():
            pages.add_metric([state], count)
        yield pages
        queried, hit = stats.prefix_queried_tokens, stats.prefix_hit_tokens
        yield CounterMetricFamily("xllm_prefix_cache_queried_tokens", "Tokens looked up in the prefix cache", queried)
        yield CounterMetricFamily("xllm_prefix_cache_hit_tokens", "Tokens found there, not computed again", hit)
        if stats.kv_tiers is not None:
            yield from _of_tiers(stats.kv_tiers)
        yield CounterMetricFamily("xllm_engine_steps", "Steps the engine ran", stats.num_steps)
        yield CounterMetricFamily("xllm_step_seconds", "Time of steps on the device", stats.busy_s)
        yield CounterMetricFamily("xllm_step_gap_seconds", "Time the device waited for its next step", stats.gap_s)
        yield CounterMetricFamily("xllm_prompt_tokens", "Prompt tokens prefilled", stats.num_prompt_tokens)
        yield CounterMetricFamily("xllm_generation_tokens", "Tokens generated", stats.num_generated_tokens)
        yield CounterMetricFamily(
            "xllm_forced_tokens", "Of these what structured outputs forced, without a step", stats.num_forced_tokens
        )
        yield CounterMetricFamily("xllm_preemptions", "Sequences preempted", stats.num_preemptions)
        if stats.kv_swap_bytes is not None:
            swaps = stats.num_swaps
            yield CounterMetricFamily("xllm_swap_preemptions", "Of these, with the KV copied out and back", swaps)
            yield GaugeMetricFamily("xllm_kv_swap_bytes", "KV of preempted sequences on the host", stats.kv_swap_bytes)
        yield from _by_class(stats)
        error = stats.step_error_ratio
        yield GaugeMetricFamily("xllm_step_prediction_error_ratio", "Mean error of predicted step times", error)
        yield CounterMetricFamily("xllm_aborted_requests", "Engine requests aborted", stats.num_aborted)
        graphs = CounterMetricFamily(
            "xllm_graph_cache_steps", "Steps by how a graph was found and why", labels=["part", "outcome", "reason"]
        )
        for labels, count in sorted(stats.graph_cache.choices.items()):
            graphs.add_metric(labels, count)
        yield graphs
        promotions = CounterMetricFamily(
            "xllm_graph_promotions", "Graphs for hot step sizes, by what became of them", labels=["event"]
        )
        for event in PROMOTION_EVENTS:
            promotions.add_metric([event], stats.graph_cache.promotions.get(event, 0))
        yield promotions
        promoted = stats.graph_cache.promoted_bytes
        yield GaugeMetricFamily("xllm_graph_promoted_bytes", "Size of the promoted graphs in use", promoted)
        if stats.reservations is not None and stats.hand_overs is not None:
            yield from _transfers(stats.reservations, stats.hand_overs)
        if stats.speculation is not None:
            yield from _speculation(stats.speculation)


def _transfers(reservations: ReservationStats, hand_overs: HandOverStats) -> Iterator[Metric]:
    """KV from other instances, and to them."""
    yield GaugeMetricFamily("xllm_kv_reservations_open", "Sequences that KV is expected for", reservations.num_open)
    ended = CounterMetricFamily("xllm_kv_reservations", "Reservations, by what became of them", labels=["end"])
    for end in ("claimed", "released", "expired"):
        ended.add_metric([end], getattr(reservations, f"num_{end}"))
    yield ended
    yield GaugeMetricFamily("xllm_kv_hand_overs_open", "Sequences whose KV is being sent", hand_overs.num_open)
    sent = CounterMetricFamily("xllm_kv_hand_overs", "Sequences sent, by whether all arrived", labels=["end"])
    sent.add_metric(["complete"], hand_overs.num_complete)
    sent.add_metric(["failed"], hand_overs.num_failed)
    yield sent
    prefixes = CounterMetricFamily(
        "xllm_kv_prefixes_sent", "Cached prefixes sent to others, by whether they arrived", labels=["end"]
    )
    prefixes.add_metric(["complete"], hand_overs.num_prefixes)
    prefixes.add_metric(["failed"], hand_overs.num_failed_prefixes)
    yield prefixes
    yield CounterMetricFamily("xllm_kv_sent_bytes", "KV that arrived at other instances", hand_overs.num_bytes)


def _speculation(stats: SpeculationStats) -> Iterator[Metric]:
    yield CounterMetricFamily("xllm_spec_drafts", "Drafts verified", stats.num_drafts)
    yield CounterMetricFamily("xllm_spec_draft_tokens", "Tokens drafted", stats.num_draft_tokens)
    yield CounterMetricFamily("xllm_spec_accepted_tokens", "Drafted tokens accepted", stats.num_accepted_tokens)
    drafted = CounterMetricFamily(
        "xllm_spec_draft_tokens_per_pos", "Tokens drafted, by position in the draft", labels=["position"]
    )
    accepted = CounterMetricFamily(
        "xllm_spec_accepted_tokens_per_pos", "Drafted tokens accepted, by position in the draft", labels=["position"]
    )
    for position, counts in enumerate(zip(stats.drafted_by_position, stats.accepted_by_position, strict=True)):
        for family, count in zip((drafted, accepted), counts, strict=True):
            family.add_metric([str(position)], count)
    yield drafted
    yield accepted
    yield GaugeMetricFamily("xllm_spec_draft_length", "Mean tokens of the last drafts", stats.draft_length)


def _by_class(stats: EngineStats) -> Iterator[Metric]:
    """What online and offline requests have of the engine."""
    sequences = GaugeMetricFamily("xllm_sequences", "Sequences by class and state", labels=["class", "state"])
    sequences.add_metric(["online", "running"], stats.num_running - stats.num_offline_running)
    sequences.add_metric(["online", "waiting"], stats.num_waiting - stats.num_offline_waiting)
    sequences.add_metric(["offline", "running"], stats.num_offline_running)
    sequences.add_metric(["offline", "waiting"], stats.num_offline_waiting)
    yield sequences
    preempted = CounterMetricFamily("xllm_class_preemptions", "Sequences preempted, by class", labels=["class"])
    preempted.add_metric(["online"], stats.num_preemptions - stats.num_offline_preemptions)
    preempted.add_metric(["offline"], stats.num_offline_preemptions)
    yield preempted
    tokens = CounterMetricFamily("xllm_class_generation_tokens", "Tokens generated, by class", labels=["class"])
    tokens.add_metric(["online"], stats.num_generated_tokens - stats.num_offline_generated_tokens)
    tokens.add_metric(["offline"], stats.num_offline_generated_tokens)
    yield tokens
    yield CounterMetricFamily(
        "xllm_offline_held_back",
        "Times that a running offline sequence was left out of a step for online ones",
        stats.num_offline_held_back,
    )


def _of_tiers(tiers: TierStats) -> Iterator[Metric]:
    blocks = CounterMetricFamily(
        "xllm_kv_tier_blocks", "KV blocks below the pages, by what became of them", labels=["event"]
    )
    for event in ("offloaded", "restored", "written", "read", "stored", "fetched", "damaged", "dropped"):
        blocks.add_metric([event], getattr(tiers, f"num_{event}"))
    yield blocks
    sizes = GaugeMetricFamily("xllm_kv_tier_bytes", "KV below the pages, by where it lies", labels=["tier"])
    sizes.add_metric(["host"], tiers.host_bytes)
    sizes.add_metric(["disk"], tiers.disk_bytes)
    yield sizes
