"""Everything the page shows, as it stands at one moment; counters are totals."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.state import Instance, InstanceCounters
from xllm_compile.scheduler.finished_times import percentiles
from xllm_compile.scheduler.instance_load import instance_counters
from xllm_compile.scheduler.service import Service

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceReading:
    name: str
    incarnation: str = ""
    """Counters go on from what they were as long as it is the same."""
    pool: str
    health: str
    num_running: int
    num_decoding: int
    num_waiting: int
    num_offline: int
    kv_tokens_used: int
    kv_tokens_total: int
    ttft_s: float | None = None
    """Mean of the last seconds; likewise tpot_s."""
    tpot_s: float | None = None
    counters: InstanceCounters


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    instances: tuple[InstanceReading, ...]
    num_open: int
    """Generations open at this process."""
    ttft_s: tuple[float | None, ...]
    """PERCENTILES of what finished lately; likewise tpot_s."""
    tpot_s: tuple[float | None, ...]
    counters: Mapping[str, float]
    """Of the service as a whole: requests by outcome, targets met and missed, placements."""


def read_server(service: Service, now_s: float) -> Reading:
    """A process that computes by itself: each of its models shows as an instance."""
    return _reading(service, now_s, tuple(_of_model(each, now_s) for each in service.services))


def read_cluster(service: Service, cluster: Cluster, now_s: float) -> Reading:
    """A gateway's."""
    instances = tuple(_of_instance(each) for each in cluster.instances())
    return _reading(service, now_s, instances, {f"cluster_{key}": n for key, n in asdict(cluster.stats).items()})


def _reading(
    service: Service,
    now_s: float,
    instances: tuple[InstanceReading, ...],
    counters: Mapping[str, float] | None = None,
) -> Reading:
    models = [each.metrics for each in service.services]
    ttft_s = [seconds for each in models for seconds in each.ttft_times.recent(now_s)]
    tpot_s = [seconds for each in models for seconds in each.tpot_times.recent(now_s)]
    requests = {f"requests_{outcome}": n for outcome, n in service.metrics.num_requests().items()}
    targets: dict[str, float] = {}
    for each in models:
        for name, n in each.num_targets().items():
            targets[name] = targets.get(name, 0) + n
    return Reading(
        instances=instances,
        num_open=service.limiter.num_open,
        ttft_s=tuple(percentiles(ttft_s, PERCENTILES)),
        tpot_s=tuple(percentiles(tpot_s, PERCENTILES)),
        counters={**requests, **targets, **(counters or {})},
    )


def _of_instance(instance: Instance) -> InstanceReading:
    load = instance.load
    return InstanceReading(
        name=instance.name,
        incarnation=instance.info.incarnation,
        pool=instance.pool,
        health="draining" if load.is_draining and instance.health == "active" else instance.health,
        num_running=load.num_running,
        num_decoding=load.num_decoding,
        num_waiting=load.num_waiting,
        num_offline=load.num_offline,
        kv_tokens_used=load.kv_tokens_used,
        kv_tokens_total=instance.info.kv_tokens_total,
        ttft_s=load.ttft_s,
        tpot_s=load.tpot_s,
        counters=load.counters,
    )


def _of_model(service: Service, now_s: float) -> InstanceReading:
    stats = service.engine.stats()
    ttft_s, tpot_s = service.latency.means(now_s)
    return InstanceReading(
        name=service.model_name,
        pool="mix",
        health=_health(service),
        num_running=stats.num_running,
        num_decoding=stats.num_decoding,
        num_waiting=stats.num_waiting,
        num_offline=stats.num_offline_running + stats.num_offline_waiting,
        kv_tokens_used=stats.kv_tokens_used,
        kv_tokens_total=stats.kv_tokens_total,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        counters=instance_counters(stats),
    )


def _health(service: Service) -> str:
    if not service.engine.is_healthy:
        return "suspect"
    if service.is_draining:
        return "draining"
    return "asleep" if service.engine.is_sleeping else "active"
