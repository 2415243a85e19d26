import pytest

from xllm_compile.runtime.sampling_params import RequestOutputKind
from xllm_compile.scheduler import openai_params
from xllm_compile.scheduler.errors import ApiError
from xllm_compile.scheduler.openai_types import ChatCompletionRequest, CompletionRequest

MODEL_DEFAULTS = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


def params_of(**fields):
    request = CompletionRequest(prompt="x", **fields)
    return openai_params.sampling_params(request, MODEL_DEFAULTS, max_tokens=4, logprobs=None)


def test_the_model_decides_what_the_request_leaves_open():
    params = params_of(top_p=0.5)
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.5, 20)


def test_zero_is_an_answer_and_not_left_open():
    params = params_of(temperature=0.0, top_k=0)
    assert (params.temperature, params.top_k) == (0.0, 0)


def test_streams_ask_for_deltas():
    assert params_of(stream=True).output_kind is RequestOutputKind.DELTA
    assert params_of().output_kind is RequestOutputKind.FINAL_ONLY


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_p", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("n", 0),
        ("n", 1000),
        ("min_p", 2.0),
        ("presence_penalty", 3.0),
        ("logit_bias", {1: 200.0}),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", ["x" * 1025]),
        ("stop_token_ids", list(range(129))),
        ("min_tokens", -1),
        ("seed", 2**70),
        ("top_k", -2),
        ("priority", 2**31),
        ("ttft_slo_ms", 0.0),
        ("tpot_slo_ms", -1.0),
    ],
)
def test_a_value_out_of_range_names_its_field(field, value):
    with pytest.raises(ApiError) as caught:
        params_of(**{field: value})
    assert (caught.value.kind.status, caught.value.param) == (400, field)


def test_scheduling_wishes():
    params = params_of(priority=-3, ttft_slo_ms=200.0, tpot_slo_ms=50)
    assert (params.priority, params.offline, params.ttft_slo_ms, params.tpot_slo_ms) == (-3, False, 200.0, 50.0)
    for fields in ({"offline": True}, {"priority": "offline"}):
        params = params_of(**fields)
        assert (params.priority, params.offline) == (0, True)


def test_the_field_is_called_what_the_client_called_it():
    request = ChatCompletionRequest(messages=[], max_completion_tokens=0)
    with pytest.raises(ApiError) as caught:
        openai_params.sampling_params(
            request, {}, max_tokens=0, max_tokens_param="max_completion_tokens", logprobs=None
        )
    assert caught.value.param == "max_completion_tokens"
    assert caught.value.message.startswith("max_completion_tokens=0")


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{}]},
        {"modalities": ["text", "audio"]},
        {"reasoning_effort": "high"},
        {"store": True},
        {"prediction": {}},
        {"web_search_options": {}},
        {"service_tier": "priority"},
    ],
)
def test_what_is_not_there_yet_is_refused(fields):
    request = ChatCompletionRequest.model_validate({"messages": []} | fields)
    with pytest.raises(ApiError) as caught:
        openai_params.refuse_unavailable(request)
    assert (caught.value.kind.status, caught.value.param) == (400, next(iter(fields)))


def test_what_asks_for_nothing_passes():
    request = ChatCompletionRequest.model_validate(
        {
            "messages": [],
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "store": False,
            "service_tier": "auto",
            "user": "me",
        }
    )
    openai_params.refuse_unavailable(request)


@pytest.mark.parametrize(("best_of", "n"), [(1, 2), (0, None), (129, 1)])
def test_best_of_is_no_less_than_n(best_of, n):
    with pytest.raises(ApiError, match="best_of"):
        openai_params.refuse_unavailable(CompletionRequest(prompt="x", best_of=best_of, n=n))


def test_suffix_is_refused():
    with pytest.raises(ApiError, match="suffix"):
        openai_params.refuse_unavailable(CompletionRequest(prompt="x", suffix="end"))


def test_stream_options_need_a_stream():
    request = CompletionRequest.model_validate({"prompt": "x", "stream_options": {"include_usage": True}})
    with pytest.raises(ApiError, match="stream_options"):
        openai_params.refuse_unavailable(request)


def test_max_tokens_fills_the_context_or_is_refused():
    assert openai_params.fit_max_tokens(None, 10, 32, "prompt") == 22
    assert openai_params.fit_max_tokens(22, 10, 32, "prompt") == 22
    for num_prompt, max_tokens in ((10, 23), (32, None), (40, 1)):
        with pytest.raises(ApiError) as caught:
            openai_params.fit_max_tokens(max_tokens, num_prompt, 32, "prompt")
        assert caught.value.code == "context_length_exceeded"


def test_top_logprobs_needs_logprobs():
    with pytest.raises(ApiError, match="top_logprobs"):
        openai_params.chat_logprobs(ChatCompletionRequest(messages=[], top_logprobs=2))
    assert openai_params.chat_logprobs(ChatCompletionRequest(messages=[], logprobs=True)) == 0
    assert openai_params.chat_logprobs(ChatCompletionRequest(messages=[], logprobs=False)) is None
