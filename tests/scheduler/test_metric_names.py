"""The families of /metrics: named as Prometheus asks, and each moved by what it is named for."""

import re
from dataclasses import fields

from tests.scheduler.cluster.conftest import make_cluster as make_cluster
from tests.scheduler.metric_families import busy_metrics, families
from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.state import InstanceLoad
from xllm_compile.scheduler.cluster.stats import ClusterStats

UNITS_THAT_ARE_NOT_BASE = ("milliseconds", "microseconds", "ms", "kilobytes", "megabytes", "percent", "minutes")


async def test_names_follow_the_conventions():
    """What promtool's lint asks for."""
    found = list(families(busy_metrics(Cluster())))
    names = [family.name for family in found]
    assert len(names) == len(set(names))
    for family in found:
        assert re.fullmatch(r"xllm_[a-z0-9_]+", family.name), family.name
        assert family.documentation.strip() and family.documentation != family.name, family.name
        assert not set(family.name.split("_")) & set(UNITS_THAT_ARE_NOT_BASE), family.name
        assert family.type not in family.name.split("_"), family.name
        # The library takes _total off a counter's name and writes it into its samples.
        assert not family.name.endswith(("_total", "_count", "_sum", "_bucket")), family.name
        if family.type == "counter":
            samples = {sample.name.removesuffix("_created") for sample in family.samples}
            assert samples <= {f"{family.name}_total", family.name}, family.name
        for sample in family.samples:
            assert not {"le", "quantile"} & set(sample.labels) or family.type == "histogram", family.name


async def test_an_engines_families_show_its_numbers():
    metrics = busy_metrics(Cluster())
    still = [
        family.name for family in metrics.model.collect() if not any(sample.value > 0 for sample in family.samples)
    ]
    assert still == []


async def test_a_gateways_families_show_its_numbers(make_cluster):
    cluster = await make_cluster(a={}, b={})
    for field in fields(ClusterStats):
        setattr(cluster.cluster.stats, field.name, 1)
    load = InstanceLoad(
        num_running=1,
        num_waiting=2,
        num_waiting_tokens=3,
        num_decoding=4,
        num_offline=5,
        kv_tokens_used=6,
        ttft_s=0.7,
        tpot_s=0.8,
    )
    link = cluster.cluster.link("a")
    # No report comes in between: nothing below waits.
    link.load = load
    metrics = busy_metrics(cluster.cluster)
    still = {
        family.name for family in metrics.process.collect() if not any(sample.value > 0 for sample in family.samples)
    }
    # Nobody here says which KV it has.
    assert still == {"xllm_instance_kv_blocks"}
