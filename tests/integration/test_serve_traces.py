"""One trace of a request through a gateway and its instances, at a real OTLP receiver."""

import signal
from functools import partial

import httpx
import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="OpenTelemetry is not installed")

from tests.integration.cluster_processes import NUM_TOKENS, Stream, busiest, clusters
from tests.integration.helpers import PROMPT, until
from tests.integration.serve_process import ServeProcess
from tests.otlp_receiver import otlp_receiver

pytestmark = pytest.mark.integration

CLIENT_TRACE, CLIENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01"}


@pytest.fixture
def receiver(monkeypatch):
    # What a user would set to see spans sooner than after 5 s.
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with otlp_receiver() as receiver:
        yield receiver


@pytest.fixture
def start_cluster(family_artifact, receiver):
    options = ("--otlp-traces-endpoint", receiver.endpoint)
    with clusters(family_artifact("qwen3")) as start:
        yield partial(start, options=options, gateway_options=options)


def until_ended(receiver, *services):
    """Each sends its spans in the order in which they ended, and at its own pace: a request's own ends last."""
    last = dict.fromkeys(services, "xllm.v1.Instance/Run") | {"xllm-gateway": "POST /v1/completions"}
    until(lambda: all(receiver.named(name, service) for service, name in last.items()))


def test_a_trace_spans_gateway_prefill_and_decode(start_cluster, receiver):
    cluster = start_cluster("prefill", "decode")
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    httpx.post(f"{cluster.gateway.http}/v1/completions", json=body, headers=HEADERS, timeout=120).raise_for_status()
    until_ended(receiver, "xllm-gateway", "xllm-prefill", "xllm-decode")
    assert {span.trace_id for span in receiver.spans} == {CLIENT_TRACE}

    request = receiver.one("POST /v1/completions", "xllm-gateway")
    assert request.parent_id == CLIENT_SPAN
    assert request.attributes["gen_ai.usage.output_tokens"] == 24
    assert request.attributes["gen_ai.latency.time_to_first_token"] > 0
    (placement,) = receiver.children(request).values()
    assert placement.name == "placement"
    calls = receiver.children(placement)
    assert sorted(calls, key=lambda name: calls[name].begin_ns) == ["reserve", "prefill", "decode"]
    assert [calls[name].attributes["xllm.instance"] for name in calls] == [
        "decode-1" if name != "prefill" else "prefill-0" for name in calls
    ]

    reserved = receiver.one("xllm.v1.Instance/Reserve", "xllm-decode")
    assert reserved.parent_id == calls["reserve"].span_id and reserved.instance == "decode-1"
    prefill = receiver.one("xllm.v1.Instance/Run", "xllm-prefill")
    assert prefill.parent_id == calls["prefill"].span_id
    phases = receiver.children(prefill)
    assert set(phases) == {"queue", "prefill", "decode", "kv_hand_over"}
    assert phases["kv_hand_over"].attributes["xllm.kv.num_bytes"] > 0
    # All of the prompt; of the token that came of it nothing is computed.
    num_prompt = request.attributes["gen_ai.usage.input_tokens"]
    assert phases["kv_hand_over"].attributes["xllm.kv.num_tokens"] == num_prompt
    decode = receiver.one("xllm.v1.Instance/Run", "xllm-decode")
    assert decode.parent_id == calls["decode"].span_id
    phases = receiver.children(decode)
    assert set(phases) == {"queue", "resume", "decode"}
    # It began with what had arrived.
    assert decode.attributes["gen_ai.usage.output_tokens"] == 23


def test_a_trace_shows_a_lost_instance_and_who_went_on(start_cluster, receiver):
    cluster = start_cluster("mix", "mix")
    stream = Stream(cluster.gateway, PROMPT)
    until(lambda: stream.text)
    lost = busiest(cluster)
    cluster.instances[lost].send(signal.SIGKILL)
    assert stream.result()
    until_ended(receiver, "xllm-gateway", "xllm-mix")
    request = receiver.one("POST /v1/completions")
    parts = receiver.children(request)
    assert set(parts) == {"placement", "resume"}
    assert parts["placement"].is_error and not parts["resume"].is_error
    (first,) = receiver.children(parts["placement"]).values()
    (second,) = receiver.children(parts["resume"]).values()
    assert first.name == second.name == "generate"
    assert (first.is_error, first.attributes["xllm.instance"]) == (True, lost)
    assert (second.is_error, second.attributes["xllm.instance"] != lost) == (False, True)
    num_resumed = parts["resume"].attributes["xllm.num_resumed_tokens"]
    assert 0 < num_resumed < request.attributes["gen_ai.usage.output_tokens"] == NUM_TOKENS
    (run,) = receiver.children(second).values()
    assert run.attributes["gen_ai.usage.output_tokens"] == NUM_TOKENS - num_resumed


def test_a_grpc_request_carries_its_trace_too(family_artifact, receiver):
    import grpc

    from xllm_compile.scheduler.proto import xllm_pb2, xllm_pb2_grpc

    with ServeProcess(family_artifact("qwen3"), "--otlp-traces-endpoint", receiver.endpoint) as server:
        with grpc.insecure_channel(server.grpc) as channel:
            request = xllm_pb2.GenerateRequest(text=PROMPT, sampling=xllm_pb2.SamplingParams(max_tokens=2))
            stub = xllm_pb2_grpc.InferenceStub(channel)
            assert list(stub.Generate(request, metadata=tuple(HEADERS.items())))
        server.send(signal.SIGTERM)
        assert server.wait() == 0
    # Sent when the process ended at the latest.
    span = receiver.one("xllm.v1.Inference/Generate", "xllm-server")
    assert (span.trace_id, span.parent_id) == (CLIENT_TRACE, CLIENT_SPAN)
    assert span.attributes["gen_ai.usage.output_tokens"] == 2


def test_serving_does_not_wait_for_a_receiver_that_is_not_there(family_artifact):
    with ServeProcess(family_artifact("qwen3"), "--otlp-traces-endpoint", "grpc://127.0.0.1:9") as server:
        for _ in range(3):
            answer = httpx.post(f"{server.http}/v1/completions", json={"prompt": PROMPT, "max_tokens": 4}, timeout=60)
            answer.raise_for_status()
        server.send(signal.SIGTERM)
        assert server.wait() == 0
    said = [line for line in server.log if "traces" in line]
    assert len(said) == 1 and "grpc://127.0.0.1:9" in said[0]
    assert not any("Traceback" in line for line in server.log)
