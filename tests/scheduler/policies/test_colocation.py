from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scheduler.policies.instances import PROFILE, decoding, instance
from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.scheduler.cluster.state import Health, Pool
from xllm_compile.scheduler.policies.colocation import (
    ColocationRules,
    Pull,
    offline_chunk_tokens,
    offline_seqs,
    pick,
    pull_of,
    pulls,
    saturation_seqs,
)

RULES = ColocationRules(tpot_slo_s=0.05)


@given(num_online=st.integers(0, 60), context=st.integers(1, 4000), most=st.integers(0, 300))
def test_offline_sequences_ride_up_to_the_target_and_no_further(num_online, context, most):
    online = StepLoad(num_online, num_online, num_online * 500)
    count = offline_seqs(PROFILE, online, context, RULES, most)

    def step_s(more):
        return PROFILE.step_s(StepLoad(num_online + more, num_online + more, online.num_keys + more * (context + 1)))

    assert 0 <= count <= most
    assert count == 0 or step_s(count) <= 0.98 * 0.05
    assert count == most or step_s(count + 1) > 0.98 * 0.05


def test_a_batch_is_saturated_when_its_sequences_make_up_most_of_a_step():
    # A sequence of 500 costs 0.7 ms over the 10 ms of any step: at 80 % that is 62 of them.
    assert saturation_seqs(PROFILE, 500, RULES, 1000) == 62
    assert saturation_seqs(PROFILE, 5000, RULES, 1000) < 20
    assert saturation_seqs(PROFILE, 1, RULES, 40) == 40
    assert saturation_seqs(PROFILE, 10**6, RULES, 40) >= 1


def test_offline_chunks_end_soon():
    decodes = StepLoad(20, 20, 10_000)
    tokens = offline_chunk_tokens(PROFILE, decodes, RULES)
    assert tokens > 20
    assert PROFILE.step_s(decodes._replace(num_tokens=tokens)) <= 0.1
    assert PROFILE.step_s(decodes._replace(num_tokens=tokens + 2)) > 0.1
    # Whatever the decodes, prefill moves on.
    assert offline_chunk_tokens(PROFILE, StepLoad(200, 200, 10**6), RULES) == 201


def test_instances_with_slack_pull_and_others_do_not():
    found = pull_of(decoding("d", 5), RULES)
    assert found is not None
    load = StepLoad(5 + found.num_seqs, 5 + found.num_seqs, 2500 + found.num_tokens)
    assert PROFILE.step_s(load) <= 0.05, "what was asked for keeps the target"
    assert found.num_seqs > 5
    assert pull_of(decoding("d", 50), RULES) is None, "its step is long already"
    assert pull_of(decoding("d", 5, kv_tokens_total=2700), RULES) is None, "its KV cache is full"
    assert pull_of(decoding("d", 5, max_num_seqs=5), RULES) is None
    assert pull_of(decoding("d", 5, num_waiting=1, num_waiting_tokens=100), RULES) is None
    assert pull_of(decoding("d", 5, health=Health.SUSPECT), RULES) is None
    assert pull_of(instance("d", Pool.DECODE), RULES) is not None


def test_the_lengths_that_fit_best_are_handed_over():
    pull = Pull(num_seqs=2, num_tokens=1000)
    assert pick(pull, {"short": 10, "fits": 510, "close": 450, "long": 5000}) == ["fits", "close"]
    assert pick(pull, {"a": 990, "b": 980}) == ["b"]
    assert pick(pull, {"long": 5000}) == []
    assert pick(pull, {}) == []


@given(
    lengths=st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(1, 5000)),
    num_seqs=st.integers(1, 20),
    num_tokens=st.integers(1, 20_000),
)
def test_no_more_is_handed_over_than_was_asked_for(lengths, num_seqs, num_tokens):
    taken = pick(Pull(num_seqs=num_seqs, num_tokens=num_tokens), lengths)
    assert len(set(taken)) == len(taken) <= num_seqs
    assert sum(lengths[name] for name in taken) <= num_tokens


@pytest.mark.parametrize("values", [{"tpot_slo_s": 0}, {"tpot_share": 1.0}, {"saturation": 0}, {"interrupt_s": -1}])
def test_bad_rules_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        ColocationRules(**({"tpot_slo_s": 0.05} | values))


def test_strict_instances_with_slack_pull_from_relaxed_ones_and_from_those_without():
    can: dict[str, Any] = {"transfers": ("shm:x",)}
    relaxed, strict = instance("p", Pool.PREFILL, **can), decoding("d", 5, **can)
    late, other = decoding("late", 60, **can), decoding("e", 5, **can)
    offline = {"p": {"a": 500, "b": 400}}
    assert sorted(pulls([relaxed, strict], offline, RULES)) == [("a", "d"), ("b", "d")]
    assert pulls([relaxed, late], offline, RULES) == []
    # Nobody is asked twice, and nobody gives to itself.
    assert sorted(name for name, _ in pulls([relaxed, strict, other], offline, RULES)) == ["a", "b"]
    assert pulls([strict, other], {"d": {"a": 500}}, RULES) == []
    assert pulls([late, other], {"late": {"a": 500}}, RULES) == [("a", "e")]
    busy = instance("m", Pool.MIX, num_waiting=2, num_waiting_tokens=3000, **can)
    assert pulls([busy, other], {"m": {"a": 500}}, RULES) == [("a", "e")]
    resting = replace(busy, load=replace(busy.load, num_offline_waiting_tokens=2500))
    assert pulls([resting, other], {"m": {"a": 500}}, RULES) == []


def test_kv_that_cannot_be_moved_stays():
    can: dict[str, Any] = {"transfers": ("shm:x",)}
    offline = {"p": {"a": 500}}
    relaxed = instance("p", Pool.PREFILL, **can)
    assert pulls([relaxed, decoding("d", 5)], offline, RULES) == []
    assert pulls([instance("p", Pool.PREFILL), decoding("d", 5, **can)], offline, RULES) == []
    assert pulls([relaxed, decoding("d", 5, weights_key="other", **can)], offline, RULES) == []
    assert pulls([replace(relaxed, health=Health.SUSPECT), decoding("d", 5, **can)], offline, RULES) == []
