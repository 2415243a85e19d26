"""xllm-serve as a process, used through the official OpenAI client."""

import http.client
import json
import socket
import threading

import httpx
import numpy as np
import openai
import pytest

from tests.integration.helpers import LONG, MESSAGES, PROMPT, until
from tests.integration.serve_process import ServeProcess

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server(demo_artifact):
    with ServeProcess(demo_artifact, "--served-model-name", "demo", "--max-num-seqs", "16") as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.http}/v1", api_key="unused", max_retries=0) as client:
        yield client


def complete(client, **options):
    return client.completions.create(
        **{"model": "demo", "prompt": PROMPT, "max_tokens": 16, "temperature": 0} | options
    )


def test_embeddings(client):
    """The client asks for base64 unless told otherwise, and decodes it."""
    inputs = [PROMPT, "import os\n", PROMPT]
    answer = client.embeddings.create(model="demo", input=inputs)
    first, other, again = (np.array(entry.embedding) for entry in answer.data)
    assert np.linalg.norm(first) == pytest.approx(1.0, abs=1e-5)
    # Whatever steps they rode in.
    assert np.array_equal(first, again) and not np.allclose(first, other, atol=1e-2)
    plain = client.embeddings.create(model="demo", input=PROMPT, encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, first, rtol=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 2 * plain.usage.prompt_tokens


def test_completion_stream_and_chat_agree_with_themselves(client):
    whole = complete(client)
    assert whole.usage.completion_tokens == 16 or whole.choices[0].finish_reason == "stop"
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage

    options = {"model": "demo", "messages": MESSAGES, "max_completion_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_text_and_token_ids_of_it_get_the_same_answer(server, client):
    tokens = httpx.post(f"{server.http}/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    assert complete(client, prompt=tokens).choices[0].text == complete(client).choices[0].text
    back = httpx.post(f"{server.http}/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert PROMPT in back


def test_logprobs_are_of_the_greedy_tokens(client):
    logprobs = complete(client, max_tokens=8, logprobs=3).choices[0].logprobs
    for token, chosen, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen <= 0
        assert top[token] == chosen == max(top.values())
    chat = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    for entry in chat.choices[0].logprobs.content:
        assert entry.top_logprobs[0].token == entry.token
        assert bytes(entry.bytes)


def test_scoring_with_echo_agrees_with_generation(client):
    generated = complete(client, max_tokens=6, logprobs=0)
    text = PROMPT + generated.choices[0].text
    scored = complete(client, prompt=text, max_tokens=0, echo=True, logprobs=0).choices[0].logprobs
    # The last token may be cut differently at the end of a text, so the ones before it are compared.
    ours, theirs = generated.choices[0].logprobs, scored
    start = len(theirs.tokens) - len(ours.tokens)
    if theirs.tokens[start:] == ours.tokens:
        assert theirs.token_logprobs[start:] == pytest.approx(ours.token_logprobs, abs=0.05)


def test_stop_ends_before_the_string(client):
    text = complete(client).choices[0].text
    stop = text[len(text) // 2 :][:2]
    choice = complete(client, stop=stop).choices[0]
    assert choice.finish_reason == "stop"
    assert stop not in choice.text
    assert text.startswith(choice.text)


def test_n_seeded_choices_are_reproducible(client):
    options = {"n": 2, "temperature": 1.0, "seed": 7, "max_tokens": 24}
    first = [choice.text for choice in complete(client, **options).choices]
    second = [choice.text for choice in complete(client, **options).choices]
    assert first == second
    assert first[0] != first[1]


def test_a_long_prompt_goes_through_in_chunks(client):
    # The demo artifact takes 64 tokens in a step.
    answer = complete(client, prompt=PROMPT * 20, max_tokens=4)
    assert answer.usage.prompt_tokens > 64
    assert answer.choices[0].text == complete(client, prompt=PROMPT * 20, max_tokens=4).choices[0].text


def test_many_clients_at_once_get_what_they_would_get_alone(client):
    alone = [complete(client, prompt=f"{PROMPT}{at}").choices[0].text for at in range(4)]
    together = [""] * 4

    def ask(at):
        together[at] = complete(client, prompt=f"{PROMPT}{at}").choices[0].text

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


BAD = [
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": PROMPT, "temperature": "hot"}, 400, "temperature"),
    ({"prompt": PROMPT, "top_p": 0}, 400, "top_p"),
    ({"prompt": PROMPT, "n": 0}, 400, "n"),
    ({"prompt": PROMPT, "max_tokens": -1}, 400, "max_tokens"),
    ({"prompt": PROMPT, "max_tokens": 10**9}, 400, "prompt"),
    ({"prompt": [10**8]}, 400, None),
    ({"prompt": PROMPT, "logprobs": 50}, 400, "logprobs"),
    ({"prompt": PROMPT, "colour": "red"}, 400, "colour"),
    ({"prompt": PROMPT, "model": "other"}, 404, "model"),
    ({"prompt": "word " * 100_000}, 400, "prompt"),
]


@pytest.mark.parametrize(("body", "status", "param"), BAD)
def test_bad_input_is_the_clients_error_and_the_server_lives(server, body, status, param):
    for extra in ({}, {"stream": True}):
        response = httpx.post(f"{server.http}/v1/completions", json=body | extra)
        assert response.status_code == status, response.text
        assert response.json()["error"]["param"] == param
    assert httpx.get(f"{server.http}/health").status_code == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GARBAGE\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{]",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000,
    ],
)
def test_broken_http_is_answered_in_the_error_format(server, request_bytes):
    with socket.create_connection((server.host, server.http_port), timeout=30) as connection:
        connection.sendall(request_bytes)
        # Reads on until the whole answer is there: head and body may come in packets of their own.
        response = http.client.HTTPResponse(connection)
        response.begin()
        body = response.read()
    assert response.status in (400, 413)
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{server.http}/health").status_code == 200


def test_a_client_that_is_cut_off_stops_its_request(server, client):
    before = server.metrics()["xllm_aborted_requests_total"]
    with (
        httpx.Client() as other,
        other.stream("POST", f"{server.http}/v1/completions", json=LONG | {"stream": True}) as streamed,
    ):
        lines = streamed.iter_lines()
        next(lines)
        # Another stream runs beside the one that is cut, and is not harmed.
        beside = complete(client, max_tokens=32, stream=True, extra_body={"ignore_eos": True})
        next(beside)
    assert sum(1 for _ in beside) > 0
    until(lambda: server.metrics()["xllm_aborted_requests_total"] == before + 1)
    with socket.create_connection((server.host, server.http_port)) as connection:
        data = json.dumps(LONG).encode()
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        until(lambda: server.metrics()["xllm_open_streams"] == 1)
    until(lambda: server.metrics()["xllm_aborted_requests_total"] == before + 2)
    until(lambda: server.metrics()["xllm_num_requests_running"] == 0)
    until(lambda: server.metrics()["xllm_kv_cache_tokens_used"] == 0)


def test_the_dashboard_has_what_happened(server, client):
    assert "<title>" in httpx.get(f"{server.http}/dashboard").text
    complete(client, max_tokens=8)

    def has_tokens():
        samples = httpx.get(f"{server.http}/dashboard/data").json()["samples"]
        return any(sample["service"]["num_generated_tokens"] for sample in samples)

    until(has_tokens)
