"""Cached KV goes to an instance that lacks it: the tokens of one engine, and nothing held on either side."""

import threading
from typing import Any

import pytest

from tests.runtime.sides import GREEDY, PROMPT, MakeSide, Side, target_of, tokens_of
from xllm_compile.runtime.hand_over import HandOver
from xllm_compile.runtime.memory.kv_tiers import KVTiers
from xllm_compile.runtime.policies.queue_bound import QueueFullError
from xllm_compile.runtime.reservations import Reservation
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.transfer.transfer import TransferError

NUM_CACHED = 24
"""Of the prompt's 25 tokens, in blocks of 4."""


def digests_of(side: Side, prompt: list[int] = PROMPT) -> list[bytes]:
    chain = side.engine._kv_cache.new_chain()
    chain.update(prompt)
    return chain.digests


def compute(side: Side, prompt: list[int] = PROMPT, max_tokens: int = 10) -> list[int]:
    params = SamplingParams(**{"max_tokens": max_tokens} | GREEDY)
    side.engine.add_request("compute", prompt, params)
    return tokens_of(side.run("compute"))


def reserve(side: Side) -> Reservation:
    return side.reserve("r", PROMPT, 60)


def send(side: Side, target: HandOver, digests: list[bytes]) -> int:
    sent = side.engine.send_prefix(digests, target)
    side.run_until(sent.done)
    return sent.result()


@pytest.mark.parametrize(("pages_here", "pages_there"), [(3, 3), (1, 5), (7, 2)])
@pytest.mark.parametrize("has", [0, 8, 20])
def test_the_receiver_computes_what_is_left(make_side: MakeSide, pages_here: int, pages_there: int, has: int) -> None:
    y, x = make_side(page_tokens=pages_here), make_side(page_tokens=pages_there)
    expected = compute(y)
    if has:
        compute(x, PROMPT[:has], 1)
    reservation = reserve(x)
    assert reservation.num_cached_tokens == has
    hits = y.engine.stats().prefix_hit_tokens
    assert send(y, target_of(reservation), digests_of(y)) == NUM_CACHED
    before = x.num_computed
    assert x.decode("r", [], NUM_CACHED) == expected
    assert x.num_computed - before == 1 + 9
    for side in (y, x):
        side.rest()
    stats = y.engine.stats()
    assert stats.hand_overs is not None
    assert (stats.hand_overs.num_prefixes, stats.hand_overs.num_failed_prefixes) == (1, 0)
    assert stats.hand_overs.num_bytes == (NUM_CACHED - has) * y.engine.kv_bytes_per_token
    # Nobody was looked up here.
    assert stats.prefix_hit_tokens == hits


def test_the_receiver_can_find_it_and_send_it_on(make_side: MakeSide) -> None:
    y, x, z = make_side(), make_side(), make_side()
    expected = compute(y)
    for source, target in ((y, x), (x, z)):
        count = send(source, target_of(reserve(target)), digests_of(source))
        assert count == NUM_CACHED
        assert target.decode("r", [], count) == expected


def test_what_is_not_there_any_more_is_not_sent(make_side: MakeSide) -> None:
    y, x = make_side(), make_side()
    expected = compute(y)
    y.engine._kv_cache.forget()
    assert send(y, target_of(reserve(x)), digests_of(y)) == 0
    assert x.decode("r", [], 0) == expected
    compute(y, PROMPT[:12], 1)
    assert send(y, target_of(reserve(x)), digests_of(y)) == 24
    y.rest()


def test_a_block_of_a_step_under_way_is_sent_when_it_is_computed(make_side: MakeSide) -> None:
    y, x = make_side(), make_side()
    expected = compute(make_side())
    y.engine.add_request("long", PROMPT, SamplingParams(**{"max_tokens": 10} | GREEDY))
    y.step()
    # With async scheduling its first step has been launched, and no more.
    assert send(y, target_of(reserve(x)), digests_of(y)) == 8
    assert x.decode("r", [], 8) == expected
    assert tokens_of(y.run("long")) == expected


def test_blocks_in_host_memory_are_sent(make_side: MakeSide) -> None:
    tiers = KVTiers(host_bytes=1 << 20)
    y, x = make_side(page_tokens=4, total_tokens=64, tiers=tiers), make_side()
    expected = compute(y)
    compute(y, list(range(20, 70)), 1)
    digests = digests_of(y)
    assert any(digest in tiers for digest in digests)
    count = send(y, target_of(reserve(x)), digests)
    assert count == NUM_CACHED
    assert x.decode("r", [], count) == expected
    y.rest()


def test_a_receiver_that_is_gone_or_refuses_holds_nothing(make_side: MakeSide) -> None:
    y, x = make_side(), make_side()
    compute(y)
    target = target_of(reserve(x))
    released = x.engine.release("r")
    assert released is not None
    released.result(timeout=60)
    assert send(y, target, digests_of(y)) == 0
    x.engine.close()
    assert send(y, target, digests_of(y)) == 0
    y.rest()
    stats = y.engine.stats().hand_overs
    assert stats is not None and stats.num_failed_prefixes == 2


class HeldSender:
    """Writes when it is let go on."""

    address = "held"

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def write(self, token: bytes, ranges: Any) -> None:
        assert self.go_on.wait(60)
        raise TransferError("nobody is there")

    def close(self) -> None:
        self.go_on.set()


def test_what_is_being_sent_stays_where_it_is(make_side: MakeSide, monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = make_side(page_tokens=4, total_tokens=64), make_side()
    expected = compute(y)
    target = target_of(reserve(x))
    sender = HeldSender()
    assert y.engine._exchange is not None
    monkeypatch.setattr(y.engine._exchange._hand_overs, "_connect", lambda addresses: sender)
    sent = y.engine.send_prefix(digests_of(y), target)
    assert y.engine.stats().kv_pages["mapped"] == 6
    # Others take all that is left, again and again.
    for begin in range(5):
        compute(y, list(range(10 + begin, 35 + begin)), 1)
    assert y.engine.kv_digests() and compute(y) == expected
    assert not sent.done()
    sender.go_on.set()
    y.run_until(sent.done)
    assert sent.result() == 0
    y.rest()


def test_without_room_nothing_is_sent(make_side: MakeSide) -> None:
    y, x = make_side(max_num_seqs=1), make_side()
    compute(y)
    target = target_of(reserve(x))
    y.reserve("other", [1, 2, 3], 60)
    with pytest.raises(QueueFullError, match="max_num_seqs=1"):
        y.engine.send_prefix(digests_of(y), target)
    with pytest.raises(ValueError, match="more than its target's"):
        y.engine.send_prefix(digests_of(y, [*PROMPT, *range(60)]), target)
