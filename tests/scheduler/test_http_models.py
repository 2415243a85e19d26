"""Two models behind one door."""

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from tests.scheduler.service_fixtures import MAX_MODEL_LEN, ScriptedRunner, counting_engine
from xllm_compile.runtime.async_engine import AsyncEngine
from xllm_compile.scheduler.http_api import build_app
from xllm_compile.scheduler.service import Service


@pytest.fixture
def other() -> Iterator[AsyncEngine]:
    """Answers "hello"."""
    engine = AsyncEngine(counting_engine(ScriptedRunner("hello")))
    yield engine
    engine.shutdown()


def served(engine: AsyncEngine, door: Service, name: str) -> Service:
    return Service(
        engine=engine,
        tokenizer=engine.engine.tokenizer,
        model_names=(name,),
        max_model_len=MAX_MODEL_LEN // 2,
        version="1.2.3",
        door=door,
    )


@pytest.fixture
async def client(service: Service, other: AsyncEngine) -> AsyncIterator[httpx.AsyncClient]:
    served(other, service, "other")
    transport = httpx.ASGITransport(app=build_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def complete(client: httpx.AsyncClient, **model: str) -> httpx.Response:
    return await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5, **model})


async def test_the_field_model_chooses_and_the_first_model_answers_without_it(client: httpx.AsyncClient) -> None:
    answers = {name: (await complete(client, model=name)).json() for name in ("counter", "alias", "other")}
    assert {name: answer["choices"][0]["text"] for name, answer in answers.items()} == {
        "counter": "defgh",
        "alias": "defgh",
        "other": "hello",
    }
    assert answers["other"]["model"] == "other"
    assert (await complete(client)).json()["choices"][0]["text"] == "defgh"
    chat = {"model": "other", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
    answer = await client.post("/v1/chat/completions", json=chat)
    assert answer.json()["choices"][0]["message"]["content"] == "hello"
    tokens = await client.post("/tokenize", json={"model": "other", "prompt": "ab"})
    assert tokens.json()["max_model_len"] == MAX_MODEL_LEN // 2
    unknown = await complete(client, model="none")
    assert unknown.status_code == 404 and "'counter', 'alias', 'other'" in unknown.text


async def test_all_models_are_listed_with_their_own_limits(client: httpx.AsyncClient) -> None:
    cards = (await client.get("/v1/models")).json()["data"]
    assert [(card["id"], card["root"], card["max_model_len"]) for card in cards] == [
        ("counter", "counter", MAX_MODEL_LEN),
        ("alias", "counter", MAX_MODEL_LEN),
        ("other", "other", MAX_MODEL_LEN // 2),
    ]
    assert (await client.get("/v1/models/other")).json()["id"] == "other"


async def test_metrics_say_of_which_model_they_are_and_each_family_appears_once(client: httpx.AsyncClient) -> None:
    await complete(client, model="other")
    lines = (await client.get("/metrics")).text.splitlines()
    assert 'xllm_generation_tokens_total{model_name="other"} 5.0' in lines
    assert 'xllm_generation_tokens_total{model_name="counter"} 0.0' in lines
    assert 'xllm_time_to_first_token_seconds_count{model_name="other"} 1.0' in lines
    # Of the process, not of a model.
    assert "xllm_open_streams 0.0" in lines
    assert 'xllm_requests_total{api="http",outcome="ok"} 1.0' in lines
    families = [line for line in lines if line.startswith("# TYPE")]
    assert len(families) == len(set(families))


async def test_one_model_sleeps_while_the_other_answers(client: httpx.AsyncClient) -> None:
    assert (await client.post("/sleep?model=other")).status_code == 200
    assert (await client.get("/is_sleeping?model=other")).json() == {"is_sleeping": True}
    assert (await client.get("/is_sleeping?model=counter")).json() == {"is_sleeping": False}
    assert (await complete(client, model="other")).status_code == 503
    assert (await complete(client, model="counter")).status_code == 200
    assert (await client.post("/wake_up?model=other")).status_code == 200
    assert (await complete(client, model="other")).json()["choices"][0]["text"] == "hello"


@pytest.mark.parametrize("path", ["/sleep", "/wake_up", "/pause", "/resume"])
async def test_whom_it_concerns_must_be_said(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.post(path)).status_code == 400
    assert (await client.post(f"{path}?model=none")).status_code == 404


async def test_a_stopped_engine_of_any_model_is_unhealthy(client: httpx.AsyncClient, other: AsyncEngine) -> None:
    assert (await client.get("/health")).status_code == 200
    other.shutdown()
    assert (await client.get("/health")).status_code == 503


async def test_two_models_of_one_name_are_refused(service: Service, other: AsyncEngine) -> None:
    with pytest.raises(ValueError, match="two models are served as 'alias'"):
        served(other, service, "alias")
