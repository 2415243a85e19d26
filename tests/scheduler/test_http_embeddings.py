"""POST /v1/embeddings in OpenAI's format, over the counting model: the state of a token t is [3, 4, t]."""

import base64

import numpy as np
import pytest

from tests.scheduler.service_fixtures import MAX_MODEL_LEN


async def embed(client, **body):
    response = await client.post("/v1/embeddings", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


async def refused(client, **body):
    response = await client.post("/v1/embeddings", json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


async def test_an_embedding(client):
    answer = await embed(client, model="counter", input="abc", normalize=False)
    assert answer == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [3.0, 4.0, 99.0]}],
        "model": "counter",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }
    (entry,) = (await embed(client, input="abc"))["data"]
    assert np.linalg.norm(entry["embedding"]) == pytest.approx(1.0)


@pytest.mark.parametrize("given", ["abc", [97, 98, 99], ["abc"], [[97, 98, 99]]])
async def test_four_forms_of_input(client, given):
    answer = await embed(client, input=given, normalize=False)
    assert answer["data"][0]["embedding"] == [3.0, 4.0, 99.0]


async def test_many_inputs_keep_their_order(client):
    answer = await embed(client, input=[chr(65 + index % 50) * (1 + index % 3) for index in range(6)], normalize=False)
    assert [entry["index"] for entry in answer["data"]] == list(range(6))
    assert [entry["embedding"][2] for entry in answer["data"]] == [65.0 + index for index in range(6)]
    assert answer["usage"]["prompt_tokens"] == 1 + 2 + 3 + 1 + 2 + 3


async def test_base64_is_little_endian_float32(client):
    answer = await embed(client, input="abc", encoding_format="base64", normalize=False)
    data = base64.b64decode(answer["data"][0]["embedding"])
    assert np.frombuffer(data, dtype="<f4").tolist() == [3.0, 4.0, 99.0]


async def test_dimensions_are_cut_and_normalised(client):
    answer = await embed(client, input="abc", dimensions=2)
    np.testing.assert_allclose(answer["data"][0]["embedding"], [0.6, 0.8], rtol=1e-6)


async def test_mean_of_all_tokens(client):
    answer = await embed(client, input="ac", pooling="mean", normalize=False)
    assert answer["data"][0]["embedding"] == [3.0, 4.0, 98.0]


async def test_an_input_may_fill_the_context(client):
    assert (await embed(client, input="a" * MAX_MODEL_LEN))["usage"]["prompt_tokens"] == MAX_MODEL_LEN
    error = await refused(client, input="a" * (MAX_MODEL_LEN + 1))
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "input", "Missing required parameter: 'input'."),
        ({"input": 5}, "input", "Invalid type for 'input'"),
        ({"input": []}, "input", "'input' must not be empty."),
        ({"input": ["a", ""]}, "input", "'input' must not be empty."),
        ({"input": ["a"] * 2049}, "input", "'input' has 2049 prompts, at most 2048 are taken."),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "pooling": "max"}, "pooling", "pooling='max' must be one of last, mean"),
        ({"input": "a", "dimensions": 0}, "dimensions", "dimensions=0 must be at least 1"),
        ({"input": "a", "colour": 1}, "colour", ""),
    ],
)
async def test_bad_requests(client, body, param, said):
    error = await refused(client, **body)
    assert error["param"] == param and said in error["message"]


async def test_more_dimensions_than_there_are(client):
    error = await refused(client, input="a", dimensions=4)
    assert "dimensions=4 is above the 3 of the model's hidden states" in error["message"]


async def test_another_model_is_not_served(client):
    response = await client.post("/v1/embeddings", json={"model": "other", "input": "a"})
    assert response.status_code == 404


async def test_one_that_fails_ends_the_others(client, runner, service):
    runner.error = RuntimeError("the device is gone")
    response = await client.post("/v1/embeddings", json={"input": ["a", "b", "c"]})
    assert response.status_code in (500, 503)
    assert service.limiter.num_open == 0
