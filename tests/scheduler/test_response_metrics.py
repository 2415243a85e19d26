"""The metrics of an answer: what they count, and that they show only where they were asked for."""

import json
from collections import Counter

from tests.scheduler.test_output_stream import choice, output, play
from xllm_compile.runtime.outputs import RequestMetrics
from xllm_compile.scheduler.grpc_convert import metrics_message
from xllm_compile.scheduler.output_stream import OutputStream
from xllm_compile.scheduler.response_metrics import response_metrics

NO_TIMES = dict.fromkeys(
    ("queue_time_ms", "time_to_first_token_ms", "generation_time_ms", "mean_itl_ms", "tokens_per_second")
)


def metrics_of(**counts):
    return RequestMetrics(
        arrival_s=1.0,
        scheduled_s=1.5,
        first_token_s=2.5,
        last_token_s=5.5,
        num_preemptions=1,
        num_draft_tokens=8,
        num_accepted_tokens=5,
        num_forced_tokens=2,
        graph_steps=Counter(counts),
    )


def test_times_of_one_stream_and_counts():
    assert response_metrics([metrics_of(exact=3, eager=1)], num_choices=1, num_tokens=4) == {
        "queue_time_ms": 500.0,
        "time_to_first_token_ms": 1000.0,
        "generation_time_ms": 3000.0,
        "mean_itl_ms": 1000.0,
        "tokens_per_second": 1.0,
        "num_preemptions": 1,
        "num_draft_tokens": 8,
        "num_accepted_tokens": 5,
        "num_forced_tokens": 2,
        "graph_steps": {"exact": 3, "padded": 0, "dynamic": 0, "eager": 1},
    }


def test_several_streams_have_counts_only():
    found = response_metrics([metrics_of(exact=3), metrics_of(exact=1, padded=2)], num_choices=2, num_tokens=8)
    counts = {
        "num_preemptions": 2,
        "num_draft_tokens": 16,
        "num_accepted_tokens": 10,
        "num_forced_tokens": 4,
        "graph_steps": {"exact": 4, "padded": 2, "dynamic": 0, "eager": 0},
    }
    assert found == NO_TIMES | counts


def test_what_did_not_happen_is_none():
    one_token = response_metrics([metrics_of()], num_choices=1, num_tokens=1)
    assert one_token["mean_itl_ms"] is None and one_token["tokens_per_second"] == 0.25
    none = response_metrics([RequestMetrics(arrival_s=1.0)], num_choices=1, num_tokens=0)
    assert {name: none[name] for name in NO_TIMES} == NO_TIMES


async def test_over_grpc_unset_is_none():
    finished = output(choice(0, "a", [1], "stop"), finished=True)
    finished.metrics = metrics_of(padded=2)
    async with OutputStream([play(finished)], 1) as stream:
        await stream.collect()
        message = metrics_message(stream.metrics)
    assert message.queue_time_ms == 500.0 and not message.HasField("mean_itl_ms")
    assert message.graph_steps.padded == 2 and message.num_preemptions == 1
    assert (message.num_draft_tokens, message.num_accepted_tokens, message.num_forced_tokens) == (8, 5, 2)


async def test_over_http(client):
    body = {"prompt": "abc", "max_tokens": 3, "include_metrics": True}
    answer = (await client.post("/v1/completions", json=body)).json()
    # One step for the prompt, one for each token after the first.
    assert answer["metrics"]["graph_steps"] == {"exact": 3, "padded": 0, "dynamic": 0, "eager": 0}
    assert answer["metrics"]["generation_time_ms"] >= 0 and answer["usage"]["completion_tokens"] == 3
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "include_metrics": True}
    assert (await client.post("/v1/chat/completions", json=chat)).json()["metrics"]["num_preemptions"] == 0
    silent = (await client.post("/v1/completions", json=body | {"include_metrics": False})).json()
    assert "metrics" not in silent


async def test_they_end_a_stream(client):
    for path, prompt in (
        ("/v1/completions", {"prompt": "abc"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        for options in ({}, {"stream_options": {"include_usage": True}}):
            body = {**prompt, **options, "max_tokens": 2, "stream": True, "include_metrics": True}
            lines = (await client.post(path, json=body)).text.split()
            chunks = [json.loads(line) for line in lines if line.startswith("{")]
            assert chunks[-1]["choices"] == [] and chunks[-1]["metrics"]["graph_steps"]["exact"] == 2
            assert ("usage" in chunks[-1]) == bool(options)
            assert not any("metrics" in chunk for chunk in chunks[:-1])
