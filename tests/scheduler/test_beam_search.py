"""Beam search as clients get it."""

import pytest


async def post(client, path="/v1/completions", **body):
    response = await client.post(path, json=body | {"use_beam_search": True})
    assert response.status_code == 200, response.text
    return response.json()


async def test_the_most_probable_continuations(client):
    """The next byte has logit 10, the one after it 5: a beam that skips once loses 5, wherever it does."""
    answer = await post(client, prompt="abc", max_tokens=3, n=3, logprobs=1)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts[0] == "def" and set(texts[1:]) < {"efg", "dfg", "deg"}
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 9 and answer["usage"]["prompt_tokens"] == 3
    (first, second) = (sum(choice["logprobs"]["token_logprobs"]) for choice in answer["choices"][:2])
    assert first - second == pytest.approx(5.0, abs=1e-4)
    assert all(len(top) == 1 for top in answer["choices"][0]["logprobs"]["top_logprobs"])


async def test_a_beam_may_be_wider_than_the_answer(client):
    answer = await post(client, prompt="abc", max_tokens=2, best_of=3)
    assert [choice["text"] for choice in answer["choices"]] == ["de"]


async def test_chat_and_metrics(client, service):
    messages = [{"role": "user", "content": "hi"}]
    answer = await post(
        client, "/v1/chat/completions", messages=messages, max_tokens=2, n=2, length_penalty=0.0, include_metrics=True
    )
    assert len(answer["choices"]) == 2
    # One step asks for the first token, one for two beams' second.
    assert answer["metrics"]["graph_steps"]["exact"] in (2, 3)
    # The engine's requests are no requests of clients.
    assert b'xllm_request_finished_total{reason="length"} 0.0' in service.render_metrics()


async def test_every_step_has_the_place_of_its_request(client, engine, monkeypatch):
    asked = []
    generate = engine.generate

    def recorded(request_id, prompt, params, **others):
        asked.append((params.priority, params.offline))
        return generate(request_id, prompt, params, **others)

    monkeypatch.setattr(engine, "generate", recorded)
    await post(client, prompt="abc", max_tokens=2, n=2, priority=7)
    assert set(asked) == {(7, False)} and len(asked) == 3
    asked.clear()
    await client.post("/v1/embeddings", json={"input": "abc", "priority": "offline"})
    assert asked == [(0, True)]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stream": True}, "stream"),
        ({"stop": ["x"]}, "stop"),
        ({"temperature": 0.7}, "temperature"),
        ({"echo": True}, "echo"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"n": 11}, "n"),
        ({"best_of": 11}, "best_of"),
        ({"n": 2, "length_penalty": 20}, "length_penalty"),
        ({"length_penalty": 2, "use_beam_search": False}, "length_penalty"),
    ],
)
async def test_what_does_not_go_with_it(client, body, param):
    response = await client.post("/v1/completions", json={"prompt": "abc", "use_beam_search": True} | body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
