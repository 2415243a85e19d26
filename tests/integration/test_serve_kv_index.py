"""Two xllm-serve processes and a gateway's client of them: who has a prefix gets the requests that begin with it."""

import asyncio
import signal
from contextlib import ExitStack, aclosing
from typing import Any

import grpc
import httpx
import pytest

from tests.integration.helpers import until
from tests.integration.serve_process import ServeProcess
from xllm_compile.runtime.memory.prefix_cache import BlockChain
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams
from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.cluster_client import ClusterClient
from xllm_compile.scheduler.cluster.instance_messages import info_of
from xllm_compile.scheduler.cluster.placer import Placer
from xllm_compile.scheduler.cluster.state import Health
from xllm_compile.scheduler.policies.routing import RoutingRules
from xllm_compile.scheduler.proto import xllm_pb2, xllm_pb2_grpc

pytestmark = pytest.mark.integration

NUM_PREFIX_TOKENS = 500
# Room for one prompt and a half.
OPTIONS = ("--max-num-seqs", "2", "--max-model-len", "640", "--kv-memory", "1MiB")


def prompt(seed: int, question: int) -> list[int]:
    prefix = [(7 * at * at + seed * at + seed) % 4000 + 5 for at in range(NUM_PREFIX_TOKENS)]
    return [*prefix, *range(100 * question + 10, 100 * question + 30)]


def info(process: ServeProcess) -> Any:
    with grpc.insecure_channel(process.grpc) as channel:
        return info_of(xllm_pb2_grpc.InstanceStub(channel).GetInstanceInfo(xllm_pb2.GetInstanceInfoRequest()))


class Service:
    """A gateway without its servers."""

    def __init__(self, *processes: ServeProcess) -> None:
        self.cluster = Cluster()
        self.client = ClusterClient(self.cluster, placer=Placer(RoutingRules(policy="prefix")))
        self.infos = [info(process) for process in processes]
        self._num_requests = 0

    async def start(self) -> None:
        await self.cluster.update([(each, Health.ACTIVE) for each in self.infos])
        async with asyncio.timeout(30):
            while len([each for each in self.cluster.instances() if each.takes_work]) < len(self.infos):
                await self.cluster.wait_changed(1)

    async def ask(self, token_ids: list[int]) -> int:
        """The tokens that were cached."""
        self._num_requests += 1
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        async with aclosing(self.client.generate(str(self._num_requests), token_ids, params)) as outputs:
            return [output async for output in outputs][-1].num_cached_tokens

    def cached(self, token_ids: list[int]) -> dict[str, int]:
        """Tokens on the device, by instance."""
        chain = BlockChain(16)
        chain.update(token_ids)
        return {name: cached.device for name, cached in self.cluster.kv.match(chain.digests).items()}

    async def until(self, token_ids: list[int], *names: str) -> None:
        """Until these are known to have it, all its first 500 tokens but a block."""
        async with asyncio.timeout(30):
            while {name for name, count in self.cached(token_ids).items() if count >= 496} != set(names):
                await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def processes(family_artifact):
    artifact = family_artifact("qwen3")
    with ExitStack() as stack:
        yield [stack.enter_context(ServeProcess(artifact, "--role", "mix", "--name", name, *OPTIONS)) for name in "ab"]


@pytest.fixture
async def service(processes):
    service = Service(*processes)
    await service.start()
    yield service
    await service.cluster.close()


def num_requests(process: ServeProcess) -> float:
    return process.metrics()["xllm_prompt_tokens_total"]


async def test_the_second_request_goes_where_the_prefix_is_until_it_is_evicted(service, processes):
    first = prompt(1, 1)
    assert await service.ask(first) == 0
    async with asyncio.timeout(30):
        while not service.cached(first):
            await asyncio.sleep(0.02)
    (home,) = service.cached(first)
    other = {"a": "b", "b": "a"}[home]
    await service.until(first, home)
    by_name = dict(zip("ab", processes, strict=True))
    before = num_requests(by_name[other])
    for question in range(2, 5):
        assert await service.ask(prompt(1, question)) >= 480
    assert num_requests(by_name[other]) == before
    # Others take its pages: the index hears of it.
    for seed in range(2, 12):
        await service.ask(prompt(seed, 1))
        if home not in service.cached(first):
            break
    async with asyncio.timeout(30):
        while service.cached(first).get(home, 0) >= 480:
            await service.ask(prompt(seed := seed + 1, 1))
    found = await service.ask(prompt(1, 9))
    assert found < 480


async def test_a_gateway_that_starts_now_knows_what_is_there(service, processes):
    last = prompt(50, 1)
    await service.ask(last)
    async with asyncio.timeout(30):
        # Its blocks come as they are computed.
        while max(service.cached(last).values(), default=0) < 512:
            await asyncio.sleep(0.02)
    later = Service(*processes)
    await later.start()
    try:
        await later.until(last, *service.cached(last))
        assert later.cached(last) == service.cached(last)
    finally:
        await later.cluster.close()


def blocks(gateway: ServeProcess) -> dict[str, float]:
    return believed(gateway, "kv_blocks")


def believed(gateway: ServeProcess, what: str) -> dict[str, float]:
    """Of each instance, by the gateway."""
    metrics = gateway.metrics()
    return {name: metrics.get(f'xllm_instance_{what}{{instance="{name}"}}', -1) for name in "ab"}


def complete(gateway: ServeProcess, token_ids: list[int]) -> int:
    """The tokens that were cached."""
    body = {"prompt": token_ids, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{gateway.http}/v1/completions", json=body, timeout=120)
    answer.raise_for_status()
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_gateway_follows_its_instances_and_forgets_only_who_is_gone(family_artifact):
    artifact = family_artifact("qwen3")
    with ExitStack() as stack:

        def start(*options: str) -> ServeProcess:
            return stack.enter_context(ServeProcess(artifact, *options))

        gateway = start("--role", "gateway", "--registry-port", "0", "--routing", "prefix")
        options = ("--role", "mix", "--registry", gateway.registry, "--threads", "1")
        processes = {name: start(*options, "--name", name) for name in "ab"}
        until(lambda: min(blocks(gateway).values()) == 0)
        # To each of them, past the gateway: it hears of what it has not sent as well.
        for seed, process in enumerate(processes.values(), 1):
            complete(process, prompt(seed, 1))
        until(lambda: min(blocks(gateway).values()) >= 32)
        # Who is believed to be busy yet is not worth waiting for.
        until(lambda: set(believed(gateway, "sequences_running").values()) == {0})
        assert [complete(gateway, prompt(seed, 2)) for seed in (1, 2, 1, 2)] == [496, 496, 512, 512]
        processes["a"].send(signal.SIGKILL)
        processes["a"].wait()
        until(lambda: complete(gateway, prompt(1, 3)) >= 496)
        assert complete(gateway, prompt(2, 3)) == 496
        start(*options, "--name", "a")
        until(lambda: blocks(gateway)["a"] == 0)
        assert blocks(gateway)["b"] >= 64
        assert complete(gateway, prompt(2, 4)) == 496
