"""best_of: the most probable candidates are the answers."""

import pytest

from tests.scheduler.test_output_stream import choice, output, play
from xllm_compile.scheduler.best_of import best_of


def candidate(index, cumulative_logprob, finish_reason="length"):
    made = choice(index, f"candidate {index}", [1], finish_reason)
    made.cumulative_logprob = cumulative_logprob
    return made


async def test_the_most_probable_come_first():
    finished = output(candidate(0, -3.0), candidate(1, -1.0), candidate(2, None), candidate(3, -2.0), finished=True)
    (answer,) = [each async for each in best_of(play(finished), 2)]
    assert [(each.index, each.text) for each in answer.outputs] == [(0, "candidate 1"), (1, "candidate 3")]


async def test_a_candidate_that_was_cut_is_not_chosen_away():
    finished = output(candidate(0, -3.0, "abort"), candidate(1, -1.0), finished=True)
    (answer,) = [each async for each in best_of(play(finished), 1)]
    assert [each.finish_reason for each in answer.outputs] == ["abort", "length"]


async def test_over_http(client):
    body = {"prompt": ["abc", "x"], "max_tokens": 3, "best_of": 3, "n": 2, "temperature": 2.0, "seed": 1}
    answer = (await client.post("/v1/completions", json=body | {"logprobs": 0})).json()
    assert [each["index"] for each in answer["choices"]] == [0, 1, 2, 3]
    totals = [sum(each["logprobs"]["token_logprobs"]) for each in answer["choices"]]
    candidates = (await client.post("/v1/completions", json=body | {"n": 3, "logprobs": 0})).json()["choices"]
    for prompt in range(2):
        all_totals = [sum(each["logprobs"]["token_logprobs"]) for each in candidates[3 * prompt : 3 * prompt + 3]]
        assert totals[2 * prompt : 2 * prompt + 2] == pytest.approx(sorted(all_totals, reverse=True)[:2])
    plain = (await client.post("/v1/completions", json=body)).json()
    assert all(each["logprobs"] is None for each in plain["choices"])
    assert [each["text"] for each in plain["choices"]] == [each["text"] for each in answer["choices"]]


@pytest.mark.parametrize("body", [{"best_of": 1, "n": 2}, {"best_of": 129}, {"best_of": 2, "stream": True}])
async def test_what_is_refused(client, body):
    response = await client.post("/v1/completions", json={"prompt": "abc"} | body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "best_of"
