"""The chat API in OpenAI's formats. The template ends in ">", so the counting model answers "?@AB..."."""

import pytest

from tests.scheduler.service_fixtures import MAX_MODEL_LEN
from tests.scheduler.test_http_completions import events_of

USER = {"role": "user", "content": "hi"}


async def chat(client, messages=(USER,), **body):
    response = await client.post("/v1/chat/completions", json={"messages": list(messages)} | body)
    assert response.status_code == 200, response.text
    return response.json()


async def refused(client, messages=(USER,), **body):
    response = await client.post("/v1/chat/completions", json={"messages": list(messages)} | body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


async def prompt_of(client, messages, **body):
    """The rendered prompt."""
    answer = await chat(client, messages, max_tokens=1, return_token_ids=True, **body)
    return bytes(answer["prompt_token_ids"]).decode()


async def test_an_answer(client):
    answer = await chat(client, model="alias", max_tokens=3)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "?@A", "refusal": None}
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


async def test_the_rest_of_the_context_is_the_default_length(client):
    usage = (await chat(client))["usage"]
    assert usage["total_tokens"] == MAX_MODEL_LEN


async def test_max_completion_tokens_comes_before_max_tokens(client):
    assert (await chat(client, max_completion_tokens=2, max_tokens=5))["usage"]["completion_tokens"] == 2


async def test_the_template_gets_text_parts_roles_and_options(client):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    assert await prompt_of(client, messages) == "<system>be brief<user>one\ntwo<assistant>"
    assert await prompt_of(client, [USER], add_generation_prompt=False) == "<user>hi"
    assert await prompt_of(client, [USER], chat_template_kwargs={"suffix": "!"}) == "<user>hi<assistant>!"


@pytest.mark.parametrize("key", ["chat_template", "tools", "messages", "add_generation_prompt"])
async def test_template_options_cannot_replace_the_template(client, key):
    error = await refused(client, chat_template_kwargs={key: "{{ 1 }}"})
    assert error["param"] == "chat_template_kwargs"


async def test_what_the_template_refuses_is_the_clients_error(client):
    error = await refused(client, [{"role": "assistant", "content": "me first"}])
    assert "assistant first" in error["message"]


@pytest.mark.parametrize("kind", ["image_url", "video_url"])
async def test_images_are_refused_by_name(client, kind):
    content = [{"type": "text", "text": "what is this?"}, {"type": kind, kind: {"url": "data:,"}}]
    error = await refused(client, [{"role": "user", "content": content}])
    assert error["message"] == "Vision is not supported by this model."
    assert error["param"] == "messages[0].content[1]"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": 5},
        {"role": "user", "content": ["text"]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "text", "text": 1}]},
        {"role": "user", "content": [{"type": "text", "text": "x", "more": 1}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
        {"role": "tool", "content": None, "tool_call_id": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]},
        {"role": "user", "content": "hi", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    ],
)
async def test_content_that_cannot_be_shown_to_the_model_is_refused(client, message):
    await refused(client, [message])


async def test_no_messages_are_refused(client):
    assert (await refused(client, []))["param"] == "messages"


async def test_tools_are_refused_where_the_template_knows_none(client):
    error = await refused(client, tools=[{"type": "function", "function": {"name": "f"}}])
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    assert "--tool-call-parser" in error["message"]


async def test_logprobs(client):
    answer = await chat(client, max_tokens=2, logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["?", "@"]
    assert content[0]["bytes"] == [ord("?")]
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["?", "@"]
    assert content[0]["logprob"] == content[0]["top_logprobs"][0]["logprob"]
    answer = await chat(client, max_tokens=1, logprobs=True)
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_bytes_of_part_of_a_character(client):
    answer = await chat(client, max_tokens=1, logprobs=True, logit_bias={"195": 100})
    assert answer["choices"][0]["logprobs"]["content"][0]["bytes"] == [195]


async def test_a_stream_opens_with_the_role_and_closes_with_the_reason(client):
    response = await client.post(
        "/v1/chat/completions",
        json={
            "messages": [USER],
            "max_tokens": 4,
            "n": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    )
    chunks = events_of(response)
    *chunks, last = chunks
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    for index in (0, 1):
        pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert pieces[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(piece["delta"].get("content", "") for piece in pieces) == "?@AB"
        assert [piece["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1]["finish_reason"] == "length"


async def test_logprobs_in_a_stream_are_one_per_token(client):
    response = await client.post(
        "/v1/chat/completions", json={"messages": [USER], "max_tokens": 4, "stream": True, "logprobs": True}
    )
    entries = [
        entry["token"]
        for chunk in events_of(response)
        if (logprobs := chunk["choices"][0]["logprobs"])
        for entry in logprobs["content"]
    ]
    assert entries == ["?", "@", "A", "B"]
