"""Faults are planned from their seed; what became of a request is told by its error and the faults of its gateway."""

from random import Random

import pytest

from xllm_compile.benchmarks.chaos_faults import Fault, Parts, plan_faults
from xllm_compile.benchmarks.chaos_report import Answer, Disturbance, Outcome, Prompt, Tally, bars_of, recoveries_s
from xllm_compile.benchmarks.openai_client import StreamResult

PARTS = Parts(instances=("mix-0", "prefill-1", "decode-2"), gateways=("gateway-0", "gateway-1"), etcd=("etcd-0",))


def fault(kind, action, target):
    return Fault(kind=kind, action=action, targets=(target,), pause_s=0)


def answer(*token_times, sent=0.0, error=None, text="a", gateway="gateway-0", retry_after_s=None):
    ended = token_times[-1] if token_times else sent
    result = StreamResult(
        sent=sent, token_times=list(token_times), ended=ended, text=text, error=error, retry_after_s=retry_after_s
    )
    return Answer(prompt=Prompt(token_ids=[1], num_tokens=1, text="a"), gateway=gateway, result=result)


def test_recovery_is_the_pause_of_the_streams_that_paused():
    paused = answer(1.0, 1.1, 1.2, 3.2, 3.3, 3.4)
    unhurt = answer(1.0, 1.1, 1.2, 1.3, 1.4)
    later = answer(5.0, 5.1, 5.2)
    stood_still = answer(0.1, 0.2, 0.3, 2.2, 2.3, 2.4)
    tally = Tally(
        answers=[paused, unhurt, later, stood_still],
        disturbances=[
            Disturbance(fault=fault("instance killed", "kill", "mix-0"), at_s=1.25),
            Disturbance(fault=fault("etcd killed", "kill", "etcd-0"), at_s=1.25),
        ],
    )
    assert recoveries_s(tally, "instance killed") == [3.2 - 1.25]
    assert recoveries_s(tally, "instance stopped") == []


def test_the_same_seed_brings_the_same_faults():
    plans = [plan_faults(Random(seed), 600, PARTS, with_network=True) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_a_long_plan_has_every_kind_and_ends_in_time():
    plan = plan_faults(Random(3), 600, PARTS, with_network=True)
    assert sum(each.pause_s + each.lasts_s for each in plan) <= 600
    kinds = {each.kind for each in plan}
    assert {kind.split()[0] for kind in kinds} == {"instance", "gateway", "etcd"}
    assert {"instance killed", "instance stopped", "instance drained", "instance cut off from gateways"} <= kinds
    assert {"gateway killed", "gateway cut off from instances", "etcd killed"} <= kinds
    cuts = [each for each in plan if each.action == "cut"]
    # Some lose both ways, some one way only.
    both = [set(each.cuts) == {(target, source) for source, target in each.cuts} for each in cuts]
    assert any(both) and not all(both)
    assert all(each.targets[0] in pair for each in cuts for pair in each.cuts)
    assert all(source != target for each in cuts for source, target in each.cuts)


def test_without_a_network_nothing_is_cut():
    assert all(not each.cuts for each in plan_faults(Random(3), 600, PARTS, with_network=False))


@pytest.mark.parametrize(
    ("one", "where"),
    [
        (answer(1.0), "good"),
        (answer(1.0, text="b"), "wrong"),
        (answer(1.0, error="the connection ended before the stream did"), "lost"),
        (answer(error="HTTP/1.1 429", retry_after_s=1.0), "refused"),
        (answer(error="HTTP/1.1 503"), "lost"),
        # Its gateway is killed at 5 and back at 9, drained at 50 and back at 99.
        (answer(6.0, sent=4.0, error="ConnectionResetError"), "cut"),
        (answer(6.0, sent=4.0, error="ConnectionResetError", gateway="gateway-1"), "lost"),
        (answer(4.5, sent=4.0, error="ConnectionResetError"), "lost"),
        (answer(sent=6.0, error="ConnectionRefusedError"), "cut"),
        (answer(sent=51.0, error="ConnectionRefusedError"), "cut"),
        (answer(sent=98.0, error="ConnectionRefusedError"), "cut"),
        (answer(51.0, sent=49.0, error="ConnectionResetError"), "lost"),
        (answer(sent=30.0, error="ConnectionRefusedError"), "lost"),
    ],
)
def test_what_became_of_a_request(one, where):
    tally = Tally(
        answers=[one],
        disturbances=[
            Disturbance(fault=fault("gateway killed", "kill", "gateway-0"), at_s=5.0, over_s=9.0),
            Disturbance(fault=fault("gateway drained", "drain", "gateway-0"), at_s=50.0, over_s=99.0),
        ],
    )
    outcome = Outcome.of(tally)
    assert getattr(outcome, where) == [one]
    assert sum(len(getattr(outcome, name)) for name in ("good", "wrong", "cut", "refused", "lost")) == 1


def test_requests_that_nobody_answered_have_failed_and_what_is_held_is_counted():
    bars = {bar.what: bar for bar in bars_of(Tally(num_unanswered=2), {"mix-0": {"xllm_open_streams": 1.0}})}
    assert not bars["requests that failed"].met and bars["requests that failed"].value == 2
    assert not bars["pages, tokens, streams and reservations held at rest"].met
