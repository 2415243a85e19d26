"""Every metric family that any server can expose: engine numbers that are all there, and a gateway's."""

from collections.abc import Iterator
from dataclasses import fields

from prometheus_client.metrics_core import Metric

from xllm_compile.runtime.memory.kv_tiers import TierStats
from xllm_compile.runtime.outputs import (
    EngineStats,
    GraphCacheStats,
    HandOverStats,
    RequestMetrics,
    ReservationStats,
    SpeculationStats,
)
from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.cluster_metrics import ClusterCollector
from xllm_compile.scheduler.limits import StreamLimiter
from xllm_compile.scheduler.metrics import ServiceMetrics


def counting_up(kind: type, start: int) -> dict[str, int]:
    """A value of its own, above 0, for each number of a dataclass of stats."""
    names = [field.name for field in fields(kind) if "int" in str(field.type) or "float" in str(field.type)]
    plain = [name for name in names if "[" not in str(kind.__annotations__[name])]
    return {name: start + at for at, name in enumerate(plain)}


def busy_stats() -> EngineStats:
    """Of an engine that has done everything."""
    numbers = counting_up(EngineStats, 100) | {"num_offline_running": 1, "num_offline_waiting": 1}
    return EngineStats(
        **numbers,
        kv_pages={"free": 1},
        kv_tiers=TierStats(**counting_up(TierStats, 200)),
        graph_cache=GraphCacheStats(
            choices={("layers", "exact", "bucket"): 1}, promotions={"compiled": 1}, promoted_bytes=7
        ),
        speculation=SpeculationStats(
            num_drafts=3, drafted_by_position=[3, 2], accepted_by_position=[2, 1], draft_length=1.5
        ),
        reservations=ReservationStats(**counting_up(ReservationStats, 300)),
        hand_overs=HandOverStats(**counting_up(HandOverStats, 400)),
    )


def busy_metrics(cluster: Cluster) -> ServiceMetrics:
    limiter = StreamLimiter(8)
    limiter.num_open, limiter.num_refused = 1, 1
    metrics = ServiceMetrics(busy_stats, limiter)
    metrics.register(ClusterCollector(cluster))
    times = RequestMetrics(arrival_s=0.0, ttft_slo_s=1.0, tpot_slo_s=1.0)
    times.first_token_s, times.last_token_s = 0.5, 1.5
    metrics.observe(times, 5)
    metrics.count_finished("stop")
    metrics.count_request("http", "ok")
    return metrics


def families(metrics: ServiceMetrics) -> Iterator[Metric]:
    yield from metrics.process.collect()
    yield from metrics.model.collect()
