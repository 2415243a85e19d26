"""A service of several slowed-down instances on this machine, which is sent requests at given times."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from xllm_compile.benchmarks.openai_client import StreamResult, stream_completion
from xllm_compile.benchmarks.server_process import ServerProcess
from xllm_compile.benchmarks.simulation.requests import SimRequest
from xllm_compile.scheduler.tasks import cancel_all

_POOLS_PERIOD_S = 0.25
_TAKES_PREFILLS = ("mix", "prefill", "decode_to_prefill")
_TAKES_DECODES = ("mix", "decode", "prefill_to_decode")
_TOKEN_IDS = (100, 4000)


@dataclass(kw_only=True, slots=True)
class Replay:
    """What became of requests that were sent."""

    results: list[StreamResult]
    """In the order of the requests."""
    began_s: float
    """Monotonic clock; arrivals are seconds after it. The last answer's end is ended_s."""
    ended_s: float
    timeline: list[tuple[float, int, int]] = field(default_factory=list)
    """Seconds, instances that take prefills, instances that take decodes; where they change."""
    num_flips: int = 0
    """Times that an instance began to change its role."""


class LiveCluster:
    """A gateway and its instances; ready once entered."""

    def __init__(
        self,
        artifact: Path,
        roles: Sequence[str],
        *,
        gateway_options: Sequence[str] = (),
        instance_options: Sequence[str] = (),
    ) -> None:
        """roles: of each instance."""
        self._artifact, self._roles = artifact, roles
        self._gateway_options, self._instance_options = gateway_options, instance_options
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            options = ["--role", "gateway", "--registry-port", "0", "--max-streams", "8192", *self._gateway_options]
            self._gateway = stack.enter_context(ServerProcess(self._artifact, options))
            self._gateway.wait_ready()
            instances = []
            for index, role in enumerate(self._roles):
                options = ["--role", role, "--name", f"i{index:04}", "--registry", self._gateway.registry]
                options += self._instance_options
                instances.append(stack.enter_context(ServerProcess(self._artifact, options)))
            # They start side by side.
            for instance in instances:
                instance.wait_ready()
            asyncio.run(self._wait_all())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def state(self) -> dict[str, Any]:
        """What the gateway's /cluster says."""
        return asyncio.run(self._state())

    def replay(self, requests: Sequence[SimRequest], *, seed: int) -> Replay:
        """Send each at its time, with a random prompt of its length, and read all answers to their ends."""
        return asyncio.run(self._replay(requests, random.Random(seed)))

    async def _replay(self, requests: Sequence[SimRequest], rng: random.Random) -> Replay:
        prompts = [[rng.randrange(*_TOKEN_IDS) for _ in range(one.num_prompt_tokens)] for one in requests]
        began_s = time.monotonic()
        replay = Replay(results=[], began_s=began_s, ended_s=began_s)
        watching = asyncio.create_task(self._watch_pools(replay))
        streams = []
        try:
            for one, prompt in zip(requests, prompts, strict=True):
                await asyncio.sleep(max(0.0, began_s + one.arrival_s - time.monotonic()))
                streams.append(asyncio.create_task(self._stream(prompt, one.num_output_tokens)))
            replay.results = list(await asyncio.gather(*streams))
        finally:
            await cancel_all([watching, *streams])
        replay.ended_s = time.monotonic()
        return replay

    async def _stream(self, prompt: list[int], num_tokens: int) -> StreamResult:
        return await stream_completion(self._gateway.host, self._gateway.port, prompt, num_tokens)

    async def _watch_pools(self, replay: Replay) -> None:
        before: dict[str, str] = {}
        while True:
            pools = {each["name"]: each["pool"] for each in (await self._state())["instances"]}
            counts = sum(p in _TAKES_PREFILLS for p in pools.values()), sum(p in _TAKES_DECODES for p in pools.values())
            if not replay.timeline or replay.timeline[-1][1:] != counts:
                replay.timeline.append((time.monotonic() - replay.began_s, *counts))
            turned = [name for name, pool in pools.items() if name in before and _is_turned(before[name], pool)]
            replay.num_flips += len(turned)
            before = pools
            await asyncio.sleep(_POOLS_PERIOD_S)

    async def _wait_all(self) -> None:
        """Until the gateway hears of all instances what they have to do."""
        while True:
            instances = (await self._state())["instances"]
            if len(instances) == len(self._roles) and all(each["health"] == "active" for each in instances):
                return
            await asyncio.sleep(0.1)

    async def _state(self) -> dict[str, Any]:
        reader, writer = await asyncio.open_connection(self._gateway.host, self._gateway.port)
        try:
            writer.write(b"GET /cluster HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            found: dict[str, Any] = json.loads((await reader.read()).partition(b"\r\n\r\n")[2])
        finally:
            writer.close()
        return found


def _is_turned(before: str, after: str) -> bool:
    """Whether an instance takes work now that it did not take."""
    return (before in _TAKES_PREFILLS, before in _TAKES_DECODES) != (after in _TAKES_PREFILLS, after in _TAKES_DECODES)
