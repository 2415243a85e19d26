import math

import pytest

from tests.runtime.policies.items import Item
from xllm_compile.runtime.policies.order import POLICY_CHOICES, Order, PolicyChoice, PolicyName
from xllm_compile.runtime.policies.waiting_queue import WaitingQueue


@pytest.mark.parametrize("choice", POLICY_CHOICES)
def test_auto_is_deadline_where_all_have_a_target(choice: PolicyChoice) -> None:
    found = {has: Order.chosen(choice, has_ttft_target=has).policy for has in (False, True)}
    assert found == ({False: "fcfs", True: "deadline"} if choice == "auto" else {False: choice, True: choice})


def order_of(policy: PolicyName, items: list[Item], now: float = 0.0, token_s: float = 0.0) -> list[str]:
    order = Order(policy)
    queue: WaitingQueue[Item] = WaitingQueue(order.queue_key)
    for item in items:
        queue.add(item)
    names = [item.name for item in order.ordered(queue, now, token_s)]
    assert names == [item.name for item in sorted(items, key=lambda item: order.rank(item, now, token_s))]
    return names


def test_fcfs_goes_by_arrival_online_first() -> None:
    assert order_of("fcfs", [Item("a", 1, is_offline=True), Item("b", 1, priority=9), Item("c", 1)]) == ["b", "c", "a"]


def test_priority_goes_by_priority_then_by_arrival() -> None:
    items = [Item("a", 1, priority=1), Item("b", 1), Item("c", 1, priority=-5, is_offline=True), Item("d", 1)]
    assert order_of("priority", items) == ["b", "d", "a", "c"]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_what_began_elsewhere_goes_before_what_did_not_begin(policy: PolicyName) -> None:
    items = [
        Item("new", 1),
        Item("offline", 1, is_offline=True),
        Item("resumed", 9, is_begun=True),
        Item("resumed offline", 9, is_offline=True, is_begun=True),
        Item("resumed later", 9, is_begun=True),
    ]
    assert order_of(policy, items) == ["resumed", "resumed later", "new", "resumed offline", "offline"]
    order = Order(policy)
    assert order.tier(items[0]) == order.tier(items[2]), "it takes nobody's place"


def test_deadline_serves_first_what_is_due_first_and_last_what_is_late_anyway() -> None:
    items = [
        Item("none", 10),
        Item("late", 10, first_deadline_s=5.0),
        Item("too long", 100, first_deadline_s=11.0),
        Item("soon", 10, first_deadline_s=12.0),
        Item("later", 10, first_deadline_s=20.0),
        Item("was running", 10, first_deadline_s=-math.inf),
        Item("urgent", 10, first_deadline_s=99.0, priority=-1),
    ]
    found = order_of("deadline", items, now=10.0, token_s=0.1)
    assert found == ["urgent", "was running", "soon", "later", "none", "late", "too long"]
    late = [item.name for item in items if Order("deadline").is_late(item, 10.0, 0.1)]
    assert late == ["none", "late", "too long"]
    assert not any(Order("fcfs").is_late(item, 10.0, 0.1) for item in items)


@pytest.mark.parametrize("policy", ["fcfs", "priority", "deadline"])
def test_arrival_and_deadlines_do_not_make_a_tier(policy: PolicyName) -> None:
    order = Order(policy)
    assert order.tier(Item("a", 1, first_deadline_s=1.0)) == order.tier(Item("b", 2))
    assert order.tier(Item("a", 1)) < order.tier(Item("b", 1, is_offline=True, priority=-9))
    assert (order.tier(Item("a", 1)) < order.tier(Item("b", 1, priority=1))) == (policy != "fcfs")


def test_an_elder_that_is_late_goes_first_in_some_steps_only() -> None:
    order = Order("deadline")
    late, offline = Item("late", 10, first_deadline_s=5.0), Item("offline", 10, is_offline=True)
    in_time, out = Item("in time", 10, first_deadline_s=99.0), Item("out", 10, first_deadline_s=-math.inf)
    steps = [step for step in range(32) if order.is_elders_step(late, step, 10.0, 0.1)]
    assert steps == [0, 8, 16, 24]
    for elder in (offline, in_time, out):
        assert all(order.is_elders_step(elder, step, 10.0, 0.1) for step in range(8))
    assert Order("fcfs").is_elders_step(late, 1, 10.0, 0.1)


def test_the_queue_counts_what_it_holds() -> None:
    queue: WaitingQueue[Item] = WaitingQueue(Order().queue_key)
    items = [Item("a", 5), Item("b", 7, is_offline=True), Item("c", 3)]
    for item in reversed(items):
        queue.add(item)
    assert [item.name for item in queue] == ["a", "c", "b"]
    assert (len(queue), queue.num_tokens, queue.num_offline) == (3, 15, 1)
    # Found in a cache while it waits.
    items[1].num_computed_tokens = 4
    queue.remove(items[1])
    queue.remove(items[0])
    assert (len(queue), queue.num_tokens, queue.num_offline) == (1, 3, 0)
