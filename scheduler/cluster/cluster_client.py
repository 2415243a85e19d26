"""Many instances behind the interface of one engine (engine_client.py)."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import NoReturn

from xllm_compile.runtime.async_engine import SleepLevel, SleepMode
from xllm_compile.runtime.engine_thread import PauseMode
from xllm_compile.runtime.hand_over import HandOver
from xllm_compile.runtime.memory.prefix_cache import BlockChain
from xllm_compile.runtime.outputs import CompletionOutput, EngineStats, RequestOutput, hold
from xllm_compile.runtime.resume import Resume
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.cluster.attempts import FailoverConfig
from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.completion import Completion
from xllm_compile.scheduler.cluster.placer import Placer
from xllm_compile.scheduler.cluster.request_outputs import RequestOutputs
from xllm_compile.scheduler.cluster.token_log import TokenLog
from xllm_compile.scheduler.tasks import cancel_all
from xllm_compile.scheduler.tracing import current_span


@dataclass(frozen=True, kw_only=True, slots=True)
class SloDefaults:
    """Targets of online requests that name none."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def applied(self, params: SamplingParams) -> SamplingParams:
        if params.offline:
            return params
        ttft_ms = self.ttft_ms if params.ttft_slo_ms is None else params.ttft_slo_ms
        tpot_ms = self.tpot_ms if params.tpot_slo_ms is None else params.tpot_slo_ms
        if (ttft_ms, tpot_ms) == (params.ttft_slo_ms, params.tpot_slo_ms):
            return params
        return replace(params, ttft_slo_ms=ttft_ms, tpot_slo_ms=tpot_ms)


class ClusterClient:
    """Belongs to one event loop. Requests are lists of token ids: the gateway has tokenised them."""

    is_paused = is_sleeping = False

    def __init__(
        self,
        cluster: Cluster,
        *,
        placer: Placer | None = None,
        config: FailoverConfig | None = None,
        slo: SloDefaults | None = None,
    ) -> None:
        self._cluster = cluster
        self._placer = placer or Placer()
        cluster.on_gone = self._placer.gone
        self._config = config or FailoverConfig()
        self._slo = slo or SloDefaults()
        self._open: dict[str, list[Completion]] = {}

    @property
    def is_healthy(self) -> bool:
        return self._cluster.is_ready

    @property
    def num_open(self) -> int:
        """Requests that generate."""
        return len(self._open)

    def completions(self) -> list[Completion]:
        """Those of all open requests."""
        return [completion for completions in self._open.values() for completion in completions]

    async def generate(
        self,
        request_id: str,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        resume: Resume | None = None,
        hand_over: HandOver | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as an engine gives them. Raises ApiError, ValueError on a bad resume."""
        if hand_over is not None:
            message = "'hand_over' is for instances: a gateway chooses where requests go. Leave it out."
            raise errors.invalid(message, param="hand_over")
        assert not isinstance(prompt, str), "the gateway tokenises"
        params = self._slo.applied(params)
        request = RequestOutputs(request_id, prompt, params)
        chain = BlockChain(self._cluster.kv.block_tokens)
        if params.pooling is None:
            chain.update(prompt)
        logs = [TokenLog(prompt, params, chain.copy(), index, resume) for index in range(params.n)]
        span = current_span()
        completions = [
            Completion(self._cluster, self._placer, log, request.metrics, self._config, span) for log in logs
        ]
        if params.pooling is not None:
            yield request.embedded(await completions[0].embedding(params.pooling))
            return
        self._open[request_id] = completions
        try:
            async with aclosing(completions[0].outputs() if params.n == 1 else _merge(completions)) as outputs:
                async for output in outputs:
                    made = request.take(completions[output.index], output)
                    if made is not None:
                        yield made
        finally:
            del self._open[request_id]

    async def abort(self, request_id: str) -> None:
        for completion in self._open.get(request_id, ()):
            completion.abort()

    def stats(self) -> EngineStats:
        """Sums over the instances, as they last reported."""
        instances = self._cluster.instances()
        return EngineStats(
            num_running=sum(each.load.num_running for each in instances),
            num_waiting=sum(each.load.num_waiting for each in instances),
            kv_tokens_used=sum(each.load.kv_tokens_used for each in instances),
            kv_tokens_total=sum(each.info.kv_tokens_total for each in instances),
        )

    async def drain(self, timeout_s: float) -> bool:
        """The service has stopped taking requests. Aborts those that are open after timeout_s."""
        deadline = time.monotonic() + timeout_s
        while self._open and time.monotonic() < deadline:
            await self._cluster.wait_changed(deadline - time.monotonic())
        was_idle = not self._open
        for request_id in list(self._open):
            await self.abort(request_id)
        return was_idle

    async def pause(self, mode: PauseMode) -> None:
        _refuse()

    def resume(self) -> None:
        _refuse()

    async def sleep(self, level: SleepLevel, mode: SleepMode) -> None:
        _refuse()

    def wake_up(self) -> None:
        _refuse()


def _refuse() -> NoReturn:
    message = "A gateway computes nothing itself; pause its instances, or put them to sleep, one by one."
    raise errors.ApiError(errors.METHOD_NOT_ALLOWED, message, code="gateway")


async def _merge(completions: Sequence[Completion]) -> AsyncGenerator[CompletionOutput, None]:
    """The outputs of all as they come, those of one joined that nobody took yet. The first error ends them all."""
    pending: dict[int, CompletionOutput] = {}
    changed = asyncio.Event()
    errors_found: list[Exception] = []
    num_left = len(completions)

    async def pump(completion: Completion) -> None:
        nonlocal num_left
        try:
            async with aclosing(completion.outputs()) as outputs:
                async for output in outputs:
                    hold(pending, output)
                    changed.set()
        except Exception as err:
            errors_found.append(err)
        finally:
            num_left -= 1
            changed.set()

    tasks = [asyncio.create_task(pump(completion)) for completion in completions]
    try:
        while True:
            while pending:
                yield pending.pop(next(iter(pending)))
            if errors_found:
                raise errors_found[0]
            if num_left == 0:
                return
            changed.clear()
            await changed.wait()
    finally:
        await cancel_all(tasks)
