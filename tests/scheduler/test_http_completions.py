"""The text completion API in OpenAI's formats, over the counting model: "abc" goes on with "def"."""

import json

import pytest

from tests.scheduler.service_fixtures import MAX_MODEL_LEN


async def complete(client, **body):
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events_of(response):
    """Parsed `data:` events; the last must be [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def stream(client, **body):
    return events_of(await client.post("/v1/completions", json=body | {"stream": True}))


async def test_a_completion(client):
    answer = await complete(client, model="counter", prompt="abc", max_tokens=3)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "counter"
    assert answer["choices"] == [
        {"index": 0, "text": "def", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_max_tokens_is_16_where_nothing_is_said(client):
    assert (await complete(client, prompt="abc"))["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("prompt", ["abc", [97, 98, 99], ["abc"], [[97, 98, 99]]])
async def test_four_forms_of_a_prompt(client, prompt):
    answer = await complete(client, prompt=prompt, max_tokens=2)
    assert [choice["text"] for choice in answer["choices"]] == ["de"]


async def test_choices_are_numbered_by_prompt_then_by_n(client):
    answer = await complete(client, prompt=["abc", "x"], n=2, best_of=2, max_tokens=1)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "d"),
        (1, "d"),
        (2, "y"),
        (3, "y"),
    ]
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["completion_tokens"] == 4


async def test_stop_strings_and_stop_tokens(client):
    answer = await complete(client, prompt="abc", max_tokens=9, stop=["g", "zz"])
    assert answer["choices"][0] | {"logprobs": 0} == {
        "index": 0,
        "text": "def",
        "logprobs": 0,
        "finish_reason": "stop",
        "stop_reason": "g",
    }
    answer = await complete(client, prompt="abc", max_tokens=9, stop="ef", include_stop_str_in_output=True)
    assert answer["choices"][0]["text"] == "def"
    answer = await complete(client, prompt="abc", max_tokens=9, stop_token_ids=[ord("f")])
    assert (answer["choices"][0]["text"], answer["choices"][0]["stop_reason"]) == ("de", ord("f"))


async def test_logit_bias_keys_are_token_ids(client):
    answer = await complete(client, prompt="abc", max_tokens=1, logit_bias={str(ord("z")): 100})
    assert answer["choices"][0]["text"] == "z"


async def test_logprobs(client):
    answer = await complete(client, prompt="abc", max_tokens=2, logprobs=2)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["d", "e"]
    assert logprobs["text_offset"] == [0, 1]
    assert [list(top) for top in logprobs["top_logprobs"]] == [["d", "e"], ["e", "f"]]
    assert logprobs["token_logprobs"][0] == logprobs["top_logprobs"][0]["d"]


async def test_echo_puts_the_prompt_and_its_logprobs_in_front(client):
    answer = await complete(client, prompt="abc", max_tokens=1, logprobs=1, echo=True)
    choice = answer["choices"][0]
    assert choice["text"] == "abcd"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "d"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1] == pytest.approx(-0.018, abs=1e-3)
    answer = await complete(client, prompt=[97, 98], max_tokens=1, echo=True)
    assert answer["choices"][0]["text"] == "abc"


async def test_scoring_a_prompt_generates_nothing_that_shows(client):
    answer = await complete(client, prompt="abc", max_tokens=0, logprobs=1, echo=True)
    assert answer["choices"][0]["text"] == "abc"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["a", "b", "c"]
    assert answer["usage"]["completion_tokens"] == 0


async def test_token_ids_come_back_when_asked_for(client):
    answer = await complete(client, prompt="abc", max_tokens=2, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == [100, 101]
    assert answer["choices"][0]["prompt_token_ids"] == [97, 98, 99]


async def test_a_stream_adds_up_to_the_answer(client):
    chunks = await stream(client, prompt=["abc", "m"], max_tokens=5, n=2)
    texts: dict[int, str] = {}
    reasons = {}
    for chunk in chunks:
        assert chunk["object"] == "text_completion"
        assert "usage" not in chunk
        (choice,) = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {0: "defgh", 1: "defgh", 2: "nopqr", 3: "nopqr"}
    assert set(reasons.values()) == {"length"}
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_usage_ends_a_stream_that_asks_for_it(client):
    chunks = await stream(client, prompt="abc", max_tokens=2, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2


async def test_usage_so_far_in_every_chunk(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(client, prompt="abc", max_tokens=2, stream_options=options)
    assert all(chunk["usage"]["prompt_tokens"] == 3 for chunk in chunks)
    assert chunks[-1]["usage"]["total_tokens"] == 5


async def test_logprobs_and_echo_in_a_stream(client):
    chunks = await stream(client, prompt="abc", max_tokens=4, logprobs=1, echo=True)
    pieces = [chunk["choices"][0] for chunk in chunks]
    assert "".join(piece["text"] for piece in pieces) == "abcdefg"
    assert [token for piece in pieces for token in piece["logprobs"]["tokens"]] == list("abcdefg")
    assert [offset for piece in pieces for offset in piece["logprobs"]["text_offset"]] == list(range(7))


async def test_a_character_of_several_tokens_is_streamed_whole(client):
    # After 0xC2 the model says 0xC3, 0xC4, ...: each opens a character that the next one breaks.
    biased = {"prompt": "x", "max_tokens": 2, "logit_bias": {str(0xC3): 100}, "stop_token_ids": [0]}
    chunks = await stream(client, **biased)
    whole = await complete(client, **biased)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]


async def test_the_prompt_and_the_output_must_fit(client):
    for body in ({"prompt": "a" * MAX_MODEL_LEN}, {"prompt": "a", "max_tokens": MAX_MODEL_LEN}):
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
