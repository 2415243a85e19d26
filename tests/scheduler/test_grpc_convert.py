import math

import pytest

from tests.scheduler.service_fixtures import MAX_MODEL_LEN
from xllm_compile.runtime.outputs import CompletionOutput, Logprob
from xllm_compile.runtime.pooling import PoolingParams
from xllm_compile.runtime.resume import Resume
from xllm_compile.runtime.sampling_params import RequestOutputKind
from xllm_compile.runtime.structured_output import StructuredOutput
from xllm_compile.scheduler.errors import ApiError
from xllm_compile.scheduler.grpc_convert import (
    choice_message,
    embedding_params_of,
    prompt_of,
    resume_of,
    sampling_params_of,
)
from xllm_compile.scheduler.proto import xllm_pb2


def params_of(service, final_only=False, **fields):
    request = xllm_pb2.GenerateRequest(sampling=xllm_pb2.SamplingParams(**fields), final_only=final_only)
    return sampling_params_of(request, service, num_prompt=8)


def test_unset_fields_take_the_models_defaults(service):
    params = params_of(service)
    assert params.temperature == 0.0
    assert params.max_tokens == MAX_MODEL_LEN - 8
    assert params.skip_special_tokens
    assert params.logprobs is None
    assert params.output_kind is RequestOutputKind.DELTA
    assert params_of(service, final_only=True).output_kind is RequestOutputKind.FINAL_ONLY


def test_set_fields_arrive_also_where_they_are_zero(service):
    params = params_of(
        service, temperature=0.5, logprobs=0, seed=-3, n=2, max_tokens=4, stop=["a"], logit_bias={7: 1.5}
    )
    assert (params.temperature, params.logprobs, params.seed, params.n, params.max_tokens) == (0.5, 0, -3, 2, 4)
    assert tuple(params.stop) == ("a",)
    assert dict(params.logit_bias) == {7: 1.5}


def test_resume_is_there_or_not():
    assert resume_of(xllm_pb2.GenerateRequest()) is None
    resume = xllm_pb2.Resume(output_token_ids=[5, 6], num_text_chars=3, reservation_id="r", is_begun=True)
    found = resume_of(xllm_pb2.GenerateRequest(resume=resume))
    assert found == Resume(output_token_ids=[5, 6], num_text_chars=3, reservation_id="r", is_begun=True)
    resume.first_token_age_ms = 250
    found = resume_of(xllm_pb2.GenerateRequest(resume=resume))
    assert found is not None and found.first_token_age_s == 0.25


@pytest.mark.parametrize("age_ms", [-1.0, math.nan, math.inf])
def test_an_age_that_nothing_can_have_is_refused(age_ms):
    resume = xllm_pb2.Resume(first_token_age_ms=age_ms)
    with pytest.raises(ApiError, match="first_token_age_ms"):
        resume_of(xllm_pb2.GenerateRequest(resume=resume))


def test_scheduling_wishes(service):
    wishes = xllm_pb2.Scheduling(priority=-2, offline=True, ttft_slo_ms=200)
    request = xllm_pb2.GenerateRequest(sampling=xllm_pb2.SamplingParams(), scheduling=wishes)
    params = sampling_params_of(request, service, num_prompt=8)
    assert (params.priority, params.offline, params.ttft_slo_ms, params.tpot_slo_ms) == (-2, True, 200.0, None)
    assert params_of(service).ttft_slo_ms is None


@pytest.mark.parametrize("fields", [{"top_p": 2.0}, {"n": 0}, {"max_tokens": 10_000}, {"logprobs": 99}])
def test_bad_fields(service, fields):
    with pytest.raises(ApiError) as caught:
        params_of(service, **fields)
    assert caught.value.kind.grpc == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("fields", "structured"),
    [
        ({"json_schema": '{"type": "integer"}'}, StructuredOutput.json_schema({"type": "integer"})),
        ({"json_object": True}, StructuredOutput(kind="json_object")),
        ({"json_object": False}, None),
        ({"regex": "a+"}, StructuredOutput(kind="regex", source="a+")),
        ({"grammar": 'start: "a"'}, StructuredOutput(kind="grammar", source='start: "a"')),
        ({"choice": xllm_pb2.Choices(texts=["a", "b"])}, StructuredOutput.choice(["a", "b"])),
        ({}, None),
    ],
)
def test_structured_outputs(service, fields, structured):
    assert params_of(service, **fields).structured == structured


def test_a_bad_structured_output_names_its_field(service):
    with pytest.raises(ApiError) as caught:
        params_of(service, json_schema="{")
    assert (caught.value.kind.grpc, caught.value.param) == ("INVALID_ARGUMENT", "sampling.json_schema")


async def test_three_forms_of_a_prompt(service):
    chat = xllm_pb2.Chat(messages=[xllm_pb2.ChatMessage(role="user", content="x")])
    ids = xllm_pb2.TokenIds(ids=[97, 98])
    tokenizer = service.tokenizer
    assert await prompt_of(xllm_pb2.GenerateRequest(text="ab"), tokenizer) == [97, 98]
    assert await prompt_of(xllm_pb2.GenerateRequest(token_ids=ids), tokenizer) == [97, 98]
    assert bytes(await prompt_of(xllm_pb2.GenerateRequest(chat=chat), tokenizer)) == b"<user>x<assistant>"


@pytest.mark.parametrize(
    "request_",
    [
        xllm_pb2.GenerateRequest(),
        xllm_pb2.GenerateRequest(text=""),
        xllm_pb2.GenerateRequest(token_ids=xllm_pb2.TokenIds()),
        xllm_pb2.GenerateRequest(chat=xllm_pb2.Chat()),
        xllm_pb2.GenerateRequest(chat=xllm_pb2.Chat(messages=[xllm_pb2.ChatMessage(role="robot")])),
    ],
)
async def test_what_is_no_prompt(service, request_):
    with pytest.raises(ApiError):
        await prompt_of(request_, service.tokenizer)


def test_a_choice():
    best, other = (Logprob(logprob=-rank, rank=rank, decoded_token="ab"[rank - 1]) for rank in (1, 2))
    choice = CompletionOutput(
        index=1, text="b", token_ids=[98], logprobs=[{98: other, 97: best}], finish_reason="stop", stop_reason=98
    )
    message = choice_message(choice)
    assert (message.index, message.text, list(message.token_ids)) == (1, "b", [98])
    assert message.finish_reason == xllm_pb2.FINISH_REASON_STOP
    assert message.stop_token_id == 98
    assert message.logprobs[0].chosen.token_id == 98
    assert [entry.token_id for entry in message.logprobs[0].top] == [97, 98]


def test_stop_reasons_are_told_apart():
    choice = CompletionOutput(index=0, text="", token_ids=[], finish_reason="stop", stop_reason="END")
    assert choice_message(choice).WhichOneof("stop_reason") == "stop_string"
    choice.stop_reason = None
    assert choice_message(choice).WhichOneof("stop_reason") is None
    choice.stop_reason = 0
    assert choice_message(choice).WhichOneof("stop_reason") == "stop_token_id"


def test_embedding_params(service):
    params = embedding_params_of(xllm_pb2.EmbedRequest())
    assert params.pooling == PoolingParams() and params.output_kind is RequestOutputKind.FINAL_ONLY
    request = xllm_pb2.EmbedRequest(pooling=xllm_pb2.POOLING_MEAN, keep_length=True, dimensions=2)
    assert embedding_params_of(request).pooling == PoolingParams(pooling="mean", normalize=False, dimensions=2)
    for bad in (xllm_pb2.EmbedRequest(dimensions=0), xllm_pb2.EmbedRequest(pooling=9)):  # type: ignore[arg-type]
        with pytest.raises(ApiError) as caught:
            embedding_params_of(bad)
        assert caught.value.kind.grpc == "INVALID_ARGUMENT"


async def test_an_embed_request_without_prompt(service):
    with pytest.raises(ApiError, match="Set one of text, token_ids"):
        await prompt_of(xllm_pb2.EmbedRequest(), service.tokenizer)
