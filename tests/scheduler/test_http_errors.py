"""What a client is told when something is wrong: always OpenAI's error object, always the right status."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from xllm_compile.scheduler import http_io
from xllm_compile.scheduler.errors import ApiError
from xllm_compile.scheduler.http_api import build_app

COMPLETIONS = "/v1/completions"
SLOW = {"prompt": "a", "max_tokens": 100}


def assert_error(response, status, code):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"]
    return error


BAD_PROMPTS: list[Any] = [None, "", [], [[]], [""], 5, {}, [1, "a"], [[1], [2.5]], [True], [-1], [[1], "a", None]]


@pytest.mark.parametrize("prompt", BAD_PROMPTS)
async def test_bad_prompts(client, prompt):
    response = await client.post(COMPLETIONS, json={"prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


async def test_token_ids_beyond_the_vocabulary(client):
    response = await client.post(COMPLETIONS, json={"prompt": [5000]})
    assert_error(response, 400, "invalid_value")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "unknown_url"),
        ("POST", "/v1/images/generations", 404, "unknown_url"),
        ("GET", "/v1/completions/", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/counter", 405, "method_not_allowed"),
        ("GET", "/v1/models/gpt-4", 404, "model_not_found"),
    ],
)
async def test_paths_and_methods(client, method, path, status, code):
    response = await client.request(method, path)
    assert_error(response, status, code)
    assert ("allow" in response.headers) == (status == 405)


async def test_unknown_models(client):
    response = await client.post(COMPLETIONS, json={"model": "gpt-4", "prompt": "a"})
    error = assert_error(response, 404, "model_not_found")
    assert error["param"] == "model"
    assert "counter" in error["message"]


async def test_the_key_is_wanted_everywhere_but_for_health(engine, service):
    service = type(service)(
        engine=engine,
        tokenizer=service.tokenizer,
        model_names=("counter",),
        max_model_len=128,
        version="1",
        api_keys=("new", "secret"),
    )
    transport = httpx.ASGITransport(app=build_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path in ("/v1/models", "/metrics", "/version", "/nowhere"):
            assert_error(await client.get(path), 401, "invalid_api_key")
            for header in ("Bearer wrong", "secret", "Basic secret", "Bearer \xe9"):
                response = await client.get(path, headers=[(b"authorization", header.encode("latin-1"))])
                assert_error(response, 401, "invalid_api_key")
        assert_error(await client.post(COMPLETIONS, content=b"{"), 401, "invalid_api_key")
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/v1/models", headers={"authorization": "bearer secret"})).status_code == 200


async def test_a_body_over_the_limit_is_not_read(client):
    big = json.dumps({"prompt": "a" * 20_000}).encode()
    assert_error(await client.post(COMPLETIONS, content=big), 413, "body_too_large")

    read = 0

    async def endless():
        nonlocal read
        while True:
            read += 1000
            yield b" " * 1000

    assert_error(await client.post(COMPLETIONS, content=endless()), 413, "body_too_large")
    assert read <= 12_000


async def test_a_full_queue_is_429_with_retry_after(client, service, runner):
    runner.gate.clear()
    waiting = [asyncio.create_task(client.post(COMPLETIONS, json=SLOW)) for _ in range(3)]
    await until(lambda: len(service._open_ids) == 3)
    # 6 may wait: a request for 8 sequences does not fit, whatever the engine has taken so far.
    response = await client.post(COMPLETIONS, json={"prompt": "a", "n": 8})
    assert_error(response, 429, "queue_full")
    assert response.headers["retry-after"] == "1"
    runner.gate.set()
    assert [(await task).status_code for task in waiting] == [200] * 3


async def test_offline_requests_leave_half_of_the_queue_to_others(client, service, runner):
    runner.gate.clear()
    waiting = [asyncio.create_task(client.post(COMPLETIONS, json=SLOW)) for _ in range(2)]
    await until(lambda: len(service._open_ids) == 2)
    # At least one waits, and 3 of the 6 places are for offline requests.
    body = {"prompt": "a", "n": 3, "max_tokens": 1}
    assert_error(await client.post(COMPLETIONS, json=body | {"priority": "offline"}), 429, "queue_full")
    waiting.append(asyncio.create_task(client.post(COMPLETIONS, json=body)))
    await until(lambda: len(service._open_ids) == 3)
    runner.gate.set()
    assert [(await task).status_code for task in waiting] == [200] * 3


@pytest.mark.parametrize("priority", ["high", 1.5, [1]])
async def test_a_priority_is_a_number_or_offline(client, priority):
    error = assert_error(
        await client.post(COMPLETIONS, json={"prompt": "a", "priority": priority}), 400, "invalid_type"
    )
    assert error["param"] == "priority"


async def test_too_many_streams_are_429_and_lose_their_connection(client, service, runner):
    runner.gate.clear()
    waiting = [asyncio.create_task(client.post(COMPLETIONS, json=SLOW)) for _ in range(4)]
    await until(lambda: service.limiter.num_open == 4)
    response = await client.post(COMPLETIONS, json=SLOW)
    assert_error(response, 429, "too_many_streams")
    assert response.headers["retry-after"] == "1"
    assert response.headers["connection"] == "close"
    assert (await client.get("/health")).status_code == 200
    runner.gate.set()
    assert [(await task).status_code for task in waiting] == [200] * 4


async def test_draining_refuses_new_work_and_finishes_old(client, service, runner):
    runner.gate.clear()
    old = asyncio.create_task(client.post(COMPLETIONS, json=SLOW))
    await until(lambda: service.limiter.num_open == 1)
    service.is_draining = True
    response = await client.post(COMPLETIONS, json=SLOW)
    assert_error(response, 503, "draining")
    assert response.headers["retry-after"] == "1"
    assert_error(await client.get("/health"), 503, "draining")
    runner.gate.set()
    assert (await old).json()["usage"]["completion_tokens"] == 100


async def test_a_dead_engine_is_500_and_unhealthy(client, runner):
    runner.error = RuntimeError("the secret prompt")
    response = await client.post(COMPLETIONS, json=SLOW)
    assert_error(response, 500, "engine_dead")
    assert "secret" not in response.text
    assert_error(await client.get("/health"), 503, "engine_dead")
    assert_error(await client.post(COMPLETIONS, json=SLOW), 500, "engine_dead")


async def test_an_error_in_mid_stream_is_the_last_event(service, runner):
    app = build_app(service)
    sent = []

    async def send(message):
        sent.append(message)
        if message.get("body"):
            runner.error = RuntimeError("late")

    await call(app, {"prompt": "a", "max_tokens": 100, "stream": True}, send)
    assert sent[0]["status"] == 200
    events = b"".join(message.get("body", b"") for message in sent).decode().split("\n\n")
    assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "engine_dead"
    assert events[-2] == "data: [DONE]"
    assert sent[-1].get("more_body", False) is False
    assert b'xllm_requests_total{api="http",outcome="error"} 1.0' in service.render_metrics()


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_client_that_leaves_stops_the_engine(service, engine, runner, is_stream):
    gone = asyncio.Event()
    app = build_app(service)

    async def send(message):
        gone.set()

    runner.gate.clear()
    body = {"prompt": "a", "max_tokens": 100, "stream": is_stream}
    request = asyncio.create_task(call(app, body, send, gone))
    await until(lambda: service.limiter.num_open == 1)
    gone.set()
    await request
    runner.gate.set()
    await until(lambda: engine.stats().num_aborted == 1)
    assert service.limiter.num_open == 0
    assert runner.num_steps < 10
    assert b'xllm_requests_total{api="http",outcome="abort"} 1.0' in service.render_metrics()


async def test_the_server_ending_a_request_is_an_error_and_not_a_short_answer(client, service, runner):
    runner.gate.clear()
    request = asyncio.create_task(client.post(COMPLETIONS, json=SLOW))
    await until(lambda: bool(service._open_ids))
    (name,) = service._open_ids
    assert await service.abort(name.rpartition("-")[0])
    runner.gate.set()
    assert_error(await request, 503, "aborted")
    assert not await service.abort("nobody")


async def test_a_slow_body_is_given_up(service, monkeypatch):
    monkeypatch.setattr(http_io, "BODY_TIMEOUT_S", 0.0)

    async def receive():
        await asyncio.Event().wait()

    with pytest.raises(ApiError, match="took longer"):
        await http_io.read_body({"headers": []}, receive, 1000)


async def call(app, body, send, gone=None):
    """One request without an HTTP client between: send gets each message as it is written."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    gone = gone or asyncio.Event()

    async def receive():
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    scope = {
        "type": "http",
        "method": "POST",
        "path": COMPLETIONS,
        "root_path": "",
        "query_string": b"",
        "headers": [],
    }
    await app(scope, receive, send)


async def until(condition):
    """Let the event loop and the engine thread go on until the condition holds."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)
