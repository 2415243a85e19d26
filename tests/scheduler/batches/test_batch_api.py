"""Batches over HTTP, answered by the counting model: "abc" goes on with "def"."""

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from tests.scheduler.batches.batch_fixtures import COMPLETIONS, jsonl, line
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.batches import line_request
from xllm_compile.scheduler.batches import runner as runner_module
from xllm_compile.scheduler.batches.runner import MAX_ATTEMPTS
from xllm_compile.scheduler.errors import ApiError

LONG: dict[str, Any] = {"max_tokens": 100}


async def test_lines_are_answered_as_the_endpoints_answer(server):
    chat = [{"role": "user", "content": "hi"}]
    cases = {
        COMPLETIONS: {"prompt": "abc", "max_tokens": 3, "logprobs": 1},
        "/v1/chat/completions": {"messages": chat, "max_tokens": 3, "n": 2},
        "/v1/embeddings": {"input": ["a", "b"], "encoding_format": "float"},
    }
    for endpoint, asked in cases.items():
        lines = [
            {"custom_id": f"request {number}", "method": "POST", "url": endpoint, "body": asked} for number in range(3)
        ]
        created = await server.create(lines, endpoint=endpoint, metadata={"key": "value"})
        assert created["status"] in ("validating", "in_progress")
        assert created["metadata"] == {"key": "value"}
        ended = await server.ended(created["id"])
        assert ended["status"] == "completed"
        assert ended["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
        assert ended["error_file_id"] is None and ended["errors"] is None
        expected = (await server.client.post(endpoint, json=asked)).json()
        results = await server.content(ended["output_file_id"])
        assert [result["custom_id"] for result in results] == ["request 0", "request 1", "request 2"]
        assert len({result["id"] for result in results}) == 3
        for result in results:
            assert result["error"] is None
            response = result["response"]
            assert response["status_code"] == 200 and response["request_id"]
            for own in ("id", "created"):
                expected.pop(own, None)
                response["body"].pop(own, None)
            for body in (expected, response["body"]):
                # The first to ask computes what the others find.
                body["usage"].pop("prompt_tokens_details", None)
            assert response["body"] == expected
        usage = expected["usage"]
        assert ended["usage"]["input_tokens"] == 3 * usage["prompt_tokens"]
        assert ended["usage"]["output_tokens"] == 3 * usage.get("completion_tokens", 0)


async def test_a_line_that_fails_does_not_fail_the_batch(server):
    lines = [line("good"), line("bad", temperature=-1), line("long", prompt="a" * 500), line("typo", promt="x")]
    ended = await server.ended((await server.create(lines))["id"])
    assert ended["status"] == "completed"
    assert ended["request_counts"] == {"total": 4, "completed": 1, "failed": 3}
    (good,) = await server.content(ended["output_file_id"])
    assert good["custom_id"] == "good"
    failed = {result["custom_id"]: result["response"] for result in await server.content(ended["error_file_id"])}
    assert set(failed) == {"bad", "long", "typo"}
    assert all(response["status_code"] == 400 for response in failed.values())
    assert failed["bad"]["body"]["error"]["param"] == "temperature"
    assert failed["long"]["body"]["error"]["code"] == "context_length_exceeded"
    assert failed["typo"]["body"]["error"]["code"] == "unknown_parameter"


async def test_a_malformed_file_fails_before_anything_runs(server, runner):
    content = jsonl([line("a"), line("b")]) + b"{oops\n" + jsonl([line("a"), line("c", stream=True)])
    ended = await server.ended((await server.create(content))["id"])
    assert ended["status"] == "failed" and ended["failed_at"]
    assert ended["output_file_id"] is None and ended["error_file_id"] is None
    assert ended["errors"]["object"] == "list"
    found = [(error["line"], error["code"], error["param"]) for error in ended["errors"]["data"]]
    assert found == [
        (3, "invalid_json_line", None),
        (4, "duplicate_custom_id", "custom_id"),
        (5, "invalid_value", "body.stream"),
    ]
    assert runner.num_steps == 0


async def test_lines_run_offline_whatever_they_say(server, engine, runner):
    runner.gate.clear()
    created = await server.create([line("a", offline=False, **LONG)])
    await server.until(created["id"], lambda batch: engine.stats().num_offline_running == 1)
    assert engine.stats().num_running == 1
    runner.gate.set()
    assert (await server.ended(created["id"]))["status"] == "completed"


@pytest.mark.parametrize("max_waiting", [6])
async def test_a_busy_server_delays_lines_and_fails_none(server, runner):
    """Of the eight lines that start at once the queue takes three."""
    lines = [line(f"{number}", prompt=["a", "b"] if number % 4 == 0 else "a") for number in range(12)]
    runner.gate.clear()
    created = await server.create(lines)
    async with asyncio.timeout(30):
        while "xllm_batch_lines_limit 4.0" not in (await server.client.get("/metrics")).text:
            await asyncio.sleep(0.01)
    runner.gate.set()
    ended = await server.ended(created["id"])
    assert ended["request_counts"] == {"total": 12, "completed": 12, "failed": 0}


async def test_online_requests_run_while_a_batch_fills_the_engine(server, runner):
    created = await server.create([line(f"{number}", **LONG) for number in range(20)])
    await server.until(created["id"], lambda batch: batch["request_counts"]["completed"] > 0)
    answer = await server.client.post(COMPLETIONS, json={"prompt": "abc", "max_tokens": 3})
    assert answer.json()["choices"][0]["text"] == "def"
    assert (await server.batch(created["id"]))["request_counts"]["completed"] < 20
    assert (await server.ended(created["id"]))["request_counts"]["completed"] == 20


async def test_cancelled_batches_keep_what_is_done(server, runner, engine):
    created = await server.create([line("short"), *(line(f"{number}", **LONG) for number in range(30))])
    await server.until(created["id"], lambda batch: batch["request_counts"]["completed"] > 0)
    runner.gate.clear()
    cancelling = (await server.client.post(f"/v1/batches/{created['id']}/cancel")).json()
    assert cancelling["status"] in ("cancelling", "cancelled") and cancelling["cancelling_at"]
    runner.gate.set()
    ended = await server.ended(created["id"])
    assert ended["status"] == "cancelled" and ended["cancelled_at"]
    counts = ended["request_counts"]
    done = await server.content(ended["output_file_id"])
    assert len(done) == counts["completed"] >= 1 and counts["failed"] == 0
    unrun = await server.content(ended["error_file_id"])
    assert len(unrun) == 31 - len(done)
    assert all(result["error"]["code"] == "batch_cancelled" and result["response"] is None for result in unrun)
    assert not {result["custom_id"] for result in done} & {result["custom_id"] for result in unrun}
    async with asyncio.timeout(10):
        while engine.stats().num_running or engine.stats().num_waiting:
            await asyncio.sleep(0.01)
    again = await server.client.post(f"/v1/batches/{created['id']}/cancel")
    assert again.json() == ended


async def test_a_batch_that_has_ended_cannot_be_cancelled(server):
    ended = await server.ended((await server.create([line("a")]))["id"])
    response = await server.client.post(f"/v1/batches/{ended['id']}/cancel")
    assert response.status_code == 409
    assert "completed" in response.json()["error"]["message"]


async def test_a_batch_expires(server, runner):
    runner.gate.clear()
    created = await server.create([line("a"), line("b", **LONG)])
    assert created["expires_at"] == created["created_at"] + 24 * 3600
    await server.until(created["id"], lambda batch: batch["status"] == "in_progress")
    await server.stop()
    # As after a day without a server.
    server.clock.now += 24 * 3600
    await server.start()
    runner.gate.set()
    ended = await server.ended(created["id"])
    assert ended["status"] == "expired" and ended["expired_at"] == int(server.clock.now)
    assert ended["request_counts"] == {"total": 2, "completed": 0, "failed": 0}
    assert [result["error"]["code"] for result in await server.content(ended["error_file_id"])] == ["batch_expired"] * 2


async def test_a_restart_goes_on_where_it_was(server):
    created = await server.create([line(f"{number}", max_tokens=20) for number in range(40)])
    before = await server.until(created["id"], lambda batch: batch["request_counts"]["completed"] >= 5)
    await server.stop()
    await server.start()
    at_restart = await server.batch(created["id"])
    assert at_restart["request_counts"]["completed"] >= before["request_counts"]["completed"]
    ended = await server.ended(created["id"])
    results = await server.content(ended["output_file_id"])
    assert sorted(int(result["custom_id"]) for result in results) == list(range(40))
    assert ended["request_counts"] == {"total": 40, "completed": 40, "failed": 0}


async def test_batches_share_the_engine(server, runner):
    """A short batch does not wait for the end of a long one."""
    long = await server.create([line(f"{number}", **LONG) for number in range(100)])
    await server.until(long["id"], lambda batch: batch["request_counts"]["completed"] > 0)
    short = await server.create([line(f"{number}") for number in range(5)])
    await server.ended(short["id"])
    assert (await server.batch(long["id"]))["request_counts"]["completed"] < 100
    assert (await server.client.post(f"/v1/batches/{long['id']}/cancel")).status_code == 200
    await server.ended(long["id"])


async def test_batches_are_listed_page_by_page(server):
    made = [(await server.create([line("a")]))["id"] for _ in range(5)]
    await server.ended(made[-1])
    page = (await server.client.get("/v1/batches?limit=3")).json()
    assert [batch["id"] for batch in page["data"]] == made[:1:-1]
    assert page["has_more"] and page["first_id"] == made[4] and page["last_id"] == made[2]
    page = (await server.client.get(f"/v1/batches?limit=3&after={page['last_id']}")).json()
    assert [batch["id"] for batch in page["data"]] == made[1::-1]
    assert not page["has_more"]


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"endpoint": "/v1/responses"}, 400, "endpoint"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"input_file_id": "file-none"}, 404, "input_file_id"),
        ({"input_file_id": "../../etc/passwd"}, 404, "input_file_id"),
        ({"metadata": {str(number): "" for number in range(17)}}, 400, "metadata"),
        ({"metadata": {"key": "x" * 513}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, 400, "output_expires_after"),
        ({"priority": 1}, 400, "priority"),
    ],
)
async def test_bad_batches_are_refused(server, changes, status, param):
    file_id = (await server.upload(jsonl([line("a")]))).json()["id"]
    body = {"input_file_id": file_id, "endpoint": COMPLETIONS, "completion_window": "24h"} | changes
    response = await server.client.post("/v1/batches", json=body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "path", ["/v1/batches?limit=0", "/v1/batches?limit=101", "/v1/files?limit=x", "/v1/files?order=up"]
)
async def test_bad_pages_are_refused(server, path):
    assert (await server.client.get(path)).status_code == 400


async def test_unknown_ids(server):
    assert (await server.client.get("/v1/batches/batch_none")).json()["error"]["code"] == "batch_not_found"
    assert (await server.client.get("/v1/batches?after=batch_none")).status_code == 404
    assert (await server.client.post("/v1/batches/batch_none/cancel")).status_code == 404


async def test_metrics(server):
    await server.ended((await server.create([line("a"), line("b", temperature=-1)]))["id"])
    text = (await server.client.get("/metrics")).text
    assert 'xllm_batches{status="completed"} 1.0' in text
    assert 'xllm_batch_lines_total{outcome="completed"} 1.0' in text
    assert 'xllm_batch_lines_total{outcome="failed"} 1.0' in text
    assert "xllm_batch_lines_pending 0.0" in text
    assert "xllm_batch_lines_running 0.0" in text


async def test_lines_wait_while_the_disk_is_full(start, caplog):
    content = jsonl([line(f"{number}") for number in range(20)])
    server = await start(max_disk_bytes=2 * len(content))
    spare = (await server.upload(content)).json()["id"]
    created = await server.create(content)
    await server.until(created["id"], lambda batch: "--batch-disk-size" in caplog.text)
    assert (await server.batch(created["id"]))["request_counts"]["completed"] == 0
    refused = await server.upload(b"x")
    assert refused.status_code == 413 and refused.json()["error"]["code"] == "disk_quota_exceeded"
    assert (await server.client.delete(f"/v1/files/{spare}")).json() == {"id": spare, "object": "file", "deleted": True}
    await server.until(created["id"], lambda batch: batch["request_counts"]["completed"] > 0)


async def test_a_dead_engine_fails_no_line(server, runner, engine):
    runner.error = RuntimeError("out of memory")
    created = await server.create([line("a"), line("b")])
    async with asyncio.timeout(10):
        while engine.is_healthy:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0)
    counts = (await server.batch(created["id"]))["request_counts"]
    assert counts["failed"] == 0


async def test_lines_wait_while_the_model_sleeps(server, engine):
    await engine.sleep(1, "abort")
    created = await server.create([line("a"), line("b")])
    await server.until(created["id"], lambda batch: batch["status"] == "in_progress")
    engine.wake_up()
    ended = await server.ended(created["id"])
    assert ended["request_counts"] == {"total": 2, "completed": 2, "failed": 0}


async def test_a_line_that_the_server_fails_at_is_tried_again(server, monkeypatch):
    """Once succeeds at the second try, often never."""
    num_calls: Counter[str] = Counter()

    async def ask(service, endpoint, body):
        prompt = json.loads(body)["prompt"]
        num_calls[prompt] += 1
        if prompt == "often" or num_calls[prompt] == 1:
            raise RuntimeError("a bug")
        return await line_request.ask(service, endpoint, body)

    monkeypatch.setattr(runner_module, "ask", ask)
    ended = await server.ended((await server.create([line("o", prompt="once"), line("n", prompt="often")]))["id"])
    assert ended["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    assert num_calls == {"once": 2, "often": MAX_ATTEMPTS}
    (failed,) = await server.content(ended["error_file_id"])
    assert failed["custom_id"] == "n" and failed["response"]["status_code"] == 500


class Deadly:
    """In place of `ask`: prompts that begin with "x" wait for the end of the server, others for `gate`."""

    def __init__(self):
        self.gate = asyncio.Event()
        self.running = []
        self.num_most = 0

    async def __call__(self, service, endpoint, body):
        prompt = json.loads(body)["prompt"]
        self.running.append(prompt)
        self.num_most = max(self.num_most, len(self.running))
        try:
            await (asyncio.Event() if prompt.startswith("x") else self.gate).wait()
        finally:
            self.running.remove(prompt)
        return await line_request.ask(service, endpoint, body)

    async def runs(self, prompts):
        """In any order: lines are read by several threads."""
        async with asyncio.timeout(10):
            while sorted(self.running) != sorted(prompts):
                await asyncio.sleep(0.005)


async def test_a_line_that_ends_its_server_is_given_up_and_those_beside_it_are_not(server, monkeypatch, tmp_path):
    monkeypatch.setattr(runner_module, "ask", ask := Deadly())
    created = await server.create([line("a", prompt="a"), line("x", prompt="x"), line("b", prompt="b")])
    for life in range(MAX_ATTEMPTS - 1):
        await ask.runs(["a", "x", "b"])
        await server.kill(tmp_path / str(life))
    # Whose fault it is shows when each runs alone.
    ask.num_most = 0
    await ask.runs(["a"])
    ask.gate.set()
    await ask.runs(["x"])
    assert ask.num_most == 1
    await server.kill(tmp_path / "last")
    ended = await server.ended(created["id"])
    assert ended["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    (failed,) = await server.content(ended["error_file_id"])
    assert failed["custom_id"] == "x" and failed["response"]["body"]["error"]["code"] == "request_lost"


async def test_what_ended_without_being_tried_counts_as_no_attempt(server, monkeypatch, tmp_path):
    """Ended in order, again and again: none of them is a suspect."""
    monkeypatch.setattr(runner_module, "ask", ask := Deadly())
    created = await server.create([line(str(number), prompt="a") for number in range(4)])
    for _ in range(MAX_ATTEMPTS + 1):
        await ask.runs(["a"] * 4)
        await server.stop()
        await server.start()
    ask.gate.set()
    ended = await server.ended(created["id"])
    assert ended["request_counts"] == {"total": 4, "completed": 4, "failed": 0}


async def test_a_line_that_ends_instance_after_instance_fails(server, monkeypatch):
    async def handle(service, body, send):
        raise ApiError(errors.UNAVAILABLE, "It lost 5 instances.", code="instances_lost")

    monkeypatch.setitem(line_request._HANDLERS, "/v1/completions", handle)
    ended = await server.ended((await server.create([line("a")]))["id"])
    assert ended["request_counts"] == {"total": 1, "completed": 0, "failed": 1}
    (failed,) = await server.content(ended["error_file_id"])
    assert failed["response"]["body"]["error"]["code"] == "instances_lost"


async def test_results_are_lines_to_every_reader(server):
    """What Python and others take for line ends is escaped: 0x85 and U+2028 are written by models too."""
    ended = await server.ended((await server.create([line("a", prompt="\u2028\x85", echo=True)]))["id"])
    content = (await server.client.get(f"/v1/files/{ended['output_file_id']}/content")).text
    (only,) = content.splitlines()
    assert json.loads(only)["response"]["body"]["choices"][0]["text"].startswith("\u2028\x85")
