from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compile.runtime.local_scheduler import Limits, QueueFullError, Schedule, check_queue, schedule


@dataclass(eq=False)
class Item:
    """A sequence as the scheduler sees it, with enough behaviour to play the engine's part."""

    name: str
    num_tokens: int
    num_computed_tokens: int = 0
    max_chunk: int = 1_000_000
    num_outputs: int = 0
    wants: int = 1

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def max_chunk_tokens(self) -> int:
        return self.max_chunk


def decoding(name: str, computed: int) -> Item:
    return Item(name, computed + 1, computed)


def limits(seqs: int = 8, tokens: int = 16, kv: int = 1000) -> Limits:
    return Limits(max_num_seqs=seqs, max_num_batched_tokens=tokens, kv_total_tokens=kv)


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
    # 1000 - 10 held - 50 that "a" still needs - 10 watermark = 930.
    assert names(schedule([Item("b", 931)], running, limits(tokens=100))) == [("a", 50)]
    assert names(schedule([Item("b", 930)], running, limits(tokens=100))) == [("a", 50), ("b", 50)]


def test_alone_a_prompt_may_take_everything() -> None:
    assert names(schedule([Item("a", 20)], [], limits(tokens=20, kv=20))) == [("a", 20)]


def test_the_last_arrival_is_preempted_when_decodes_need_its_memory() -> None:
    a, b, c = decoding("a", 10), decoding("b", 5), decoding("c", 5)
    plan = schedule([Item("d", 1)], [a, b, c], limits(kv=20))
    assert names(plan) == [("a", 1), ("b", 1)]
    assert plan.preempted == [c]


def test_a_sequence_already_in_the_step_can_still_be_preempted() -> None:
    old_prefill, young_decode = Item("a", 30, 10), decoding("b", 9)
    plan = schedule([], [old_prefill, young_decode], limits(kv=20))
    assert names(plan) == [("a", 10)]
    assert plan.preempted == [young_decode]


def test_several_preempted_come_back_in_order_of_arrival() -> None:
    a, b, c, d = decoding("a", 4), decoding("b", 4), Item("c", 1, 0), decoding("d", 0)
    plan = schedule([], [a, b, c, d], limits(kv=8))
    assert names(plan) == [("a", 1)]
    assert [item.name for item in plan.preempted] == ["b", "c", "d"]


def test_the_youngest_prefill_waits_with_what_it_has() -> None:
    plan = schedule([], [decoding("a", 9), Item("b", 30, 10)], limits(kv=20))
    assert names(plan) == [("a", 1)]
    assert not plan.preempted


def test_what_cannot_fit_alone_is_given_up_and_makes_room() -> None:
    alone = decoding("a", 20)
    plan = schedule([Item("b", 5)], [alone], limits(kv=20))
    assert plan.too_large == [alone]
    assert names(plan) == [("b", 5)]
    plan = schedule([Item("a", 21), Item("b", 5)], [], limits(kv=20))
    assert [item.name for item in plan.too_large] == ["a"]
    assert names(plan) == [("b", 5)]


def test_nothing_to_do() -> None:
    assert schedule([], [], limits()) == Schedule()


def test_limits_must_let_every_sequence_decode() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens=4 must be at least max_num_seqs=8"):
        limits(seqs=8, tokens=4)


def test_queue_bounds() -> None:
    bounds = {"max_waiting": 3, "max_tokens": 100}
    check_queue(num_waiting=2, num_waiting_tokens=50, num_new=1, num_new_tokens=50, **bounds)
    with pytest.raises(QueueFullError, match="2 sequences wait and 2 more exceed max_waiting=3"):
        check_queue(num_waiting=2, num_waiting_tokens=50, num_new=2, num_new_tokens=2, **bounds)
    with pytest.raises(QueueFullError, match="50 prompt tokens wait and 51 more exceed max_waiting_tokens=100"):
        check_queue(num_waiting=1, num_waiting_tokens=50, num_new=1, num_new_tokens=51, **bounds)
    # A request larger than the bounds must be servable at some time.
    check_queue(num_waiting=0, num_waiting_tokens=0, num_new=9, num_new_tokens=900, **bounds)


@dataclass
class Simulation:
    """Applies schedules as the engine does, counting steps on a clock of its own."""

    limits: Limits
    arrivals: deque[tuple[int, Item]]
    waiting: deque[Item] = field(default_factory=deque)
    running: list[Item] = field(default_factory=list)
    finished: list[Item] = field(default_factory=list)
    too_large: list[Item] = field(default_factory=list)
    now: int = 0

    def step(self) -> None:
        while self.arrivals and self.arrivals[0][0] <= self.now:
            self.waiting.append(self.arrivals.popleft()[1])
        plan = schedule(self.waiting, self.running, self.limits)
        self._check(plan)
        for item in reversed(plan.preempted):
            item.num_computed_tokens = 0
            self.running.remove(item)
            self.waiting.appendleft(item)
        for item in plan.too_large:
            (self.running if item in self.running else self.waiting).remove(item)
            self.too_large.append(item)
        for item, count in plan.chunks:
            if item not in self.running:
                assert item is self.waiting[0]
                self.running.append(self.waiting.popleft())
            item.num_computed_tokens += count
            if item.num_uncomputed_tokens == 0:
                item.num_tokens += 1
                item.num_outputs += 1
                if item.num_outputs == item.wants:
                    self.running.remove(item)
                    self.finished.append(item)
        self.now += 1

    def _check(self, plan: Schedule[Item]) -> None:
        scheduled = [item for item, _ in plan.chunks]
        listed = scheduled + plan.preempted + plan.too_large
        assert len({id(item) for item in listed}) == len(listed)
        assert all(1 <= count <= min(item.num_uncomputed_tokens, item.max_chunk) for item, count in plan.chunks)
        assert sum(count for _, count in plan.chunks) <= self.limits.max_num_batched_tokens
        gone = plan.preempted + plan.too_large
        after = {id(item) for item in (*self.running, *scheduled) if item not in gone}
        assert len(after) <= self.limits.max_num_seqs
        held = sum(item.num_computed_tokens for item in self.running if item not in gone)
        assert held + sum(count for _, count in plan.chunks) <= self.limits.kv_total_tokens
        # The oldest running sequence moves in every step, which is why everything ends.
        if self.running and self.running[0] not in plan.too_large:
            assert self.running[0] in scheduled


@settings(max_examples=300, deadline=None)
@given(
    items=st.lists(
        st.tuples(st.integers(0, 20), st.integers(1, 40), st.integers(1, 20), st.sampled_from([3, 1_000_000])),
        min_size=1,
        max_size=12,
    ),
    seqs=st.integers(1, 6),
    extra_tokens=st.integers(0, 20),
    kv=st.integers(10, 80),
)
def test_every_request_ends_and_no_limit_is_ever_passed(
    items: list[tuple[int, int, int, int]], seqs: int, extra_tokens: int, kv: int
) -> None:
    created = [
        (at, Item(str(index), prompt, max_chunk=chunk, wants=wants))
        for index, (at, prompt, wants, chunk) in enumerate(sorted(items))
    ]
    simulation = Simulation(
        Limits(max_num_seqs=seqs, max_num_batched_tokens=seqs + extra_tokens, kv_total_tokens=kv), deque(created)
    )
    # The oldest moves every step, so its prompt, its outputs and one recomputation of both bound its time at the head.
    bound = 20 + sum(2 * (prompt + wants) for _, prompt, wants, _ in items)
    while len(simulation.finished) + len(simulation.too_large) < len(items):
        simulation.step()
        assert simulation.now <= bound, "a request starves or the schedule livelocks"
    for _, item in created:
        # The last generated token needs no place in the cache.
        fits = item.num_tokens - item.num_outputs + item.wants - 1 <= kv
        assert (item in simulation.finished) == fits


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_without_pressure_first_tokens_come_in_order_of_arrival(prompts: list[int]) -> None:
    items = [Item(str(index), prompt) for index, prompt in enumerate(prompts)]
    simulation = Simulation(limits(tokens=16), deque((0, item) for item in items))
    while len(simulation.finished) < len(items):
        simulation.step()
    assert simulation.finished == items
