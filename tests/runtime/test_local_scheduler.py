import math
from typing import Any

import pytest

from tests.runtime.policies.items import Item, MillisecondsPerToken
from xllm_compile.runtime import local_scheduler
from xllm_compile.runtime.local_scheduler import SchedulingRules
from xllm_compile.runtime.policies.order import Order, PolicyName
from xllm_compile.runtime.policies.state import Capacity, Limits, Schedule

ROOM = 1000


def decoding(name: str, computed: int, **fields: Any) -> Item:
    return Item(name, computed + 1, computed, **fields)


def limits(seqs: int = 8, tokens: int = 16) -> Limits:
    return Limits(max_num_seqs=seqs, max_num_batched_tokens=tokens)


def schedule(
    waiting: list[Item],
    running: list[Item],
    limits: Limits,
    *,
    kv: int = ROOM,
    policy: PolicyName = "fcfs",
    horizon: int = 0,
    elder: Item | None = None,
    now: float = 0.0,
    held_seqs: int = 0,
    awaited_s: float = math.inf,
    **capacity: Any,
) -> Schedule[Item]:
    block_tokens = capacity.pop("block_tokens", 1)
    used = sum(item.num_kv_blocks for item in running)
    order = Order(policy)
    return local_scheduler.schedule(
        sorted(waiting, key=order.queue_key),
        running,
        limits,
        Capacity(
            num_blocks=kv, num_free_blocks=kv - used, block_tokens=block_tokens, num_held_seqs=held_seqs, **capacity
        ),
        MillisecondsPerToken(),
        rules=SchedulingRules(order=order, admission_horizon=horizon, min_prefill_tokens=4),
        now=now,
        token_s=1e-3,
        elder=elder,
        awaited_s=awaited_s,
    )


def names(plan: Schedule[Item]) -> list[tuple[str, int]]:
    return [(item.name, count) for item, count in plan.chunks]


def test_decodes_come_first_then_prompts_fill_the_step_in_order_of_arrival() -> None:
    running = [decoding("a", 5), Item("b", 30, 10), decoding("c", 7)]
    plan = schedule([Item("d", 3), Item("e", 4)], running, limits(tokens=26))
    assert names(plan) == [("a", 1), ("c", 1), ("b", 20), ("d", 3), ("e", 1)]
    assert not plan.preempted and not plan.too_large


def test_a_long_prompt_is_cut_and_blocks_those_behind_it() -> None:
    assert names(schedule([Item("a", 100), Item("b", 2)], [], limits(tokens=16))) == [("a", 16)]


def test_a_sequence_may_ask_for_smaller_chunks() -> None:
    plan = schedule([Item("a", 100, max_chunk=4), Item("b", 6)], [], limits(tokens=16))
    assert names(plan) == [("a", 4), ("b", 6)]


def test_no_more_sequences_than_allowed() -> None:
    plan = schedule([Item("b", 2), Item("c", 2)], [decoding("a", 3)], limits(seqs=2))
    assert names(plan) == [("a", 1), ("b", 2)]


def test_newcomers_wait_until_their_whole_prompt_fits_beside_what_runs() -> None:
    running = [Item("a", 60, 10)]
    # 1000 - 10 held - 50 that "a" still needs = 940.
    assert names(schedule([Item("b", 941)], running, limits(tokens=100))) == [("a", 50)]
    assert names(schedule([Item("b", 940)], running, limits(tokens=100))) == [("a", 50), ("b", 50)]


def test_alone_a_prompt_may_take_everything() -> None:
    assert names(schedule([Item("a", 20)], [], limits(tokens=20), kv=20)) == [("a", 20)]


def test_the_last_arrival_is_preempted_when_decodes_need_its_memory() -> None:
    a, b, c = decoding("a", 10), decoding("b", 5), decoding("c", 5)
    plan = schedule([Item("d", 1)], [a, b, c], limits(), kv=20)
    assert names(plan) == [("a", 1), ("b", 1)]
    assert plan.preempted == [c]


def test_a_sequence_already_in_the_step_can_still_be_preempted() -> None:
    old_prefill, young_decode = Item("a", 30, 10), decoding("b", 9)
    plan = schedule([], [old_prefill, young_decode], limits(), kv=20)
    assert names(plan) == [("a", 10)]
    assert plan.preempted == [young_decode]


def test_several_preempted_come_back_in_order_of_arrival() -> None:
    a, b, c, d = decoding("a", 4), decoding("b", 4), Item("c", 1, 0), decoding("d", 0)
    plan = schedule([], [a, b, c, d], limits(), kv=8)
    assert names(plan) == [("a", 1)]
    assert [item.name for item in plan.preempted] == ["b", "c", "d"]


def test_the_youngest_prefill_waits_with_what_it_has() -> None:
    plan = schedule([], [decoding("a", 9), Item("b", 30, 10)], limits(), kv=20)
    assert names(plan) == [("a", 1)]
    assert not plan.preempted


def test_what_cannot_fit_alone_is_given_up_and_makes_room() -> None:
    alone = decoding("a", 20)
    plan = schedule([Item("b", 5)], [alone], limits(), kv=20)
    assert plan.too_large == [alone]
    assert names(plan) == [("b", 5)]
    plan = schedule([Item("a", 21), Item("b", 5)], [], limits(), kv=20)
    assert [item.name for item in plan.too_large] == ["a"]
    assert names(plan) == [("b", 5)]


def test_nothing_to_do() -> None:
    assert schedule([], [], limits()) == Schedule()


def test_limits_must_let_every_sequence_decode() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens=4 must be at least max_num_seqs=8"):
        limits(seqs=8, tokens=4)


def test_newcomers_wait_until_nobody_will_be_preempted_for_them() -> None:
    running = [decoding("a", 50, num_growth_tokens=20), decoding("b", 10, num_growth_tokens=3)]
    # When "b" ends after 3 more tokens, "a" has 54 of 1000, "b" 14; "c" grows by as much as "a".
    for prompt, is_admitted in ((1000 - 51 - 20 - 20, True), (1000 - 51 - 20 - 19, False)):
        plan = schedule([Item("c", prompt, num_growth_tokens=20)], running, limits(), horizon=100)
        assert (len(plan.chunks) == 3) == is_admitted
    assert len(schedule([Item("c", 920, num_growth_tokens=20)], running, limits(), horizon=1).chunks) == 3


def test_places_of_sequences_that_just_ended_are_not_given_away() -> None:
    plan = schedule([Item("b", 2)], [decoding("a", 3)], limits(seqs=2), held_seqs=1)
    assert names(plan) == [("a", 1)]


def test_a_sequence_whose_last_token_is_on_its_way_rides_no_more() -> None:
    assert names(schedule([], [Item("a", 5, 5), decoding("b", 5)], limits())) == [("b", 1)]


def test_blocks_are_filled_before_new_ones_are_taken() -> None:
    a, b = decoding("a", 6, block_tokens=4), decoding("b", 4, block_tokens=4)
    plan = schedule([], [a, b], limits(), kv=3, block_tokens=4)
    # "a" has room in its second block; "b" would need one and none is free.
    assert names(plan) == [("a", 1)]
    assert plan.preempted == [b]
    assert names(schedule([Item("c", 9, block_tokens=4)], [a], limits(), kv=5, block_tokens=4)) == [("a", 1), ("c", 9)]
    assert names(schedule([Item("c", 13, block_tokens=4)], [a], limits(), kv=5, block_tokens=4)) == [("a", 1)]


def test_offline_gives_way_to_online() -> None:
    offline = [decoding("x", 5, is_offline=True), decoding("y", 5, is_offline=True)]
    plan = schedule([Item("a", 3), Item("z", 3, is_offline=True)], offline, limits(seqs=2))
    # One place is needed and the younger one gives it; the other one is no tenth of the step.
    assert names(plan) == [("a", 3)]
    assert plan.preempted == [offline[1]]


def paced(name: str, computed: int, target_ms: float) -> Item:
    """An online one that decodes."""
    return decoding(name, computed, tpot_slo_s=target_ms / 1e3, next_due_s=target_ms / 1e3)


def test_as_many_offline_sequences_decode_as_the_target_of_online_ones_leaves_time_for() -> None:
    offline = [decoding(name, 5, is_offline=True) for name in "uvwxyz"]
    plan = schedule([], [*offline[:3], paced("a", 5, 5.2), *offline[3:]], limits())
    # 0.98 of 5.2 ms; those that came last wait, with their KV.
    assert names(plan) == [("a", 1), ("u", 1), ("v", 1), ("w", 1), ("x", 1)]
    assert (plan.num_held_back, plan.preempted) == (2, [])
    # Nobody else's target counts, and an elder rides in any case.
    assert len(names(schedule([], [*offline, decoding("a", 5)], limits()))) == 7
    offline[0].tpot_slo_s, offline[0].next_due_s = 1e-3, 0.0
    assert len(names(schedule([], offline, limits()))) == 6
    plan = schedule([], [*offline, paced("a", 5, 2.1)], limits(), elder=offline[5])
    assert names(plan) == [("z", 1), ("a", 1)]


def test_a_sequence_that_is_behind_leaves_time_to_prompts_but_none_to_offline_work() -> None:
    behind = [decoding(f"{number}", 5, tpot_slo_s=60e-3, next_due_s=-1.0) for number in range(40)]
    offline = decoding("x", 5, is_offline=True)
    plan = schedule([Item("p", 40)], [*behind, offline], limits(seqs=64, tokens=128))
    # 40 decodes take more than 0.65 of the target already; of the 14 ms that they leave of 0.9, prompts get 7.
    assert names(plan)[40:] == [("p", 7)]
    assert plan.num_held_back == 1
    plan = schedule([], [*behind[:30], offline], limits(seqs=64, tokens=128))
    assert names(plan)[30:] == [("x", 1)]


def test_online_prompts_take_the_time_of_offline_decodes() -> None:
    offline = [decoding(name, 5, is_offline=True) for name in "xyz"]
    plan = schedule([Item("b", 40)], [*offline, paced("a", 5, 11.2)], limits(tokens=64))
    # Prompts fill 0.9 of the target; a tenth more is too long for any.
    assert names(plan) == [("a", 1), ("b", 9)]
    # Without a target they may lengthen the step by a tenth.
    plan = schedule([Item("b", 20)], [*offline, decoding("a", 5)], limits(tokens=64))
    assert names(plan) == [("a", 1), ("b", 20), ("x", 1), ("y", 1)]


def test_an_offline_prompt_is_interrupted_between_two_chunks() -> None:
    rest, online = Item("x", 400, 100, is_offline=True), Item("a", 30)
    # Alone it gets short steps, so that whoever comes is soon in one.
    assert names(schedule([], [rest], limits(tokens=256))) == [("x", 100)]
    plan = schedule([online], [rest], limits(tokens=256))
    assert (names(plan), plan.num_held_back, plan.preempted) == ([("a", 30), ("x", 3)], 0, [])
    assert names(schedule([online], [rest], limits(tokens=30))) == [("a", 30)]
    # What waits is not taken in where no time is left, and no least chunk is forced upon online targets.
    waiting = [Item("y", 9, is_offline=True)]
    assert names(schedule(waiting, [rest, paced("a", 5, 1.0)], limits())) == [("a", 1)]
    assert names(schedule(waiting, [paced("a", 5, 6.2)], limits())) == [("a", 1), ("y", 5)]


def test_offline_loses_its_memory_first() -> None:
    old_offline, young = decoding("x", 10, is_offline=True), decoding("a", 10)
    plan = schedule([], [old_offline, young], limits(), kv=20)
    assert names(plan) == [("a", 1)]
    assert plan.preempted == [old_offline]


def test_nobody_is_preempted_in_vain() -> None:
    running = [decoding("a", 60), decoding("x", 30, is_offline=True)]
    plan = schedule([Item("b", 40)], running, limits(), kv=100)
    assert names(plan) == [("a", 1), ("x", 1)]
    assert not plan.preempted
    assert schedule([Item("b", 39)], running, limits(), kv=100).preempted == [running[1]]


@pytest.mark.parametrize("policy", ["fcfs", "priority", "deadline"])
def test_only_a_strictly_better_tier_takes_a_place(policy: PolicyName) -> None:
    running = [decoding("a", 5, priority=1), decoding("b", 5, priority=1)]
    better = Item("c", 3, priority=0, first_deadline_s=1.0)
    equal = Item("d", 3, priority=1, first_deadline_s=1.0)
    assert not schedule([equal], running, limits(seqs=2), policy=policy).preempted
    taken = schedule([better], running, limits(seqs=2), policy=policy).preempted
    assert taken == ([] if policy == "fcfs" else [running[1]])


def test_urgent_prompts_go_before_a_long_one_that_is_under_way() -> None:
    running = [Item("long", 100, 10, priority=1)]
    assert names(schedule([Item("a", 6)], running, limits(), policy="priority")) == [("a", 6), ("long", 10)]
    assert names(schedule([Item("a", 6)], running, limits(), policy="fcfs")) == [("long", 16)]
    due = Item("b", 6, first_deadline_s=0.1)
    assert names(schedule([due], [Item("long", 100, 10)], limits(), policy="deadline")) == [("b", 6), ("long", 10)]


def test_the_elder_goes_first_and_stays() -> None:
    elder = Item("elder", 10, is_offline=True)
    online = [decoding("a", 5), decoding("b", 5)]
    plan = schedule([Item("c", 5), elder], online, limits(seqs=2), elder=elder)
    assert names(plan) == [("a", 1), ("elder", 10)]
    assert plan.preempted == [online[1]]
    running = decoding("elder", 10, is_offline=True)
    plan = schedule([Item("c", 5)], [running, decoding("a", 9)], limits(seqs=2), kv=20, elder=running)
    assert names(plan) == [("elder", 1)]


def test_the_elder_is_not_taken_in_again_in_the_step_that_ends_it() -> None:
    elder = decoding("elder", 20)
    plan = schedule([Item("b", 5)], [elder], limits(), kv=20, elder=elder)
    assert plan.too_large == [elder]
    assert names(plan) == [("b", 5)]


def test_chunks_leave_decodes_their_time() -> None:
    running = [decoding("a", 5, tpot_slo_s=0.010), decoding("b", 5)]
    # A token takes a millisecond: two decode, seven are left of 0.9 of the target.
    assert names(schedule([Item("c", 14)], running, limits())) == [("a", 1), ("b", 1), ("c", 7)]
    assert names(schedule([Item("c", 5), Item("d", 5)], running, limits()))[2:] == [("c", 5), ("d", 2)]
    # Without a target the step is full; with one that cannot be kept prefill still goes on.
    assert names(schedule([Item("c", 14)], running[1:], limits()))[1:] == [("c", 14)]
    tight = [decoding("a", 5, tpot_slo_s=0.001)]
    assert names(schedule([Item("c", 14), Item("d", 5)], tight, limits()))[1:] == [("c", 4)]


def test_chunks_are_short_where_somebody_is_awaited() -> None:
    # A token takes a millisecond.
    assert names(schedule([Item("c", 14)], [], limits(), awaited_s=0.010)) == [("c", 9)]
    assert names(schedule([Item("c", 14)], [decoding("a", 5)], limits(), awaited_s=0.010)) == [("a", 1), ("c", 8)]
    assert names(schedule([Item("c", 14)], [], limits(), awaited_s=0.001)) == [("c", 4)]


def test_swapping_is_chosen_where_the_cache_can_and_it_pays() -> None:
    running = [decoding("a", 10), decoding("b", 3), decoding("c", 7)]
    plan = schedule([], running, limits(), kv=20, swap_pays=lambda num_tokens: num_tokens > 5)
    assert (plan.swapped, plan.preempted) == ([running[2]], [])
    plan = schedule([], running, limits(), kv=20)
    assert (plan.swapped, plan.preempted) == ([], [running[2]])


@pytest.mark.parametrize("fields", [{"admission_horizon": -1}, {"min_prefill_tokens": 0}])
def test_bad_rules(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        SchedulingRules(**fields)


def test_what_a_newcomer_finds_cached_takes_blocks_but_no_tokens_of_the_step() -> None:
    newcomer = Item("a", 100, num_computed_tokens=90, num_unheld_blocks=23, block_tokens=4)
    # 25 blocks of 4 tokens, and one that the other may take at any time.
    for kv, admitted in ((27, True), (26, False)):
        plan = schedule([newcomer], [decoding("b", 4, block_tokens=4)], limits(), kv=kv, block_tokens=4)
        assert names(plan) == ([("b", 1), ("a", 10)] if admitted else [("b", 1)])
