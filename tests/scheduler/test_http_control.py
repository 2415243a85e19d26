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


async def test_a_server_asleep_refuses_requests_until_it_wakes_up(client):
    assert (await client.post("/sleep?level=2&mode=abort")).status_code == 200
    assert (await client.get("/is_sleeping")).json() == {"is_sleeping": True}
    refused = await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "asleep")
    assert "retry-after" in refused.headers
    assert (await client.post("/wake_up")).status_code == 200
    answer = await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3})
    assert answer.json()["choices"][0]["text"] == "def"
    assert (await client.get("/is_sleeping")).json() == {"is_sleeping": False}


async def test_waking_up_ends_a_pause_as_it_does_in_vllm(client, runner):
    assert (await client.post("/pause")).status_code == 200
    for slept in (False, True):
        if slept:
            assert (await client.post("/pause")).status_code == 200
            assert (await client.post("/sleep")).status_code == 200
        assert (await client.post("/wake_up")).status_code == 200
        assert (await client.get("/is_paused")).json() == {"is_paused": False}
    answer = await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3})
    assert answer.json()["choices"][0]["text"] == "def"


@pytest.mark.parametrize(("query", "choices"), [("level=3", "1, 2"), ("mode=keep", "wait, abort")])
async def test_sleep_names_what_there_is_to_choose(client, query, choices):
    response = await client.post(f"/sleep?{query}")
    assert response.status_code == 400 and f"must be one of {choices}" in response.json()["error"]["message"]
    assert (await client.get("/is_sleeping")).json() == {"is_sleeping": False}
