from dataclasses import replace

import pytest

from tests.scheduler.policies.instances import PROFILE, decoding, instance, request
from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.scheduler.cluster.state import CachedTokens, StepProfile
from xllm_compile.scheduler.policies import predict


def test_an_idle_instance_computes_the_prompt_in_whole_steps():
    # Two steps of 1000 tokens and one of 500.
    expected = 2 * PROFILE.step_s(StepLoad(1000)) + PROFILE.step_s(StepLoad(500))
    assert predict.ttft_s(instance("a"), request(2500)) == pytest.approx(expected)


def test_prompts_ahead_come_first():
    busy = instance("a", num_waiting=3, num_waiting_tokens=3000)
    ahead_s = predict.ttft_s(busy, request(1000)) - predict.ttft_s(instance("a"), request(1000))
    assert ahead_s == pytest.approx(3 * PROFILE.step_s(StepLoad(1000)))


def test_late_prompts_are_ahead_only_of_who_cannot_be_in_time_either():
    idle, behind = instance("a"), instance("a", num_waiting=4, num_waiting_tokens=40_000)
    late = instance("a", num_waiting=4, num_waiting_tokens=40_000, num_late_waiting_tokens=40_000)
    whole_s, own_s = predict.ttft_s(behind, request(1000)), predict.ttft_s(idle, request(1000))
    in_time, lost = request(1000, ttft_slo_s=2 * own_s), request(1000, ttft_slo_s=own_s / 2)
    assert predict.ttft_s(late, in_time) == pytest.approx(own_s)
    # Nobody lets these go first: too late itself, without a target, best effort, and on an instance that is slower.
    assert predict.ttft_s(late, lost) == predict.ttft_s(late, request(1000)) == pytest.approx(whole_s)
    assert predict.ttft_s(late, request(1000, ttft_slo_s=9e9, is_offline=True)) == pytest.approx(whole_s)
    assert predict.ttft_s(replace(late, ttft_ratio=3.0), in_time) == pytest.approx(whole_s)


def test_attention_makes_one_long_prompt_take_longer_than_its_parts():
    profile = StepProfile(num_tokens=(1, 1001), seconds=(0.01, 0.11), sequence_s=0, key_s=0, pair_s=1e-7)
    one, many = (
        predict.ttft_s(instance("a", profile=profile, num_waiting=n, num_waiting_tokens=8000), request(1))
        for n in (1, 8)
    )
    assert one - many == pytest.approx(1e-7 * 8000**2 / 2 * 7 / 8, rel=1e-3)


@pytest.mark.parametrize(
    ("cached", "spared"),
    [(CachedTokens(), 0), (CachedTokens(device=512), 512), (CachedTokens(device=100, host=100, disk=100), 220)],
)
def test_a_cached_prefix_spares_its_share(cached, spared):
    whole, rest = request(1000), request(1000 - spared)
    assert predict.ttft_s(instance("a"), whole, cached) == pytest.approx(predict.ttft_s(instance("a"), rest))


def test_the_last_token_is_computed_even_when_all_is_cached():
    assert predict.tokens_spared(CachedTokens(device=4096), 1000) == 999


def test_chunks_keep_the_interval_of_what_decodes():
    busy = decoding("a", 20)
    chunk = predict.chunk_tokens(busy, tpot_slo_s=0.05)
    assert 32 < chunk < 1000 - 20
    step = StepLoad(20 + chunk, 20, 20 * 500)
    # As instances plan: prompts fill a step to 0.9 of the target.
    assert PROFILE.step_s(step) <= 0.045 < PROFILE.step_s(step._replace(num_tokens=step.num_tokens + 1))
    assert predict.chunk_tokens(busy, None) == 980
    # Late already: prefill still moves on.
    assert predict.chunk_tokens(busy, 0.001) == 32
    assert predict.ttft_s(busy, request(1000, tpot_slo_s=0.05)) > predict.ttft_s(busy, request(1000))


@pytest.mark.parametrize("sizes", [(1,), (1, 1001), (1, 100, 5000)])
def test_tokens_within_is_the_inverse_of_step_s(sizes):
    profile = StepProfile(
        num_tokens=sizes,
        seconds=tuple(0.01 + size * 1e-4 for size in sizes),
        sequence_s=1e-4,
        key_s=1e-6,
        pair_s=0.0,
    )
    load = StepLoad(num_seqs=4, num_keys=100)
    assert profile.tokens_within(0.005, load) == 0
    for seconds in (0.02, 0.1, 1.0):
        tokens = profile.tokens_within(seconds, load)
        assert profile.step_s(load._replace(num_tokens=tokens)) <= seconds + 1e-9
        if len(sizes) > 1:
            assert profile.step_s(load._replace(num_tokens=tokens + 2)) > seconds


def test_intervals_grow_with_sequences_and_context():
    few, many = decoding("a", 4), decoding("b", 64)
    assert predict.interval_s(few, 100) < predict.interval_s(few, 10_000) < predict.interval_s(many, 10_000)


def test_room_is_waited_for_only_where_decodes_hold_it():
    assert predict.room_wait_s(decoding("a", 4, kv_tokens_total=2500), 500) == 0
    assert predict.room_wait_s(decoding("a", 4, kv_tokens_total=2500), 501) > 0
    assert predict.room_wait_s(decoding("a", 4, max_num_seqs=4), 1) > 0
    assert predict.room_wait_s(instance("a", kv_tokens_used=2500, kv_tokens_total=2500), 100) == 0


def test_without_a_profile_less_work_is_still_sooner_done():
    idle, busy = instance("a", profile=None), instance("b", profile=None, num_waiting=1, num_waiting_tokens=500)
    assert predict.ttft_s(idle, request()) < predict.ttft_s(busy, request())


def test_offline_work_gives_way_and_does_not_count_for_online_requests():
    free = decoding("a", 4, kv_tokens_total=10_000)
    shared = decoding(
        "b",
        16,
        kv_tokens_total=10_000,
        num_offline_decoding=12,
        num_offline_context_tokens=6000,
        num_waiting=2,
        num_waiting_tokens=5000,
        num_offline_waiting_tokens=5000,
    )
    assert predict.interval_s(shared, 500) == predict.interval_s(free, 500)
    assert predict.ttft_s(shared, request(1000)) == predict.ttft_s(free, request(1000))
    assert predict.room_wait_s(shared, 4000) == 0
    assert predict.ttft_s(shared, request(1000, is_offline=True)) > predict.ttft_s(shared, request(1000))
