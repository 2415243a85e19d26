"""Offline requests beside online ones on real instances: they use what is idle, and nobody's tokens change."""

import pytest

from tests.integration.cluster_processes import NUM_TOKENS, Stream, answers_alone, clusters, complete
from tests.integration.helpers import until

pytestmark = pytest.mark.integration

PROMPTS = [f"class Thing{index}:\n" for index in range(6)]


@pytest.fixture(scope="module")
def artifact(family_artifact):
    return family_artifact("qwen3")


@pytest.fixture(scope="module")
def expected(artifact):
    return answers_alone(artifact, PROMPTS)


@pytest.fixture
def start_cluster(artifact):
    with clusters(artifact) as start:
        yield start


def offline_streams(server, prompts):
    return [Stream(server, prompt, offline=True) for prompt in prompts]


def test_offline_requests_move_to_idle_decoding_instances_beside_an_online_burst(start_cluster, expected):
    cluster = start_cluster("prefill", "decode", gateway_options=("--colocation", "--tpot-slo-ms", "5000"))
    offline = offline_streams(cluster.gateway, PROMPTS[:4])
    until(lambda: cluster.counts()["num_migrated"] > 0)
    online = [Stream(cluster.gateway, prompt) for prompt in PROMPTS[4:]]
    for prompt, stream in zip(PROMPTS, [*offline, *online], strict=True):
        assert stream.result() == expected[prompt]
    counts = cluster.counts()
    assert counts["num_lost"] == counts["num_refused"] == 0
    decode, prefill = cluster.instances["decode-1"].metrics(), cluster.instances["prefill-0"].metrics()
    assert decode['xllm_class_generation_tokens_total{class="offline"}'] > 0
    assert prefill["xllm_kv_sent_bytes_total"] > 0
    metrics = cluster.gateway.metrics()
    assert metrics["xllm_migrations_total"] == counts["num_migrated"]
    # Nothing stays behind on either side.
    for name in ("xllm_kv_reservations_open", "xllm_kv_hand_overs_open", "xllm_kv_cache_tokens_used"):
        for instance in cluster.instances.values():
            until(lambda name=name, instance=instance: instance.metrics()[name] == 0)


def test_offline_sequences_wait_while_an_online_one_has_no_time_for_them(start_cluster, expected):
    cluster = start_cluster("mix")
    instance = cluster.instances["mix-0"]
    offline = offline_streams(cluster.gateway, PROMPTS[:4])
    until(lambda: all(stream.text for stream in offline))
    # No step is that short: with it nobody else's token is in time.
    assert complete(cluster.gateway, PROMPTS[4], max_tokens=NUM_TOKENS, tpot_slo_ms=0.01) == [expected[PROMPTS[4]]]
    for prompt, stream in zip(PROMPTS, offline, strict=False):
        assert stream.result() == expected[prompt]
    assert instance.metrics()["xllm_offline_held_back_total"] > 0
