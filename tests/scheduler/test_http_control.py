import asyncio

import pytest


@pytest.mark.parametrize("mode", ["", "?mode=keep", "?mode=wait"])
async def test_a_paused_server_takes_requests_and_computes_nothing_until_it_resumes(client, runner, mode):
    assert (await client.get("/is_paused")).json() == {"is_paused": False}
    assert (await client.post(f"/pause{mode}")).status_code == 200
    assert (await client.get("/is_paused")).json() == {"is_paused": True}
    answer = asyncio.create_task(client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3}))
    while "xllm_open_streams 1.0" not in (await client.get("/metrics")).text:
        await asyncio.sleep(0)
    assert runner.num_steps == 0
    assert (await client.post("/resume")).status_code == 200
    assert (await answer).json()["choices"][0]["text"] == "def"
    assert (await client.get("/is_paused")).json() == {"is_paused": False}


async def test_an_unknown_mode_is_refused_with_those_there_are(client):
    response = await client.post("/pause?mode=sleep")
    assert response.status_code == 400
    assert "'sleep' must be one of keep, wait, abort" in response.json()["error"]["message"]
    assert (await client.get("/is_paused")).json() == {"is_paused": False}


async def test_a_dead_engine_does_not_pause(client, engine):
    await asyncio.to_thread(engine.shutdown)
    response = await client.post("/pause")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_dead")
