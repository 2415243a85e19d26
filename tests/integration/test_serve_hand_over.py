"""Two xllm-serve processes, prefill and decode: the test is their gateway. Every message may be the last one."""

import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from tests.integration.helpers import until
from tests.integration.serve_process import ServeProcess, run_refused
from xllm_compile.scheduler.proto import xllm_pb2, xllm_pb2_grpc

pytestmark = pytest.mark.integration

# A few chunks of 256 tokens.
PROMPT = [(7 * index * index + 3 * index) % 4000 + 5 for index in range(700)]
OPTIONS = ("--max-num-seqs", "4", "--kv-memory", "64MiB")
NUM_TOKENS = 12


@dataclass(frozen=True)
class Peer:
    """A process, and what speaks to it."""

    process: ServeProcess
    instance: Any
    inference: Any
    info: Any

    def load(self) -> Any:
        return next(self.instance.WatchLoad(xllm_pb2.WatchLoadRequest()))

    def is_empty(self) -> bool:
        """No page, place or request is held."""
        metrics = self.process.metrics()
        names = (
            "xllm_kv_reservations_open",
            "xllm_kv_hand_overs_open",
            "xllm_kv_cache_tokens_used",
            'xllm_kv_pages{state="mapped"}',
            "xllm_num_requests_running",
            "xllm_num_requests_waiting",
            "xllm_open_streams",
        )
        return not any(metrics[name] for name in names)


@contextmanager
def peer(artifact: Any, role: str, *options: str) -> Iterator[Peer]:
    with (
        ServeProcess(artifact, "--role", role, *OPTIONS, *options) as process,
        grpc.insecure_channel(process.grpc) as channel,
    ):
        instance = xllm_pb2_grpc.InstanceStub(channel)
        info = instance.GetInstanceInfo(xllm_pb2.GetInstanceInfoRequest())
        yield Peer(process, instance, xllm_pb2_grpc.InferenceStub(channel), info)


@pytest.fixture(scope="module")
def artifact(family_artifact):
    """float32: the same tokens whoever computes them."""
    return family_artifact("qwen3")


@pytest.fixture(scope="module", params=["shm", "tcp"])
def pair(artifact, request):
    """P and D that live as long as nobody kills them."""
    secret = ("--transfer", request.param, "--transfer-secret", "hush")
    with peer(artifact, "prefill", *secret) as p, peer(artifact, "decode", *secret) as d:
        yield p, d


@pytest.fixture(scope="module")
def expected(pair):
    """What one instance makes of the prompt."""
    (answer,) = pair[0].inference.Generate(request_of(final_only=True))
    return list(answer.choices[0].token_ids)


@pytest.fixture(autouse=True)
def nothing_stays(request):
    yield
    if "pair" in request.fixturenames:
        for side in request.getfixturevalue("pair"):
            until(side.is_empty)


def request_of(prompt=PROMPT, max_tokens=NUM_TOKENS, **fields):
    sampling = xllm_pb2.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    given: dict[str, Any] = {"token_ids": xllm_pb2.TokenIds(ids=prompt), "sampling": sampling} | fields
    return xllm_pb2.GenerateRequest(**given)


def reserve(d, prompt=PROMPT, timeout_ms=30_000, **fields):
    given = {"weights_key": d.info.weights_key, "kv_layout": d.info.kv_layout, "timeout_ms": timeout_ms} | fields
    given.setdefault("reservation_id", uuid.uuid4().hex)
    return d.instance.Reserve(xllm_pb2.ReserveRequest(token_ids=prompt, **given), timeout=60)


def release(d, reservation):
    return d.instance.Release(xllm_pb2.ReleaseRequest(reservation_id=reservation.reservation_id), timeout=60).was_open


def hand_over(p, reservation, prompt=PROMPT, **fields):
    return p.inference.Generate(
        request_of(prompt, hand_over=xllm_pb2.HandOver(reservation=reservation), **fields), timeout=120
    )


def tokens_of(responses):
    return [token for response in responses for choice in response.choices for token in choice.token_ids]


def resume(d, reservation, tokens, num_kv_tokens, prompt=PROMPT, **fields):
    done = xllm_pb2.Resume(
        output_token_ids=tokens, reservation_id=reservation.reservation_id, num_kv_tokens=num_kv_tokens
    )
    return d.inference.Generate(request_of(prompt, resume=done, **fields), timeout=120)


def test_the_tokens_of_one_instance(pair, expected):
    p, d = pair
    prompt = [9, *PROMPT]
    (alone,) = p.inference.Generate(request_of(prompt, final_only=True))
    reservation = reserve(d, prompt)
    assert reservation.incarnation == d.info.incarnation and list(reservation.transfers) == list(d.info.transfers)
    *first, last = hand_over(p, reservation, prompt)
    assert last.num_kv_tokens == len(prompt)
    assert [choice.finish_reason for choice in last.choices] in ([], [xllm_pb2.FINISH_REASON_HANDED_OVER])
    tokens = tokens_of([*first, last])
    steps = d.process.metrics()["xllm_engine_steps_total"]
    *_, end = rest = list(resume(d, reservation, tokens, last.num_kv_tokens, prompt))
    assert tokens + tokens_of(rest) == list(alone.choices[0].token_ids)
    assert end.usage.completion_tokens == NUM_TOKENS
    # Not one step for the prompt.
    assert d.process.metrics()["xllm_engine_steps_total"] - steps == NUM_TOKENS - 1


def test_only_what_the_receiver_lacks_is_sent(pair):
    p, d = pair
    prefix = [11, *PROMPT[:300]]
    list(d.inference.Generate(request_of(prefix, 1)))
    prompt = [*prefix, *range(500, 800)]
    reservation = reserve(d, prompt)
    assert 288 <= reservation.num_cached_tokens <= 301
    sent = p.process.metrics()["xllm_kv_sent_bytes_total"]
    *first, last = hand_over(p, reservation, prompt)
    tokens = tokens_of([*first, last])
    num_tokens = len(prompt) - reservation.num_cached_tokens
    bytes_per_token = 2 * 3 * 2 * 24 * 4
    assert p.process.metrics()["xllm_kv_sent_bytes_total"] - sent == num_tokens * bytes_per_token
    (alone,) = p.inference.Generate(request_of(prompt, final_only=True))
    assert tokens + tokens_of(resume(d, reservation, tokens, last.num_kv_tokens, prompt)) == list(
        alone.choices[0].token_ids
    )


def test_text_seed_and_stop_string_of_one_instance(pair):
    p, d = pair
    options: dict[str, Any] = {"temperature": 1, "seed": 5, "max_tokens": NUM_TOKENS, "ignore_eos": True, "logprobs": 1}
    (whole,) = p.inference.Generate(request_of(sampling=xllm_pb2.SamplingParams(**options), final_only=True))
    # Begins with the first token's text, which is held back for it.
    stop = whole.choices[0].text[:-2]
    sampling = xllm_pb2.SamplingParams(**options, stop=[stop], include_stop_str_in_output=True)
    (alone,) = p.inference.Generate(request_of(sampling=sampling, final_only=True))
    assert alone.choices[0].stop_string == stop
    reservation = reserve(d)
    *first, last = hand_over(p, reservation, sampling=sampling)
    tokens = tokens_of([*first, last])
    text = "".join(choice.text for response in (*first, last) for choice in response.choices)
    done = xllm_pb2.Resume(
        output_token_ids=tokens,
        num_text_chars=len(text),
        reservation_id=reservation.reservation_id,
        num_kv_tokens=last.num_kv_tokens,
    )
    rest = list(d.inference.Generate(request_of(sampling=sampling, resume=done)))
    assert tokens + tokens_of(rest) == list(alone.choices[0].token_ids)
    text += "".join(choice.text for response in rest for choice in response.choices)
    assert text == alone.choices[0].text


@pytest.mark.parametrize("moment", ["reserved", "prefilling", "first token", "handed over", "decoding"])
@pytest.mark.parametrize("side", ["release first", "cancel first"])
def test_a_client_that_leaves_at_any_moment(pair, expected, moment, side):
    p, d = pair
    reservation = reserve(d)
    calls = []
    if moment != "reserved":
        prefill = hand_over(p, reservation)
        calls.append(prefill)
        if moment == "first token":
            next(prefill)
        if moment in ("handed over", "decoding"):
            *first, last = prefill
            if moment == "decoding":
                decode = resume(d, reservation, tokens_of([*first, last]), last.num_kv_tokens, max_tokens=400)
                next(decode)
                calls.append(decode)
    actions = [lambda: release(d, reservation), *(call.cancel for call in calls)]
    for action in actions if side == "release first" else reversed(actions):
        action()
    # Releasing again is no error.
    assert not release(d, reservation)
    for each in pair:
        until(each.is_empty)
    # Nothing wrong is found by those who come after.
    for each in pair:
        (answer,) = each.inference.Generate(request_of(final_only=True))
        assert list(answer.choices[0].token_ids) == expected


def test_a_reservation_that_nobody_claims_ends(pair, expected):
    p, d = pair
    reservation = reserve(d, timeout_ms=50)
    until(d.is_empty)
    *first, last = hand_over(p, reservation)
    assert last.num_kv_tokens == reservation.num_cached_tokens
    tokens = tokens_of([*first, last])
    assert tokens + tokens_of(resume(d, reservation, tokens, last.num_kv_tokens)) == expected


def test_one_reservation_serves_one_request(pair, expected):
    p, d = pair
    reservation = reserve(d)
    *first, last = hand_over(p, reservation)
    tokens = tokens_of([*first, last])
    calls = [resume(d, reservation, tokens, last.num_kv_tokens) for _ in range(3)]
    found: list[list[int]] = [[] for _ in calls]

    def read(index: int) -> None:
        found[index] = tokens_of(calls[index])

    threads = [threading.Thread(target=read, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == [expected[len(tokens) :]] * 3


def test_refusals_have_their_codes(pair):
    p, d = pair

    def code(function, *args, **fields):
        with pytest.raises(grpc.RpcError) as caught:
            list(function(*args, **fields))
        return caught.value.code().name, caught.value.details()

    name, details = code(reserve, d, kv_layout="other")
    assert name == "FAILED_PRECONDITION" and "kv_layout='other'" in details and d.info.kv_layout in details
    assert code(reserve, d, weights_key="other")[0] == "FAILED_PRECONDITION"
    assert code(reserve, d, prompt=[])[0] == "INVALID_ARGUMENT"
    assert code(reserve, d, reservation_id="")[0] == "INVALID_ARGUMENT"
    assert code(reserve, d, timeout_ms=3_600_000)[0] == "INVALID_ARGUMENT"
    assert code(hand_over, p, xllm_pb2.Reservation())[0] == "INVALID_ARGUMENT"
    held = [reserve(d) for _ in range(4)]
    with pytest.raises(grpc.RpcError) as caught:
        reserve(d)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "retry-after" in [entry.key for entry in caught.value.trailing_metadata()]
    assert d.load().kv_tokens_used == 4 * len(PROMPT)
    for reservation in held:
        assert release(d, reservation)


def test_what_an_instance_says_of_itself(pair):
    p, d = pair
    assert (p.info.role, d.info.role) == ("prefill", "decode")
    assert p.info.incarnation != d.info.incarnation and p.info.name != d.info.name
    assert (p.info.weights_key, p.info.kv_layout) == (d.info.weights_key, d.info.kv_layout)
    assert d.info.address == d.process.grpc and d.info.is_ready and d.info.transfers
    assert (d.info.max_num_seqs, d.info.max_num_batched_tokens, d.info.block_tokens) == (4, 256, 16)
    load = d.load()
    assert load.incarnation == d.info.incarnation
    assert list(load.profile.num_tokens) == [1, 2, 4, 8, 16, 32, 64, 128, 256] and load.profile.seconds[-1] > 0
    list(d.inference.Generate(request_of([5, 6, 7])))
    until(lambda: d.load().num_running == 0)
    load = d.load()
    assert load.ttft_s > 0 and load.tpot_s > 0


def test_a_prefill_that_is_killed_costs_time_only(artifact, expected):
    with peer(artifact, "decode") as d:
        with peer(artifact, "prefill") as p:
            reservation = reserve(d)
            # It waits for the receiver: the end of the hand-over cannot come first.
            d.process.send(signal.SIGSTOP)
            call = hand_over(p, reservation)
            assert tokens_of([next(call)]) == expected[:1]
            p.process.send(signal.SIGKILL)
            with pytest.raises(grpc.RpcError):
                list(call)
            d.process.send(signal.SIGCONT)
        # Nobody knows what has arrived: nothing counts.
        assert tokens_of(resume(d, reservation, expected[:1], 0)) == expected[1:]
        until(d.is_empty)


def test_a_decode_that_is_killed_ends_the_prefill_cleanly(artifact, expected):
    with peer(artifact, "prefill") as p:
        with peer(artifact, "decode") as d:
            reservation = reserve(d)
            d.process.send(signal.SIGKILL)
            d.process.wait()
        *first, last = hand_over(p, reservation)
        assert tokens_of([*first, last]) == expected[:1]
        assert last.num_kv_tokens == 0
        until(p.is_empty)
        (answer,) = p.inference.Generate(request_of(final_only=True))
        assert list(answer.choices[0].token_ids) == expected


def test_options_that_do_not_go_together(artifact):
    assert "--role prefill needs a way" in run_refused(artifact, "--role", "prefill", "--transfer", "none")
    assert "is for an instance of a service; add --role" in run_refused(artifact, "--transfer", "shm")
    assert "KV transfer pigeon" in run_refused(artifact, "--role", "decode", "--transfer", "pigeon")
    everywhere = ("--role", "decode", "--transfer-host", "0.0.0.0")
    assert "give --transfer-secret" in run_refused(artifact, *everywhere)
    assert "name an address" in run_refused(artifact, *everywhere, "--transfer-secret", "hush")


def test_an_instance_without_transfers_says_so(artifact):
    with peer(artifact, "mix", "--transfer", "none") as alone:
        assert not alone.info.transfers
        for call in (
            lambda: reserve(alone),
            lambda: list(hand_over(alone, xllm_pb2.Reservation(page_offsets=[0], page_bytes=1 << 30))),
        ):
            with pytest.raises(grpc.RpcError, match="neither takes nor sends KV") as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
