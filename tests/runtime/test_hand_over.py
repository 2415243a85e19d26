"""Prefill on one engine, decode on another: the tokens of one engine, whatever is lost on the way, and nothing held."""

import math
import threading

import pytest

from tests.runtime.sides import GREEDY, PROMPT, MakeSide, Side, prefill, target_of, tokens_of
from xllm_compile.runtime.hand_over import HandOver, split_ranges
from xllm_compile.runtime.kv_exchange import NoTransferError
from xllm_compile.runtime.policies.queue_bound import QueueFullError
from xllm_compile.runtime.reservations import ReservationError
from xllm_compile.runtime.resume import Resume
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.transfer.transfer import ByteRange, TransferError


# Pages of P and of D, in tokens; they need not be equal.
@pytest.mark.parametrize(("p_pages", "d_pages"), [(3, 3), (1, 5), (7, 2)])
@pytest.mark.parametrize("cached", [0, 5, 17, 25])
def test_tokens_are_those_of_one_engine(make_side: MakeSide, p_pages: int, d_pages: int, cached: int) -> None:
    p, d = make_side(page_tokens=p_pages), make_side(page_tokens=d_pages)
    if cached:
        d.engine.add_request("before", [*PROMPT[:cached], 9], SamplingParams(max_tokens=1, **GREEDY))
        d.run("before")
    reservation = d.reserve("r", PROMPT)
    assert reservation.num_cached_tokens == cached // 4 * 4
    prefill(p, target_of(reservation))
    first, *_, last = p.run("prefill")
    assert [output.finished for output in (first, last)] == [False, True]
    assert last.outputs[0].finish_reason == "handed_over" and last.num_kv_tokens == len(PROMPT)
    p.rest()
    before = d.num_computed
    expected = p.runner.greedy(PROMPT, 10)
    assert tokens_of([first]) == expected[:1]
    assert d.decode("r", expected[:1], len(PROMPT)) == expected[1:]
    # Nothing of the prompt: a step for each token but the first.
    assert d.num_computed - before == 9
    d.rest()
    # What arrived is found by others, too.
    d.engine.add_request("after", [*PROMPT, 7], SamplingParams(max_tokens=1, **GREEDY))
    assert d.run("after")[-1].num_cached_tokens == 24


def test_prompts_keep_the_target_of_who_is_awaited(make_side: MakeSide) -> None:
    d = make_side(max_num_batched_tokens=64)
    for token, target_s, num_tokens in ((5, math.inf, [40]), (6, 1e-9, [32, 8])):
        # No step is that short: prompts get the least that they always get.
        d.reserve("r", PROMPT, tpot_slo_s=target_s)
        d.runner.steps.clear()
        d.engine.add_request("other", [token] * 40, SamplingParams(max_tokens=1, **GREEDY))
        d.run("other")
        assert [len(step.token_ids) for step in d.runner.steps] == num_tokens
        d.engine.release("r")
        d.rest()


def test_chunks_are_sent_while_the_rest_is_computed(make_side: MakeSide) -> None:
    p, d = make_side(), make_side()
    prefill(p, target_of(d.reserve("r", PROMPT)))
    while p.engine.stats().num_steps < 2:
        p.step()
    assert p.engine.stats().hand_overs is not None and "prefill" not in p.outputs
    # Only what arrives in time for that: a first chunk of 8 tokens is there before the prompt is computed.
    p.event.wait(timeout=60)
    p.engine.abort("prefill")
    assert p.run("prefill")[-1].outputs[0].finish_reason == "abort"
    p.rest()
    expected = p.runner.greedy(PROMPT, 10)
    assert d.decode("r", [], 8) == expected
    d.rest()


@pytest.mark.parametrize("make_engine", [True], indirect=True, ids=["async"])
def test_whoever_was_handed_over_does_not_wait_for_the_steps_of_others(make_side: MakeSide) -> None:
    p, d = make_side(max_num_batched_tokens=32), make_side()
    prefill(p, target_of(d.reserve("r", PROMPT)))
    p.engine.add_request("other", list(range(100, 140)), SamplingParams(max_tokens=4, **GREEDY))
    while "prefill" not in p.outputs:
        p.step()
    assert "other" not in p.outputs
    # A step of the other is under way, and does not end before the hand-over is told.
    p.runner.gate.clear()
    opener = threading.Timer(20.0, p.runner.gate.set)
    opener.start()
    last = p.run("prefill")[-1]
    assert last.finished and last.num_kv_tokens == len(PROMPT)
    assert not p.runner.gate.is_set()
    opener.cancel()
    p.runner.gate.set()
    assert tokens_of(p.run("other")) == p.runner.greedy(list(range(100, 140)), 4)


@pytest.mark.parametrize("arrived", [0, 3, 8, 24, 25, 99])
def test_what_has_not_arrived_is_computed(make_side: MakeSide, arrived: int) -> None:
    p, d = make_side(), make_side()
    prefill(p, target_of(d.reserve("r", PROMPT)))
    p.run("prefill")
    expected = p.runner.greedy(PROMPT, 10)
    assert d.decode("r", expected[:1], arrived) == expected[1:]
    assert d.num_computed == 25 - min(arrived, 25) + 9
    d.rest()


def test_a_request_that_its_first_token_ends_is_not_handed_over(make_side: MakeSide) -> None:
    p, d = make_side(), make_side()
    prefill(p, target_of(d.reserve("r", PROMPT)), max_tokens=1)
    last = p.run("prefill")[-1]
    assert last.outputs[0].finish_reason == "length" and last.num_kv_tokens is None
    revoked = d.engine.release("r")
    assert revoked is not None
    p.rest()
    d.rest()
    assert d.engine.release("r") is None


def steps_to(side: Side, name: str, num_tokens: int) -> list[int]:
    """Steps until a request has so many tokens, which are returned."""
    while len(tokens_of(side.outputs.get(name, []))) < num_tokens:
        side.step()
    return tokens_of(side.outputs[name])


@pytest.mark.parametrize("num_more", [0, 3])
def test_a_sequence_that_decodes_goes_on_elsewhere(make_side: MakeSide, num_more: int) -> None:
    p, d = make_side(), make_side(page_tokens=5)
    p.engine.add_request("long", PROMPT, SamplingParams(max_tokens=12, **GREEDY))
    p.engine.add_request("other", [7, 8, 9], SamplingParams(max_tokens=12, **GREEDY))
    known = steps_to(p, "long", 3)
    reservation = d.reserve("r", [*PROMPT, *known])
    steps_to(p, "long", 3 + num_more)
    p.engine.hand_over("long", target_of(reservation))
    p.engine.hand_over("long", target_of(reservation))
    p.engine.hand_over("unknown", target_of(reservation))
    outputs = p.run("long")
    tokens, last, expected = tokens_of(outputs), outputs[-1], p.runner.greedy(PROMPT, 12)
    assert last.outputs[0].finish_reason == "handed_over" and tokens == expected[: len(tokens)]
    # What there was no room for, and the newest token, are computed there.
    assert last.num_kv_tokens == min(len(PROMPT) + len(known), len(PROMPT) + len(tokens) - 1)
    before = d.num_computed
    assert tokens + d.decode("r", tokens, last.num_kv_tokens, max_tokens=12) == expected
    assert d.num_computed - before == len(PROMPT) + 11 - last.num_kv_tokens
    assert tokens_of(p.run("other")) == p.runner.greedy([7, 8, 9], 12)
    p.rest()
    d.rest()
    stats = p.engine.stats().hand_overs
    assert stats is not None and (stats.num_failed, stats.num_complete) == (0, 1)


def test_what_waits_goes_on_elsewhere_without_kv(make_side: MakeSide) -> None:
    p, d = make_side(num_slots=1), make_side()
    p.engine.add_request("first", [5, 6], SamplingParams(max_tokens=8, **GREEDY))
    p.engine.add_request("second", PROMPT, SamplingParams(max_tokens=10, **GREEDY))
    p.step()
    p.engine.hand_over("second", target_of(d.reserve("r", PROMPT)))
    last = p.run("second")[-1]
    assert (last.outputs[0].finish_reason, last.num_kv_tokens) == ("handed_over", 0)
    assert d.decode("r", [], 0) == p.runner.greedy(PROMPT, 10)
    assert tokens_of(p.run("first")) == p.runner.greedy([5, 6], 8)
    p.rest()
    d.rest()


def test_one_that_ends_meanwhile_is_not_handed_over(make_side: MakeSide) -> None:
    p, d = make_side(), make_side()
    p.engine.add_request("short", PROMPT, SamplingParams(max_tokens=3, **GREEDY))
    known = steps_to(p, "short", 1)
    reservation = d.reserve("r", [*PROMPT, *known])
    steps_to(p, "short", 2)
    p.engine.hand_over("short", target_of(reservation))
    outputs = p.run("short")
    # Its last token may have been on the way.
    num_tokens = 3 if p.engine.config.async_scheduling else 2
    assert tokens_of(outputs) == p.runner.greedy(PROMPT, num_tokens)
    assert outputs[-1].outputs[0].finish_reason == ("length" if num_tokens == 3 else "handed_over")
    p.rest()


def test_a_receiver_that_is_gone_costs_no_request(make_side: MakeSide) -> None:
    p, d = make_side(), make_side()
    target = target_of(d.reserve("r", PROMPT))
    d.engine.close()
    prefill(p, target)
    last = p.run("prefill")[-1]
    assert (last.outputs[0].finish_reason, last.num_kv_tokens) == ("handed_over", 0)
    p.rest()
    stats = p.engine.stats().hand_overs
    assert stats is not None and (stats.num_failed, stats.num_complete) == (1, 0)


def test_an_address_of_nowhere_sends_nothing(make_side: MakeSide) -> None:
    p = make_side()
    target = HandOver(
        transfers=("shm:elsewhere/x",), token=b"t" * 32, num_cached_tokens=4, page_offsets=(0,), page_bytes=1 << 30
    )
    prefill(p, target)
    assert p.run("prefill")[-1].num_kv_tokens == 4
    p.rest()


def test_a_reservation_times_out_and_its_token_is_void(make_side: MakeSide) -> None:
    p, d = make_side(), make_side()
    target = target_of(d.reserve("r", PROMPT))
    d.clock.now_s += 9.0
    d.engine.tend()
    # The same again renews it.
    assert target_of(d.reserve("r", PROMPT)) == target
    d.clock.now_s += 9.0
    assert d.engine.tend() == pytest.approx(1.0)
    assert not d.is_empty
    d.clock.now_s += 1.0
    d.rest()
    assert d.engine.tend() is None
    prefill(p, target)
    assert p.run("prefill")[-1].num_kv_tokens == 0
    expected = p.runner.greedy(PROMPT, 10)
    assert d.decode("r", expected[:1], 25) == expected[1:]
    stats = d.engine.stats().reservations
    assert stats is not None and (stats.num_expired, stats.num_claimed) == (1, 0)


def test_an_id_is_good_for_one_request(make_side: MakeSide) -> None:
    d = make_side()
    d.reserve("r", PROMPT)
    with pytest.raises(ReservationError, match="'r' holds 25 other tokens; choose another"):
        d.reserve("r", PROMPT[1:])
    params = SamplingParams(max_tokens=4, **GREEDY)
    resume = Resume(output_token_ids=[], reservation_id="r")
    other = d.engine.make_request("other", [*PROMPT[1:], 3], params, resume=resume)
    with pytest.raises(ReservationError, match="KV of other tokens"):
        d.engine.claim(other)
    one, two = (d.engine.make_request(name, PROMPT, params, resume=resume) for name in ("one", "two"))
    claimed = d.engine.claim(one)
    assert claimed is not None and d.engine.claim(two) is None
    with pytest.raises(ReservationError, match="is claimed"):
        d.reserve("r", PROMPT)
    claimed.result(timeout=60)
    d.engine.add(one)
    d.engine.add(two)
    for name in ("one", "two"):
        assert tokens_of(d.run(name)) == d.runner.greedy(PROMPT, 4)
    d.rest()


def test_a_claim_that_nobody_takes_times_out(make_side: MakeSide) -> None:
    d = make_side()
    d.reserve("r", PROMPT)
    resume = Resume(output_token_ids=[], reservation_id="r")
    request = d.engine.make_request("one", PROMPT, SamplingParams(max_tokens=4, **GREEDY), resume=resume)
    claimed = d.engine.claim(request)
    assert claimed is not None
    claimed.result(timeout=60)
    d.clock.now_s += 10.0
    d.rest()
    d.engine.add(request)
    assert tokens_of(d.run("one")) == d.runner.greedy(PROMPT, 4)
    d.rest()


def test_reservations_count_as_sequences(make_side: MakeSide) -> None:
    d = make_side(max_num_seqs=3, num_slots=3, total_tokens=512)
    for index in range(3):
        d.reserve(str(index), [index + 3, *PROMPT])
    with pytest.raises(QueueFullError, match="3 sequences have all places of max_num_seqs=3") as caught:
        d.reserve("more", PROMPT)
    assert caught.value.retry_after_s > 0
    d.engine.add_request("waits", PROMPT, SamplingParams(max_tokens=4, **GREEDY))
    d.step()
    assert d.engine.stats().num_running == 0
    d.engine.release("1")
    assert tokens_of(d.run("waits")) == d.runner.greedy(PROMPT, 4)


def test_pages_are_mapped_in_their_own_thread(make_side: MakeSide, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine answers before one of them is, and the KV arrives meanwhile."""
    p, d = make_side(), make_side()
    memory, may_map, mapped_by = d.engine._kv_cache.xtensor.memory, threading.Event(), []
    map_page = memory.map

    def map_later(address: int, page: int) -> None:
        may_map.wait(timeout=30)
        mapped_by.append(threading.current_thread().name.partition("_")[0])
        map_page(address, page)

    monkeypatch.setattr(memory, "map", map_later)
    reservation = d.reserve("r", PROMPT)
    prefill(p, target_of(reservation))
    first, *_, last = p.run("prefill")
    p.rest()
    assert last.num_kv_tokens == len(PROMPT) and not mapped_by
    may_map.set()
    assert d.decode("r", tokens_of([first]), len(PROMPT)) == p.runner.greedy(PROMPT, 10)[1:]
    assert mapped_by[: len(reservation.page_offsets)] == ["xllm-premap"] * len(reservation.page_offsets)
    d.rest()


def test_pages_are_promised_once(make_side: MakeSide) -> None:
    """Whoever runs may grow for as long as admission looks ahead, and so may what is reserved."""
    d = make_side(total_tokens=70, page_tokens=1)
    d.engine.add_request("runs", [5] * 20, SamplingParams(max_tokens=20, **GREEDY))
    for _ in range(5):
        d.step()
    with pytest.raises(QueueFullError, match="do not fit into the KV cache beside 1 sequences"):
        d.reserve("long", [6] * 40)
    d.reserve("short", [6] * 8)
    d.engine.add_request("newcomer", [7] * 10, SamplingParams(max_tokens=30, **GREEDY))
    d.run("runs")
    assert d.engine.stats().num_preemptions == 0
    d.engine.release("short")
    d.run("newcomer")
    d.rest()


def test_aborts_at_any_step_leave_nothing(make_side: MakeSide) -> None:
    p, d = make_side(), make_side()
    for num_steps in range(8):
        prefill(p, target_of(d.reserve("r", PROMPT)))
        for _ in range(num_steps):
            p.engine.tend()
            if p.engine.has_work:
                p.step()
        p.engine.abort("prefill")
        d.engine.release("r")
        p.rest()
        d.rest()
        p.outputs.clear()
    # And nothing of it is left in what others find.
    p.engine.add_request("after", PROMPT, SamplingParams(max_tokens=5, **GREEDY))
    assert tokens_of(p.run("after")) == p.runner.greedy(PROMPT, 5)


class SlowSender:
    """Holds each write until it is let go."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()

    def write(self, token: bytes, ranges: list[ByteRange]) -> None:
        self.began.set()
        assert self.go_on.wait(timeout=60)
        raise TransferError("the peer is gone")

    def close(self) -> None:
        pass


def test_pages_stay_while_they_are_read(make_side: MakeSide, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = SlowSender()
    monkeypatch.setattr("xllm_compile.runtime.transfer.endpoint.connect", lambda *_: sender)
    p, d = make_side(), make_side()
    prefill(p, target_of(d.reserve("r", PROMPT)))
    while not sender.began.is_set():
        p.step()
    p.engine.abort("prefill")
    p.run("prefill")
    used = p.engine.stats()
    assert used.hand_overs is not None and used.hand_overs.num_open == 1 and used.kv_pages["mapped"] > 0
    # Others run meanwhile.
    p.engine.add_request("other", [7] * 9, SamplingParams(max_tokens=4, **GREEDY))
    assert tokens_of(p.run("other")) == p.runner.greedy([7] * 9, 4)
    assert not p.is_empty
    sender.go_on.set()
    p.rest()


def test_preempted_prefills_send_what_they_compute_again(make_side: MakeSide) -> None:
    p, d = make_side(total_tokens=60, page_tokens=1, max_model_len=60), make_side()
    prefill(p, target_of(d.reserve("r", PROMPT)), offline=True)
    p.step()
    p.engine.add_request("online", [5] * 30, SamplingParams(max_tokens=20, **GREEDY))
    p.run("online")
    assert p.engine.stats().num_preemptions == 1
    assert p.run("prefill")[-1].num_kv_tokens == 25
    expected = p.runner.greedy(PROMPT, 10)
    assert d.decode("r", expected[:1], 25) == expected[1:]
    p.rest()
    d.rest()


def test_a_resumed_request_is_handed_over_as_well(make_side: MakeSide) -> None:
    p, d = make_side(), make_side()
    expected = p.runner.greedy(PROMPT, 10)
    target = target_of(d.reserve("r", PROMPT + expected[:4]))
    params = SamplingParams(max_tokens=10, **GREEDY)
    request = p.engine.make_request(
        "prefill", PROMPT, params, resume=Resume(output_token_ids=expected[:4]), hand_over=target
    )
    p.engine.add(request)
    outputs = p.run("prefill")
    assert tokens_of(outputs) == expected[4:5] and outputs[-1].num_kv_tokens == 29
    assert d.decode("r", expected[:5], 29) == expected[5:]
    assert d.num_computed == 5


def test_an_engine_without_transfers_says_so(make_side: MakeSide) -> None:
    side = make_side(transfer=None)
    engine = side.engine
    with pytest.raises(NoTransferError, match="started without --transfer"):
        side.reserve("r", PROMPT)
    target = HandOver(transfers=(), token=b"", num_cached_tokens=0, page_offsets=(0,), page_bytes=1)
    with pytest.raises(NoTransferError, match="started without --transfer"):
        engine.make_request("p", PROMPT, SamplingParams(**GREEDY), hand_over=target)


def test_bad_hand_overs_are_refused(make_side: MakeSide) -> None:
    engine = make_side().engine
    target = HandOver(transfers=(), token=b"", num_cached_tokens=0, page_offsets=(0, 4096), page_bytes=4096)
    with pytest.raises(ValueError, match="pages for 2 tokens, the request has 25"):
        engine.make_request("p", PROMPT, SamplingParams(**GREEDY), hand_over=target)
    with pytest.raises(ValueError, match="n=2 must be 1 with hand_over"):
        engine.make_request("p", [5], SamplingParams(n=2, **GREEDY), hand_over=target)
    with pytest.raises(ValueError, match="0 pages of 4096 bytes"):
        HandOver(transfers=(), token=b"", num_cached_tokens=0, page_offsets=(), page_bytes=4096)


def test_ranges_meet_both_sides_pages() -> None:
    # Pages of 4 bytes at 100 and 104, 200; of 3 bytes at 0, 50, 53.
    found = split_ranges(1, 9, (100, 104, 200), 4, (0, 50, 53), 3)
    assert found == [
        ByteRange(source=101, target=1, num_bytes=2),
        ByteRange(source=103, target=50, num_bytes=5),
        ByteRange(source=200, target=55, num_bytes=1),
    ]
    assert split_ranges(5, 5, (100, 104), 4, (0, 50), 3) == []
