import pytest

from xllm_compile.scheduler.errors import ApiError
from xllm_compile.scheduler.openai_types import ChatCompletionRequest, CompletionRequest
from xllm_compile.scheduler.openai_validation import parse_body

COMPLETION_ERRORS = [
    (b"", "invalid_json", None),
    (b"{", "invalid_json", None),
    (b"\xff\xfe", "invalid_json", None),
    (b"[" * 100_000, "invalid_json", None),
    (b'{"prompt":"\\ud800"}', "invalid_json", None),
    (b"[]", "invalid_type", None),
    (b'"text"', "invalid_type", None),
    (b'{"promt":"x"}', "unknown_parameter", "promt"),
    (b'{"temperature":"0.5"}', "invalid_type", "temperature"),
    (b'{"n":1.5}', "invalid_type", "n"),
    (b'{"n":true}', "invalid_type", "n"),
    (b'{"echo":1}', "invalid_type", "echo"),
    (b'{"stop":1}', "invalid_type", "stop"),
    (b'{"stop":["a",1]}', "invalid_type", "stop[1]"),
    (b'{"logit_bias":{"x":1}}', "invalid_type", "logit_bias.x"),
    (b'{"stream_options":{"usage":true}}', "unknown_parameter", "stream_options.usage"),
    (b'{"stop_token_ids":["a"]}', "invalid_type", "stop_token_ids[0]"),
]


@pytest.mark.parametrize(("body", "code", "param"), COMPLETION_ERRORS)
def test_completion_errors_name_the_field(body, code, param):
    with pytest.raises(ApiError) as caught:
        parse_body(CompletionRequest, body)
    assert (caught.value.kind.status, caught.value.code, caught.value.param) == (400, code, param)


CHAT_ERRORS = [
    (b"{}", "missing_required_parameter", "messages"),
    (b'{"messages":null}', "invalid_type", "messages"),
    (b'{"messages":"hi"}', "invalid_type", "messages"),
    (b'{"messages":[1]}', "invalid_type", "messages[0]"),
    (b'{"messages":[{"role":"robot","content":"x"}]}', "invalid_value", "messages[0].role"),
    (b'{"messages":[{"role":"user","content":"x","mood":1}]}', "unknown_parameter", "messages[0].mood"),
]


@pytest.mark.parametrize(("body", "code", "param"), CHAT_ERRORS)
def test_chat_errors_name_the_field(body, code, param):
    with pytest.raises(ApiError) as caught:
        parse_body(ChatCompletionRequest, body)
    assert (caught.value.kind.status, caught.value.code, caught.value.param) == (400, code, param)


def test_the_message_says_what_was_expected_and_what_came():
    with pytest.raises(ApiError, match="'stop': expected a string or an array, but got an integer"):
        parse_body(CompletionRequest, b'{"stop":1}')


def test_what_json_clients_send_is_taken():
    request = parse_body(CompletionRequest, b'{"prompt":[1,2],"temperature":1,"logit_bias":{"7":-1},"stop":["a"]}')
    assert request.temperature == 1.0
    assert request.logit_bias == {7: -1.0}
    assert request.prompt == [1, 2]
