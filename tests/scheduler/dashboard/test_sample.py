import json

from xllm_compile.scheduler.cluster.state import InstanceCounters
from xllm_compile.scheduler.dashboard.reading import InstanceReading, Reading
from xllm_compile.scheduler.dashboard.sample import INSTANCE_FIELDS, Sampler


def instance(name: str, incarnation: str = "1", **counters: int) -> InstanceReading:
    return InstanceReading(
        name=name,
        incarnation=incarnation,
        pool="decode",
        health="active",
        num_running=3,
        num_decoding=2,
        num_waiting=1,
        num_offline=0,
        kv_tokens_used=10,
        kv_tokens_total=40,
        ttft_s=0.05,
        counters=InstanceCounters(**counters),
    )


def reading(*instances: InstanceReading, **counters: float) -> Reading:
    return Reading(instances=instances, num_open=2, ttft_s=(0.1, None, None), tpot_s=(None,) * 3, counters=counters)


def samples(*readings: Reading, period_s: float = 2.0) -> list[dict]:
    sampler = Sampler()
    return [json.loads(sampler.sample(each, now_s=at * period_s, wall_s=1e9 + at)) for at, each in enumerate(readings)]


def row(sample: dict, name: str) -> dict:
    return dict(zip(INSTANCE_FIELDS, sample["instances"][name], strict=True))


def test_counters_show_as_rates_and_gauges_as_they_are():
    first, second = samples(
        reading(instance("a", num_generated_tokens=100), requests_ok=5),
        reading(instance("a", num_generated_tokens=300), requests_ok=6),
    )
    assert first["service"]["requests_ok"] is None and row(first, "a")["tokens_per_s"] is None
    assert second["service"]["requests_ok"] == 0.5
    assert second["service"]["num_generated_tokens"] == 100
    assert row(second, "a")["tokens_per_s"] == 100
    assert (second["service"]["ttft_ms_p50"], second["service"]["ttft_ms_p95"]) == (100, None)
    assert (row(second, "a")["kv_used"], row(second, "a")["ttft_ms"], second["at"]) == (10, 50, 1e9 + 1)


def test_a_restarted_or_new_instance_brings_nothing_of_before():
    _, second, third = samples(
        reading(instance("a", num_generated_tokens=100)),
        reading(instance("a", "2", num_generated_tokens=50), instance("b", num_generated_tokens=900)),
        reading(instance("a", "2", num_generated_tokens=60), instance("b", num_generated_tokens=900)),
    )
    assert second["service"]["num_generated_tokens"] == 0
    assert third["service"]["num_generated_tokens"] == 5
