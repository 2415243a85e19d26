"""Two xllm-serve processes and a gateway's client of them: what one has of a prompt, the other does not compute."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import ExitStack, aclosing, contextmanager

import grpc
import pytest

from tests.integration.helpers import until
from tests.integration.serve_process import ServeProcess
from tests.integration.test_serve_kv_index import info
from xllm_compile.runtime.memory.prefix_cache import BlockChain
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams
from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.cluster_client import ClusterClient
from xllm_compile.scheduler.cluster.placer import Placer
from xllm_compile.scheduler.cluster.state import Health
from xllm_compile.scheduler.policies.copy_times import CopyPrior, CopyTimes
from xllm_compile.scheduler.policies.fetch import FetchRules
from xllm_compile.scheduler.proto import xllm_pb2, xllm_pb2_grpc

pytestmark = pytest.mark.integration

NUM_TOKENS = 8
OPTIONS = ("--max-num-seqs", "4", "--kv-memory", "64MiB", "--threads", "1")


def prompt(seed: int) -> list[int]:
    return [(7 * at * at + seed * at + seed) % 4000 + 5 for at in range(700)]


class ToB(Placer):
    """Whatever is predicted, `b` gets the request, and copying pays."""

    def __init__(self) -> None:
        super().__init__(fetch=FetchRules(margin=1.0, least_wait_s=60))
        self._copies = CopyTimes(CopyPrior(latency_s=0.0, bytes_per_s=1e15))

    def place(self, key, request, fleet, cached=None, *, refused=(), lost=()):
        others = [instance.info.incarnation for instance in fleet.instances() if instance.name != "b"]
        return super().place(key, request, fleet, cached, refused=[*refused, *others], lost=lost)


class Service:
    """A gateway without its servers."""

    def __init__(self, *processes: ServeProcess) -> None:
        self.cluster = Cluster()
        self.client = ClusterClient(self.cluster, placer=ToB())
        self.infos = [info(process) for process in processes]

    async def start(self) -> None:
        await self.cluster.update([(each, Health.ACTIVE) for each in self.infos])
        async with asyncio.timeout(30):
            while len([each for each in self.cluster.instances() if each.takes_work]) < len(self.infos):
                await self.cluster.wait_changed(1)

    async def ask(self, token_ids: list[int], request_id: str = "r") -> tuple[list[int], int]:
        """The tokens, and how many of the prompt were cached."""
        params = SamplingParams(
            temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        async with aclosing(self.client.generate(request_id, token_ids, params)) as outputs:
            found = [output async for output in outputs]
        tokens = [token for output in found for choice in output.outputs for token in choice.token_ids]
        return tokens, found[-1].num_cached_tokens

    async def until_known(self, token_ids: list[int], name: str, num_tokens: int) -> None:
        chain = BlockChain(16)
        chain.update(token_ids)
        async with asyncio.timeout(30):
            while (has := self.cluster.kv.match(chain.digests).get(name)) is None or has.device < num_tokens:
                await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def artifact(family_artifact):
    """float32: the same tokens whoever computes them."""
    return family_artifact("qwen3")


@contextmanager
def pair(artifact, scheme: str) -> Iterator[dict[str, ServeProcess]]:
    with ExitStack() as stack:
        options = ("--role", "mix", "--transfer", scheme, *OPTIONS)
        yield {name: stack.enter_context(ServeProcess(artifact, "--name", name, *options)) for name in "ab"}


@pytest.fixture(scope="module")
def expected(artifact):
    """What a server without others makes of each prompt."""
    with ServeProcess(artifact, *OPTIONS) as alone:
        return [complete(alone, prompt(seed)) for seed in range(3)]


def complete(process: ServeProcess, token_ids: list[int]) -> list[int]:
    with grpc.insecure_channel(process.grpc) as channel:
        sampling = xllm_pb2.SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        request = xllm_pb2.GenerateRequest(
            token_ids=xllm_pb2.TokenIds(ids=token_ids), sampling=sampling, final_only=True
        )
        (answer,) = xllm_pb2_grpc.InferenceStub(channel).Generate(request, timeout=120)
    return list(answer.choices[0].token_ids)


def is_at_rest(process: ServeProcess) -> bool:
    metrics = process.metrics()
    names = ("xllm_kv_reservations_open", "xllm_kv_hand_overs_open", "xllm_kv_cache_tokens_used")
    return not any(metrics[name] for name in names)


@pytest.mark.parametrize("scheme", ["shm", "tcp"])
async def test_what_one_has_is_answered_by_the_other(artifact, expected, scheme):
    with pair(artifact, scheme) as processes:
        service = Service(*processes.values())
        await service.start()
        for seed in range(3):
            assert await asyncio.to_thread(complete, processes["a"], prompt(seed)) == expected[seed]
            await service.until_known(prompt(seed), "a", 688)
        answers = await asyncio.gather(*(service.ask(prompt(seed), str(seed)) for seed in range(3)))
        assert answers == [(tokens, 688) for tokens in expected]
        stats = service.cluster.stats
        assert (stats.num_fetches, stats.num_failed_fetches, stats.num_fetched_tokens) == (3, 0, 3 * 688)
        assert processes["a"].metrics()['xllm_kv_prefixes_sent_total{end="complete"}'] == 3
        # From here on it has them itself.
        await service.until_known(prompt(0), "b", 688)
        assert await service.ask(prompt(0)) == (expected[0], 688)
        assert stats.num_fetches == 3
        for process in processes.values():
            await asyncio.to_thread(until, lambda process=process: is_at_rest(process))
        await service.cluster.close()


async def test_a_sender_that_is_killed_meanwhile_costs_no_token(artifact, expected):
    with pair(artifact, "tcp") as processes:
        service = Service(*processes.values())
        await service.start()
        await asyncio.to_thread(complete, processes["a"], prompt(1))
        await service.until_known(prompt(1), "a", 688)
        # It is asked, and does not answer.
        processes["a"].send(signal.SIGSTOP)
        answer = asyncio.create_task(service.ask(prompt(1)))
        receiver = processes["b"]
        await asyncio.to_thread(until, lambda: receiver.metrics()["xllm_kv_reservations_open"] == 1)
        processes["a"].send(signal.SIGKILL)
        assert await answer == (expected[1], 0)
        assert service.cluster.stats.num_failed_fetches == 1
        await asyncio.to_thread(until, lambda: is_at_rest(receiver))
        await service.cluster.close()
