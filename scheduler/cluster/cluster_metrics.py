"""Prometheus metrics of a gateway: its instances as they last reported, and what became of placements."""

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.state import Health, Instance, Pool

_OF_INSTANCES: dict[str, tuple[str, Callable[[Instance], float | None]]] = {
    "xllm_instance_sequences_running": ("Sequences in steps", lambda each: each.load.num_running),
    "xllm_instance_sequences_waiting": ("Sequences that wait for a place", lambda each: each.load.num_waiting),
    "xllm_instance_waiting_tokens": ("Prompt tokens to be computed", lambda each: each.load.num_waiting_tokens),
    "xllm_instance_sequences_decoding": ("Sequences behind their first token", lambda each: each.load.num_decoding),
    "xllm_instance_sequences_offline": ("Sequences that are best effort", lambda each: each.load.num_offline),
    "xllm_instance_kv_tokens_used": ("Tokens in the KV cache", lambda each: each.load.kv_tokens_used),
    "xllm_instance_kv_tokens_capacity": ("Tokens the KV cache can hold", lambda each: each.info.kv_tokens_total),
    "xllm_instance_ttft_seconds": ("Mean time to first token, lately", lambda each: each.load.ttft_s),
    "xllm_instance_tpot_seconds": ("Mean time between tokens, lately", lambda each: each.load.tpot_s),
    "xllm_instance_report_age_seconds": ("Since the last report", lambda each: each.load_age_s),
}

_COUNTERS = {
    "xllm_placements": ("Requests placed on instances, anew ones included", "num_placed"),
    "xllm_placements_split": ("Of these, prefill and decode on two instances", "num_split"),
    "xllm_hand_overs": ("Requests that went from prefill to decode with their KV", "num_handed_over"),
    "xllm_placements_lost": ("Placements ended by the loss of an instance", "num_lost"),
    "xllm_placements_refused": ("Placements that the instance refused", "num_refused"),
    "xllm_kv_fetches": ("Prefixes that an instance was to send to another", "num_fetches"),
    "xllm_kv_fetches_failed": ("Of these, those that did not arrive whole", "num_failed_fetches"),
    "xllm_kv_fetched_tokens": ("Tokens of KV that arrived instead of being computed", "num_fetched_tokens"),
    "xllm_migrations": ("Offline requests that another instance took over while they decoded", "num_migrated"),
    "xllm_migrations_refused": ("Those that it had no room for after all", "num_migrations_refused"),
    "xllm_resumed_tokens": ("Tokens with which requests went on elsewhere", "num_resumed_tokens"),
}


class ClusterCollector(Collector):
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def collect(self) -> Iterator[Metric]:
        instances = self._cluster.instances()
        yield _by_state(instances)
        for name, (text, value) in _OF_INSTANCES.items():
            family = GaugeMetricFamily(name, text, labels=["instance"])
            for instance in instances:
                found = value(instance)
                if found is not None:
                    family.add_metric([instance.name], found)
            yield family
        blocks = GaugeMetricFamily(
            "xllm_instance_kv_blocks", "Blocks of KV that it says can be found there", labels=["instance"]
        )
        for name, count in self._cluster.kv.num_blocks_by_name().items():
            blocks.add_metric([name], count)
        yield blocks
        for name, (text, field) in _COUNTERS.items():
            yield CounterMetricFamily(name, text, getattr(self._cluster.stats, field))


def _by_state(instances: tuple[Instance, ...]) -> Metric:
    """Every pair, so that none is missing while it is 0."""
    counts = Counter((instance.pool, instance.health) for instance in instances)
    family = GaugeMetricFamily(
        "xllm_instances", "Instances by what they do and how they are", labels=["pool", "health"]
    )
    for pool in Pool:
        for health in Health:
            family.add_metric([pool, health], counts[pool, health])
    return family
