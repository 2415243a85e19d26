"""xllm-serve as a process, used through gRPC."""

import signal
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.integration.helpers import PROMPT, until
from tests.integration.serve_process import ServeProcess
from xllm_compile.scheduler.proto import xllm_pb2, xllm_pb2_grpc

pytestmark = pytest.mark.integration

SERVICE = "xllm.v1.Inference"


@pytest.fixture(scope="module")
def server(demo_artifact):
    with ServeProcess(demo_artifact, "--served-model-name", "demo", "--max-num-seqs", "8") as server:
        yield server


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.grpc) as channel:
        yield channel


@pytest.fixture
def stub(channel):
    return xllm_pb2_grpc.InferenceStub(channel)


def request_of(max_tokens=16, n=1, **fields):
    sampling = xllm_pb2.SamplingParams(temperature=0, max_tokens=max_tokens, n=n, ignore_eos=True)
    given: dict[str, Any] = {"text": PROMPT, "sampling": sampling} | fields
    return xllm_pb2.GenerateRequest(**given)


def long_request(**fields):
    """Thousands of tokens: still running when a test looks, whatever the machine."""
    return request_of(450, 8, **fields)


def code_of(call):
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value.code()


def test_embeddings_are_those_of_http(server, stub):
    answer = stub.Embed(xllm_pb2.EmbedRequest(text=PROMPT, pooling=xllm_pb2.POOLING_MEAN))
    body = {"input": PROMPT, "pooling": "mean"}
    over_http = httpx.post(f"{server.http}/v1/embeddings", json=body).json()
    assert list(answer.embedding) == pytest.approx(over_http["data"][0]["embedding"], abs=1e-6)
    assert answer.usage.prompt_tokens == over_http["usage"]["prompt_tokens"] > 0
    with pytest.raises(grpc.RpcError) as caught:
        stub.Embed(xllm_pb2.EmbedRequest(text=PROMPT, dimensions=100_000))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_stream_adds_up_to_the_final_answer_and_to_http(server, stub):
    *pieces, last = stub.Generate(request_of())
    text = "".join(choice.text for piece in pieces for choice in piece.choices)
    (final,) = stub.Generate(request_of(final_only=True))
    assert final.choices[0].text == text
    assert final.choices[0].finish_reason == xllm_pb2.FINISH_REASON_LENGTH
    assert final.usage == last.usage
    assert last.usage.completion_tokens == 16
    body = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    assert httpx.post(f"{server.http}/v1/completions", json=body).json()["choices"][0]["text"] == text


def test_token_ids_chat_and_logprobs(stub):
    (whole,) = stub.Generate(request_of(final_only=True))
    ids = xllm_pb2.TokenIds(ids=whole.choices[0].token_ids)
    sampling = xllm_pb2.SamplingParams(temperature=0, max_tokens=4, logprobs=2, ignore_eos=True)
    (answer,) = stub.Generate(xllm_pb2.GenerateRequest(token_ids=ids, sampling=sampling, final_only=True))
    choice = answer.choices[0]
    assert [entry.chosen.token_id for entry in choice.logprobs] == list(choice.token_ids)
    assert all(entry.top[0].token_id == entry.chosen.token_id for entry in choice.logprobs)
    chat = xllm_pb2.Chat(messages=[xllm_pb2.ChatMessage(role="user", content="hello")])
    (answer,) = stub.Generate(xllm_pb2.GenerateRequest(chat=chat, sampling=sampling, final_only=True))
    assert answer.usage.completion_tokens == 4


def test_a_request_goes_on_with_what_it_generated_elsewhere(stub):
    (whole,) = stub.Generate(request_of(final_only=True))
    tokens, text = list(whole.choices[0].token_ids), whole.choices[0].text
    pieces = [choice for piece in stub.Generate(request_of()) for choice in piece.choices]
    for num_pieces in range(len(pieces) + 1):
        # A response may bring several tokens.
        cut = sum(len(choice.token_ids) for choice in pieces[:num_pieces])
        num_chars = sum(len(choice.text) for choice in pieces[:num_pieces])
        resume = xllm_pb2.Resume(output_token_ids=tokens[:cut], num_text_chars=num_chars, reservation_id="gone")
        *parts, last = stub.Generate(request_of(resume=resume))
        choices = [choice for part in (*parts, last) for choice in part.choices]
        assert [token for choice in choices for token in choice.token_ids] == tokens[cut:]
        assert "".join(choice.text for choice in choices) == text[num_chars:]
        assert choices[-1].finish_reason == xllm_pb2.FINISH_REASON_LENGTH
        assert last.usage.completion_tokens == 16
    beyond = xllm_pb2.Resume(output_token_ids=tokens, num_text_chars=1000)
    assert code_of(stub.Generate(request_of(resume=beyond))) is grpc.StatusCode.INVALID_ARGUMENT
    assert code_of(stub.Generate(request_of(n=2, resume=beyond))) is grpc.StatusCode.INVALID_ARGUMENT


def test_bad_requests_have_their_codes(stub):
    bad = xllm_pb2.SamplingParams(top_p=5)
    assert code_of(stub.Generate(xllm_pb2.GenerateRequest())) is grpc.StatusCode.INVALID_ARGUMENT
    assert code_of(stub.Generate(request_of(sampling=bad))) is grpc.StatusCode.INVALID_ARGUMENT
    assert code_of(stub.Generate(request_of(text=PROMPT * 3000))) is grpc.StatusCode.INVALID_ARGUMENT
    assert code_of(stub.Generate(request_of(model="other"))) is grpc.StatusCode.NOT_FOUND
    assert code_of(stub.Generate(request_of(text="x" * (9 << 20)))) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_cancelling_and_deadlines_stop_the_engine(server, stub):
    before = server.metrics()["xllm_aborted_requests_total"]
    call = stub.Generate(long_request())
    next(call)
    call.cancel()
    until(lambda: server.metrics()["xllm_aborted_requests_total"] == before + 1)
    assert code_of(stub.Generate(long_request(), timeout=0.3)) is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: server.metrics()["xllm_aborted_requests_total"] == before + 2)
    until(lambda: server.metrics()["xllm_num_requests_running"] == 0)


def test_abort_by_id(stub):
    call = stub.Generate(long_request(request_id="mine"))
    next(call)
    assert code_of(stub.Generate(request_of(request_id="mine"))) is grpc.StatusCode.ALREADY_EXISTS
    assert stub.Abort(xllm_pb2.AbortRequest(request_id="mine")).was_open
    reasons = [choice.finish_reason for piece in call for choice in piece.choices]
    assert reasons[-1] == xllm_pb2.FINISH_REASON_ABORT
    assert not stub.Abort(xllm_pb2.AbortRequest(request_id="mine")).was_open


def test_server_info(stub):
    info = stub.GetServerInfo(xllm_pb2.GetServerInfoRequest())
    assert list(info.model_names) == ["demo"]
    assert info.max_model_len > 0
    assert info.kv_tokens_total > 0
    assert not info.is_draining


def test_health_and_reflection(channel):
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", SERVICE):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (listed,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
    assert SERVICE in [service.name for service in listed.list_services_response.service]


def test_the_key_guards_all_but_health(demo_artifact):
    with (
        ServeProcess(demo_artifact, "--api-key", "secret") as server,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        stub = xllm_pb2_grpc.InferenceStub(channel)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            assert code_of(stub.Generate(request_of(), metadata=metadata)) is grpc.StatusCode.UNAUTHENTICATED
            listing = reflection.ServerReflectionInfo(iter([request]), metadata=metadata)
            assert code_of(listing) is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
                stub.GetServerInfo(xllm_pb2.GetServerInfoRequest(), metadata=metadata)
        assert list(stub.Generate(request_of(2), metadata=(("authorization", "Bearer secret"),)))
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())


def test_overload_is_resource_exhausted(demo_artifact):
    with (
        ServeProcess(demo_artifact, "--max-streams", "1") as server,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        stub = xllm_pb2_grpc.InferenceStub(channel)
        first = stub.Generate(long_request())
        next(first)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request_of()))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        keys = [entry.key for entry in caught.value.trailing_metadata()]
        assert "retry-after" in keys and "grpc-status-details-bin" in keys
        first.cancel()


def test_draining_is_not_serving_and_unavailable(demo_artifact):
    with (
        ServeProcess(demo_artifact, "--drain-timeout", "600") as server,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        stub = xllm_pb2_grpc.InferenceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        open_call = stub.Generate(long_request())
        next(open_call)
        server.send(signal.SIGTERM)
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        until(lambda: health.Check(health_pb2.HealthCheckRequest(service=SERVICE)).status == not_serving)
        assert code_of(stub.Generate(request_of())) is grpc.StatusCode.UNAVAILABLE
        *_, last = open_call
        assert last.usage.completion_tokens == 8 * 450
        assert server.wait() == 0
