"""The Instance service on a counting engine that takes KV: what it reserves, refuses and gives back."""

import asyncio
import math

import grpc.aio
import pytest

from tests.runtime.fakes import HistoryRunner, make_kv_cache
from tests.runtime.sides import room_for
from tests.scheduler.service_fixtures import byte_tokenizer
from xllm_compile.runtime.async_engine import AsyncEngine
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.resume import Resume
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.transfer.endpoint import open_endpoint
from xllm_compile.runtime.transfer.transfer import TransferConfig
from xllm_compile.scheduler.proto import xllm_pb2
from xllm_compile.scheduler.service import Service

PROMPT = list(range(40, 60))


@pytest.fixture
def runner():
    return HistoryRunner(make_kv_cache(block_tokens=4), vocab_size=257)


@pytest.fixture
def engine(runner):
    kv_cache = runner._kv_cache
    transfer = open_endpoint(("shm",), kv_cache.xtensor.memory.region, TransferConfig(timeout_s=5))
    engine = AsyncEngine(Engine(runner, kv_cache, byte_tokenizer(), transfer=transfer))
    yield engine
    runner.gate.set()
    engine.shutdown()
    engine.engine.close()


@pytest.fixture
def service(engine):
    return Service(
        engine=engine,
        tokenizer=engine.engine.tokenizer,
        model_names=("counter",),
        max_model_len=64,
        version="1",
        api_keys=("key",),
    )


KEY = (("authorization", "Bearer key"),)


async def reserve(stub, **fields):
    given = {"reservation_id": "r", "token_ids": PROMPT, "weights_key": "weights", "kv_layout": "layout"} | fields
    return await stub.Reserve(xllm_pb2.ReserveRequest(**given), metadata=KEY)


def num_held(engine):
    return engine.stats().reservations.num_open


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_reserved_and_released(stub, engine):
    first = await reserve(stub)
    assert (first.incarnation, first.num_cached_tokens, len(first.token)) == ("first", 0, 32)
    assert len(first.page_offsets) == 7 and first.page_bytes == 3 * 4096
    # The answer was lost, and is asked for again.
    assert await reserve(stub) == first
    assert num_held(engine) == 1
    for was_open in (True, False):
        answer = await stub.Release(xllm_pb2.ReleaseRequest(reservation_id="r"), metadata=KEY)
        assert answer.was_open is was_open
    await until(lambda: num_held(engine) == 0)
    assert engine.stats().kv_tokens_used == 0


async def test_what_a_gateway_reserved_ends_with_it(stub, engine, monkeypatch):
    monkeypatch.setattr("xllm_compile.scheduler.watchers.GRACE_S", 0.0)
    watch = stub.WatchLoad(xllm_pb2.WatchLoadRequest(watcher="gateway", period_ms=20), metadata=KEY)
    await watch.read()
    await reserve(stub, watcher="gateway")
    await reserve(stub, reservation_id="other", watcher="another")
    assert num_held(engine) == 2
    watch.cancel()
    await until(lambda: num_held(engine) == 1)
    answer = await stub.Release(xllm_pb2.ReleaseRequest(reservation_id="other"), metadata=KEY)
    assert answer.was_open


async def test_the_key_and_the_fields_are_checked(stub, service):
    async def code(**fields):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reserve(stub, **fields)
        return caught.value.code().name

    with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
        await stub.Reserve(xllm_pb2.ReserveRequest())
    assert await code(weights_key="w") == "FAILED_PRECONDITION"
    assert await code(token_ids=[]) == "INVALID_ARGUMENT"
    assert await code(token_ids=[999]) == "INVALID_ARGUMENT"
    assert await code(token_ids=[5] * 64) == "INVALID_ARGUMENT"
    assert await code(timeout_ms=10**7) == "INVALID_ARGUMENT"
    for tpot_slo_ms in (0.0, -5.0, math.nan):
        assert await code(tpot_slo_ms=tpot_slo_ms) == "INVALID_ARGUMENT"
    for index in range(7):
        await reserve(stub, reservation_id=str(index), token_ids=[index])
    assert await code() == "RESOURCE_EXHAUSTED"
    service.is_draining = True
    assert await code() == "UNAVAILABLE"


async def test_a_cancelled_reserve_holds_nothing(stub, engine, runner):
    runner.gate.clear()
    running = asyncio.create_task(anext(engine.generate("busy", [5], SamplingParams(max_tokens=5, ignore_eos=True))))
    await until(lambda: engine.stats().num_running)
    call = asyncio.create_task(engine.reserve(room_for("r", PROMPT)))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    runner.gate.set()
    await running
    await until(lambda: num_held(engine) == 0)


async def test_a_resume_that_leaves_at_once_gives_its_slot_back(stub, engine):
    resume = Resume(output_token_ids=[], reservation_id="r")
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    await reserve(stub)
    stream = await engine.submit("a", PROMPT, params, resume=resume)
    await stream.aclose()
    await until(lambda: engine.stats().kv_tokens_used == 0)


async def test_a_reservation_ends_without_steps_or_calls(engine):
    await engine.reserve(room_for("r", PROMPT, 0.05))
    await until(lambda: engine.stats().reservations.num_expired == 1 and num_held(engine) == 0)


async def test_a_failed_step_is_no_callers_mistake(engine, runner):
    task = asyncio.create_task(anext(engine.generate("busy", [5], SamplingParams(max_tokens=50, ignore_eos=True))))
    await task
    runner.fails = True
    with pytest.raises(RuntimeError):
        for index in range(100):
            await engine.reserve(room_for(str(index % 2), PROMPT))
            await engine.release(str(index % 2))
            await asyncio.sleep(0.005)
    assert not engine.is_healthy
