from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scheduler.policies.instances import PROFILE, decoding, info, instance
from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.scheduler.cluster.state import Health, Instance, Pool
from xllm_compile.scheduler.policies.colocation import (
    ColocationRules,
    Pull,
    pick,
    pull_of,
    pulls,
)

RULES = ColocationRules(tpot_slo_s=0.05)


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
    assert pick(pull, {"short": 10, "fits": 510, "close": 450, "long": 5000}, 9) == ["fits", "close"]
    assert pick(pull, {"short": 10, "fits": 510, "close": 450, "long": 5000}, 1) == ["fits"]
    assert pick(pull, {"a": 990, "b": 980}, 9) == ["b"]
    assert pick(pull, {"long": 5000}, 9) == []
    assert pick(pull, {}, 9) == []


@given(
    lengths=st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(1, 5000)),
    num_seqs=st.integers(1, 20),
    num_tokens=st.integers(1, 20_000),
    most=st.integers(0, 20),
)
def test_no_more_is_handed_over_than_was_asked_for(lengths, num_seqs, num_tokens, most):
    taken = pick(Pull(num_seqs=num_seqs, num_tokens=num_tokens), lengths, most)
    assert len(set(taken)) == len(taken) <= min(num_seqs, most)
    assert sum(lengths[name] for name in taken) <= num_tokens


@pytest.mark.parametrize("values", [{"tpot_slo_s": 0}, {"pull_share": 1.0}, {"period_s": 0}, {"max_pulls": 0}])
def test_bad_rules_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        ColocationRules(**({"tpot_slo_s": 0.05} | values))


CAN: dict[str, Any] = {"transfers": ("shm:x",)}


def offline_decoding(name: str, num_seqs: int, **values: Any) -> Instance:
    return decoding(name, num_seqs, num_offline_decoding=num_seqs, **CAN | values)


def lengths(name: str, count: int) -> dict[str, int]:
    """Of so many sequences on an instance of that name."""
    return {f"{name}{index}": 500 for index in range(count)}


def test_decodes_move_until_both_have_as_many():
    busy, idle = offline_decoding("a", 10, pool=Pool.PREFILL), offline_decoding("b", 4)
    moves = pulls([busy, idle], {"a": lengths("a", 10), "b": lengths("b", 4)}, RULES)
    assert len(moves) == 3 and {target for _, target in moves} == {"b"}
    # Either pool pulls.
    back = pulls([replace(busy, pool=Pool.DECODE), replace(idle, pool=Pool.PREFILL)], {"a": lengths("a", 10)}, RULES)
    assert len(back) == 3
    # Nobody is moved to and fro for one more or less, and nobody twice.
    one_less = offline_decoding("b", 9)
    offline = {"a": lengths("a", 10), "b": lengths("b", 9)}
    assert len(pulls([busy, one_less], offline, RULES)) == 1
    assert pulls([replace(busy, pool=Pool.DECODE), replace(one_less, pool=Pool.PREFILL)], offline, RULES) == []
    assert pulls([replace(busy, pool=Pool.MIX), replace(one_less, pool=Pool.MIX)], offline, RULES) == []
    moves = pulls([busy, idle, offline_decoding("c", 0)], {"a": lengths("a", 10)}, RULES)
    assert len({name for name, _ in moves}) == len(moves) == 3 + 3
    # Of 20 that two gateways have there, each moves half of half.
    shared = offline_decoding("a", 20)
    for own in (lengths("a", 12), lengths("x", 8)):
        assert len(pulls([shared, offline_decoding("b", 10)], {"a": own}, RULES)) == len(own) // 4
    # Online sequences count as well.
    online = decoding("o", 20, **CAN)
    assert pulls([busy, online], {"a": lengths("a", 10)}, RULES) == []


def test_instances_with_prompts_or_long_steps_are_relieved_of_all():
    fewer = {"a": lengths("a", 3)}
    idle = offline_decoding("b", 4)
    prompts: dict[str, Any] = {"num_waiting": 2, "num_waiting_tokens": 3000}
    assert pulls([offline_decoding("a", 3), idle], fewer, RULES) == []
    assert len(pulls([offline_decoding("a", 3, **prompts), idle], fewer, RULES)) == 3
    # A step takes what else waits.
    short = offline_decoding("a", 3, num_waiting=1, num_waiting_tokens=900)
    assert pulls([short, idle], fewer, RULES) == []
    # 60 ms a step where 45 are to be kept.
    late = decoding("a", 70, num_offline_decoding=3, **CAN)
    assert len(pulls([late, idle], fewer, RULES)) == 3
    assert pulls([late, decoding("c", 70, **CAN)], fewer, RULES) == []


def test_no_more_than_so_many_move_to_one_at_a_time():
    busy, idle = offline_decoding("a", 20), offline_decoding("b", 0)
    moves = pulls([busy, idle], {"a": lengths("a", 20)}, replace(RULES, max_pulls=5))
    assert len(moves) == 5


def test_kv_that_cannot_be_moved_stays():
    offline = {"p": {"a": 500, "b": 500}}
    relaxed = offline_decoding("p", 2, pool=Pool.PREFILL)
    assert len(pulls([relaxed, instance("d", Pool.DECODE, **CAN)], offline, RULES)) == 1
    assert pulls([relaxed, instance("d")], offline, RULES) == []
    assert pulls([replace(relaxed, info=info("p")), instance("d", **CAN)], offline, RULES) == []
    assert pulls([relaxed, instance("d", weights_key="other", **CAN)], offline, RULES) == []
    assert pulls([replace(relaxed, health=Health.SUSPECT), instance("d", **CAN)], offline, RULES) == []
