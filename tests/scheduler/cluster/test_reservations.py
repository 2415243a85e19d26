"""Prefill and decode on two instances that really move KV: what D holds for a request ends with it."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.runtime.fakes import HistoryRunner, make_kv_cache
from tests.runtime.sides import room_for
from tests.scheduler.cluster.cluster_fixtures import FakeCluster, FakeInstance, ReportingServicer
from tests.scheduler.cluster.test_cluster_client import generate, ids_of
from tests.scheduler.service_fixtures import byte_tokenizer
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.engine_config import EngineConfig
from xllm_compile.runtime.transfer.endpoint import open_endpoint
from xllm_compile.runtime.transfer.transfer import TransferConfig
from xllm_compile.scheduler.cluster import instance_link
from xllm_compile.scheduler.cluster.attempts import FailoverConfig
from xllm_compile.scheduler.cluster.placer import Placer
from xllm_compile.scheduler.cluster.state import Role
from xllm_compile.scheduler.policies.routing import RoutingRules
from xllm_compile.scheduler.proto import xllm_pb2

PROMPT = bytes(range(40, 60))
NUM_TOKENS = 6


class HookedServicer(ReportingServicer):
    """Calls hooks["reserved"], ["start"] and ["handed over"] before those messages go on their way."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.hooks: dict[str, Any] = {}
        self.num_releases = 0
        self.reserved: Any = None

    async def _at(self, message: str) -> None:
        if message in self.hooks:
            await self.hooks[message]()

    async def _reserve(self, request: Any) -> Any:
        self.reserved = request
        answer = await super()._reserve(request)
        await self._at("reserved")
        return answer

    async def Release(self, request: Any, context: Any) -> Any:
        self.num_releases += 1
        return await super().Release(request, context)

    async def Run(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for message in super().Run(self._requests(request_iterator), context):
            reasons = {choice.finish_reason for output in message.outputs for choice in output.choices}
            if xllm_pb2.FINISH_REASON_HANDED_OVER in reasons:
                await self._at("handed over")
            yield message

    async def _requests(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            if request.WhichOneof("action") == "start":
                await self._at("start")
            yield request


class TransferringInstance(FakeInstance):
    servicer_class = HookedServicer

    def _make_engine(self, config: EngineConfig) -> tuple[Any, Engine]:
        kv_cache = make_kv_cache(block_tokens=4)
        runner = HistoryRunner(kv_cache, vocab_size=257)
        memory: Any = kv_cache.xtensor.memory
        transfer = open_endpoint(("shm",), memory.region, TransferConfig(timeout_s=5))
        return runner, Engine(runner, kv_cache, byte_tokenizer(), config, transfer=transfer)

    @property
    def reservations(self) -> Any:
        return self.engine.stats().reservations

    @property
    def is_empty(self) -> bool:
        stats = self.engine.stats()
        return not (self.reservations.num_open or stats.kv_tokens_used or stats.num_running or stats.num_waiting)


class Pair(FakeCluster):
    """Whoever leaves or dies does so with the next request."""

    def __init__(self) -> None:
        instances: dict[str, FakeInstance] = {
            "p": TransferringInstance("p", Role.PREFILL),
            "d": TransferringInstance("d", Role.DECODE),
        }
        # By load, prompts of any length go from prefill to decode.
        super().__init__(instances, FailoverConfig(wait_s=10), Placer(RoutingRules(policy="load")))

    @property
    def d(self) -> Any:
        return self.instances["d"]

    def request(self, **options: Any) -> "asyncio.Task[Any]":
        self.task = asyncio.create_task(generate(self, prompt=PROMPT, max_tokens=NUM_TOKENS, **options))
        return self.task

    def hook(self, side: str, message: str, action: str) -> None:
        instance: Any = self.instances[side]
        hooks = instance.servicer.hooks

        async def act() -> None:
            del hooks[message]
            await getattr(self, f"_{action}")(instance)

        hooks[message] = act

    async def _refuse(self, instance: Any) -> None:
        instance.service.is_draining = True

    async def _die(self, instance: Any) -> None:
        raise ConnectionError("the stream ends here")

    async def _leave(self, instance: Any) -> None:
        """The client; its instances hear of it before they do anything else."""
        self.task.cancel()
        async with asyncio.timeout(10):
            while not self.d.servicer.num_releases:
                await asyncio.sleep(0.005)

    async def _give_up(self, instance: Any) -> None:
        """What was reserved: nobody may write there any more."""
        await self.d.engine.release(self.d.servicer.reserved.reservation_id)

    async def _never(self, instance: Any) -> None:
        await asyncio.Event().wait()


@pytest.fixture
async def pair():
    pair = Pair()
    await pair.start()
    yield pair
    await pair.close()


@pytest.fixture
async def expected(pair):
    """Of one instance."""
    await pair.register("d")
    tokens = ids_of(await pair.request())
    await pair.register()
    await pair.until(lambda: all(each.takes_work for each in pair.cluster.instances()))
    return tokens


async def ends_empty(pair):
    await pair.until(lambda: all(instance.is_empty for instance in pair.instances.values()))
    assert pair.d.reservations.num_expired == 0


async def test_what_was_taken_over_is_not_released(pair, expected):
    assert ids_of(await pair.request()) == expected
    await ends_empty(pair)
    assert pair.cluster.stats.num_handed_over == 1
    assert (pair.d.reservations.num_claimed, pair.d.servicer.num_releases) == (1, 0)


async def test_kv_that_does_not_arrive_is_no_hand_over(pair):
    pair.hook("p", "start", "give_up")
    tokens = ids_of(await pair.request())
    await ends_empty(pair)
    assert (pair.cluster.stats.num_split, pair.cluster.stats.num_handed_over) == (1, 0)
    assert ids_of(await pair.request()) == tokens
    await ends_empty(pair)
    assert (pair.cluster.stats.num_split, pair.cluster.stats.num_handed_over) == (2, 1)


@pytest.mark.parametrize(("options", "target_ms"), [({}, None), ({"tpot_slo_ms": 40.0}, 40.0)])
async def test_who_will_decode_knows_the_target(pair, expected, options, target_ms):
    assert ids_of(await pair.request(**options)) == expected
    found = pair.d.servicer.reserved
    assert (found.tpot_slo_ms if found.HasField("tpot_slo_ms") else None) == target_ms
    assert found.max_output_tokens == NUM_TOKENS
    await ends_empty(pair)


async def test_who_decodes_knows_when_the_answer_began(pair, expected, monkeypatch):
    resumes = []

    def generated(*args, generate=pair.d.service.generate, **options):
        resumes.append(options["resume"])
        return generate(*args, **options)

    monkeypatch.setattr(pair.d.service, "generate", generated)
    begun_s = time.monotonic()
    assert ids_of(await pair.request()) == expected
    (resume,) = resumes
    assert 0.0 <= resume.first_token_age_s <= time.monotonic() - begun_s


@pytest.mark.parametrize(
    ("side", "message", "action"),
    [
        ("p", "start", "refuse"),
        ("p", "start", "die"),
        ("p", "handed over", "die"),
        ("d", "start", "refuse"),
        ("d", "start", "die"),
    ],
)
async def test_a_request_that_goes_on_elsewhere_leaves_nothing(pair, expected, side, message, action):
    pair.hook(side, message, action)
    assert ids_of(await pair.request()) == expected
    await ends_empty(pair)
    assert pair.d.servicer.num_releases == 1


@pytest.mark.parametrize(("side", "message"), [("d", "reserved"), ("p", "start"), ("p", "handed over"), ("d", "start")])
async def test_a_client_that_leaves_leaves_nothing(pair, side, message):
    pair.hook(side, message, "leave")
    with pytest.raises(asyncio.CancelledError):
        await pair.request()
    await ends_empty(pair)
    assert pair.d.servicer.num_releases == 1


async def test_a_reservation_whose_answer_is_late_is_given_up(pair, expected, monkeypatch):
    monkeypatch.setattr(instance_link, "_CALL_TIMEOUT_S", 0.2)
    pair.hook("d", "reserved", "never")
    assert ids_of(await pair.request()) == expected
    await ends_empty(pair)


async def test_a_reservation_that_was_refused_is_not_released(pair, expected):
    for index in range(7):
        await pair.d.engine.reserve(room_for(str(index), [index]))
    assert ids_of(await pair.request()) == expected
    assert pair.cluster.stats.num_refused == 1
    for index in range(7):
        assert await pair.d.engine.release(str(index))
    await ends_empty(pair)
    assert pair.d.servicer.num_releases == 0


async def test_a_client_that_leaves_after_its_slot_was_taken_over(pair):
    pair.d.runner.gate.clear()
    request = pair.request()
    await pair.until(lambda: pair.d.reservations.num_claimed == 1)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    pair.d.runner.gate.set()
    await ends_empty(pair)
