"""Every family of /metrics is moved by what it is named for, in real processes of a service."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.cluster_processes import Cluster, Stream, complete
from tests.integration.helpers import PROMPT, until

pytestmark = pytest.mark.integration

# What the traffic below has no occasion for. A family that is new is moved here, or named here with who moves it.
ELSEWHERE = {
    "test_cluster.py": {"xllm_placements_lost", "xllm_resumed_tokens"},
    "test_serve_http.py": {"xllm_streams_refused", "xllm_aborted_requests"},
    "test_serve_batches.py": {"xllm_preemptions", "xllm_class_preemptions"},
    "test_serve_fetch.py": {
        *("xllm_kv_fetches", "xllm_kv_fetches_failed", "xllm_kv_fetched_tokens", "xllm_kv_prefixes_sent"),
    },
    "tests/runtime": {
        *("xllm_graph_promotions", "xllm_graph_promoted_bytes", "xllm_kv_tier_blocks", "xllm_kv_tier_bytes"),
        *("xllm_swap_preemptions", "xllm_kv_swap_bytes", "xllm_forced_tokens"),
    },
    "tests/scheduler/cluster": {"xllm_placements_refused"},
    "of offline requests that are taken over": {"xllm_migrations", "xllm_migrations_refused", "xllm_offline_held_back"},
    "gone within milliseconds": {
        *("xllm_kv_hand_overs_open", "xllm_kv_reservations_open", "xllm_num_requests_waiting"),
        *("xllm_instance_sequences_waiting", "xllm_instance_waiting_tokens"),
    },
}


def families(process):
    """Whether some sample is not 0, by name."""
    text = httpx.get(f"{process.http}/metrics").text
    return {
        family.name: any(sample.value for sample in family.samples) for family in text_string_to_metric_families(text)
    }


def test_traffic_moves_all_of_them(family_artifact):
    options = ("--kv-host-memory", "64MiB", "--kv-swap-memory", "16MiB", "--speculative", "suffix")
    cluster = Cluster(family_artifact("qwen3"), ("prefill", "decode"), *options)
    known: set[str] = set()
    moved: set[str] = set()

    def still():
        for process in (cluster.gateway, *cluster.instances.values()):
            found = families(process)
            known.update(found)
            moved.update(name for name, is_moved in found.items() if is_moved)
        return known - moved - set().union(*ELSEWHERE.values())

    try:
        for _ in range(2):
            complete(cluster.gateway, PROMPT * 8, ttft_slo_ms=5000, tpot_slo_ms=500)
        # Gauges show what runs now.
        streams = [Stream(cluster.gateway, PROMPT * length, offline=length == 2) for length in (1, 2)]
        until(lambda: not still() or not any(stream.is_alive() for stream in streams))
        for stream in streams:
            stream.result()
        assert still() == set()
        assert set().union(*ELSEWHERE.values()) <= known, "of families that are there"
    finally:
        cluster.close()
