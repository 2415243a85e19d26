import logging
import socket
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx
import pytest

from xllm_compile.scheduler.http_api import build_app
from xllm_compile.scheduler.tracing import NO_SPAN, NO_TRACING, _Exporter, check_endpoint, current_span, open_tracing

CLIENT_TRACE, CLIENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01", "tracestate": "vendor=value"}
BODY = {"model": "counter", "prompt": "ab", "max_tokens": 4, "temperature": 0}


@pytest.fixture
def receiver():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="OpenTelemetry is not installed")
    from tests.otlp_receiver import otlp_receiver

    with otlp_receiver() as receiver:
        yield receiver


@pytest.fixture
def tracing(receiver, service):
    service.tracing = open_tracing(receiver.endpoint, service_name="xllm-server", instance_name="here")
    yield service.tracing
    service.tracing.close()


def test_untraced_requests_have_no_span():
    with NO_TRACING.request("POST /v1/completions", HEADERS) as span:
        assert span is NO_SPAN and current_span() is NO_SPAN
        with span.child("part") as part:
            assert part is NO_SPAN and part.carrier == {} and not part.is_recording
            part.add({"count": 1})
    NO_TRACING.close()


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("collector", "no address"),
        ("collector:4317", "no address"),
        ("udp://collector:4317", "no address"),
        ("grpc://collector", "no address"),
        ("grpc://collector:port", "no address"),
        ("http://collector:4318", "over HTTP"),
        ("http://collector:4317/v1/traces", "over HTTP"),
    ],
)
def test_an_endpoint_that_is_none_is_said(endpoint, said):
    with pytest.raises(ValueError, match=f"--otlp-traces-endpoint {endpoint}.*{said}"):
        open_tracing(endpoint, service_name="x", instance_name="y")


def test_tls_goes_by_the_scheme():
    assert check_endpoint("grpc://collector:4317") == check_endpoint("http://collector:4317") == "http://collector:4317"
    assert check_endpoint("grpcs://[::1]:4317") == "https://[::1]:4317"


def test_missing_packages_are_named(monkeypatch):
    for name in ("opentelemetry", "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"pip install 'xllm-compile\[otel\]'"):
        open_tracing("grpc://collector:4317", service_name="x", instance_name="y")


async def test_a_request_is_part_of_its_clients_trace(client, tracing, receiver):
    answer = await client.post("/v1/completions", json=BODY, headers=HEADERS)
    assert answer.json()["choices"][0]["text"] == "cdef"
    tracing.close()
    request = receiver.one("POST /v1/completions")
    assert (request.trace_id, request.parent_id, request.kind) == (CLIENT_TRACE, CLIENT_SPAN, "SERVER")
    assert (request.service, request.instance) == ("xllm-server", "here")
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "counter",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ["length"],
        "xllm.outcome": "ok",
    }
    assert expected.items() <= request.attributes.items()
    latencies = {name: value for name, value in request.attributes.items() if name.startswith("gen_ai.latency.")}
    assert 0 < latencies["gen_ai.latency.time_to_first_token"] <= latencies["gen_ai.latency.e2e"]
    phases = receiver.children(request)
    queue, prefill, decode = (phases.pop(name) for name in ("queue", "prefill", "decode"))
    assert not phases
    ordered = [
        *(request.begin_ns, queue.begin_ns, queue.end_ns, prefill.begin_ns, prefill.end_ns),
        *(decode.begin_ns, decode.end_ns, request.end_ns),
    ]
    # The clocks of a span's end and of an engine's time differ by less than this.
    assert all(later - earlier > -1_000_000 for earlier, later in pairwise(ordered))


async def test_all_prompts_of_a_request_count(client, tracing, receiver):
    await client.post("/v1/completions", json=BODY | {"prompt": ["ab", "xyz"]})
    tracing.close()
    request = receiver.one("POST /v1/completions")
    assert request.parent_id == "" and len(receiver.named("prefill")) == 2
    assert request.attributes["gen_ai.usage.input_tokens"] == 5
    assert request.attributes["gen_ai.usage.output_tokens"] == 8


@pytest.mark.parametrize("header", ["nonsense", f"00-{'0' * 32}-{CLIENT_SPAN}-01", f"ff-{CLIENT_TRACE}"])
async def test_a_bad_traceparent_begins_a_trace_of_its_own(client, tracing, receiver, header):
    answer = await client.post("/v1/completions", json=BODY, headers={"traceparent": header})
    assert answer.status_code == 200
    tracing.close()
    request = receiver.one("POST /v1/completions")
    assert request.parent_id == "" and request.trace_id != CLIENT_TRACE


async def test_a_trace_that_its_client_does_not_sample_is_passed_on_only(client, tracing, receiver):
    unsampled = {"traceparent": f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-00"}
    await client.post("/v1/completions", json=BODY, headers=unsampled)
    with tracing.request("request", unsampled) as span:
        assert span.child("part").carrier["traceparent"].startswith(f"00-{CLIENT_TRACE}-")
        assert span.child("part").carrier["traceparent"].endswith("-00")
    tracing.close()
    assert receiver.spans == []


async def test_how_requests_end_is_said(client, tracing, receiver, service, runner):
    assert (await client.post("/v1/completions", json=BODY | {"max_tokens": 0, "n": -1})).status_code == 400
    service.is_draining = True
    assert (await client.post("/v1/chat/completions", json={})).status_code == 503
    service.is_draining = False
    runner.error = RuntimeError("broken")
    transport = httpx.ASGITransport(app=build_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as tolerant:
        assert (await tolerant.post("/v1/embeddings", json={"input": "ab"})).status_code in (500, 503)
    tracing.close()
    outcomes = {span.name: (span.attributes["xllm.outcome"], span.is_error) for span in receiver.spans}
    assert outcomes["POST /v1/completions"] == outcomes["POST /v1/chat/completions"] == ("refused", False)
    assert outcomes["POST /v1/embeddings"][0] in ("error", "refused")


def test_a_part_that_fails_says_why(tracing, receiver):
    with tracing.request("request", {}) as span, pytest.raises(ValueError), span.child("part"):
        raise ValueError("too long")
    tracing.close()
    part = receiver.one("part")
    assert part.is_error and part.parent_id == receiver.one("request").span_id


@dataclass
class ScriptedExporter:
    """Takes spans, or not."""

    answers: list[bool]
    spans: list[Any] = field(default_factory=list)

    def export(self, spans):
        from opentelemetry.sdk.trace.export import SpanExportResult

        logging.getLogger("opentelemetry.exporter").error("connection refused")
        return SpanExportResult.SUCCESS if self.answers.pop(0) else SpanExportResult.FAILURE

    def shutdown(self):
        self.answers = []


def test_a_receiver_that_is_gone_is_said_once(caplog):
    pytest.importorskip("opentelemetry.sdk")
    exporter = _Exporter(ScriptedExporter([True, False, False, True, False]), "grpc://collector:4317")
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            exporter.export([])
        # Of one that fails nothing more is waited for at the end.
        exporter.hurry()
        exporter.export([])
    exporter.shutdown()
    said = [record.getMessage() for record in caplog.records]
    assert [text.split()[1] for text in said] == ["are", "arrive", "are"]
    assert "grpc://collector:4317" in said[0] and "connection refused" in said[0]


def test_nobody_there_loses_spans_only(caplog, monkeypatch):
    pytest.importorskip("opentelemetry.sdk")
    monkeypatch.setattr("xllm_compile.scheduler.tracing.EXPORT_TIMEOUT_S", 0.5)
    monkeypatch.setattr("xllm_compile.scheduler.tracing.MAX_QUEUED_SPANS", 600)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"grpc://127.0.0.1:{taken.getsockname()[1]}"
        tracing = open_tracing(endpoint, service_name="x", instance_name="y")
        # More than the queue holds, while the first of them are being tried.
        for _ in range(5000):
            with tracing.request("request", {}):
                pass
        tracing.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert endpoint in caplog.text
