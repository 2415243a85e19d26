"""Starts a gateway and its instances, keeps them up, and drains them in the right order."""

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from xllm_compile.scheduler.launch.child import Child, Ready
from xllm_compile.scheduler.launch.plan import Plan, ProcessPlan
from xllm_compile.scheduler.tasks import cancel_all

logger = logging.getLogger(__name__)

EXIT_USAGE = 2
MAX_EARLY_DEATHS = 5
"""Deaths before READY in a row, of one process: then starting it again is given up."""

Start = Callable[[ProcessPlan], Awaitable[Child]]


class LaunchError(RuntimeError):
    """A process does not come up, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisorConfig:
    drain_timeout_s: float = 30.0
    """What each process gives its open requests."""
    first_pause_s: float = 0.5
    """Before a process that died is started again; doubles with each death soon after."""
    last_pause_s: float = 30.0
    stable_s: float = 60.0
    """A process that served so long is a new one to the two above."""
    cut_s: float = 20.0
    """Beyond the drain: then a process is killed."""


class Supervisor:
    def __init__(
        self,
        plan: Plan,
        start: Start,
        is_whole: Callable[[Ready, int], Awaitable[None]],
        config: SupervisorConfig | None = None,
    ) -> None:
        """is_whole waits until the gateway that is ready has so many instances at work."""
        self._plan = plan
        self._start = start
        self._is_whole = is_whole
        self._config = config or SupervisorConfig()
        self._children: dict[str, Child] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._is_stopping = False

    async def run(self, on_ready: Callable[[Ready], None]) -> int:
        """Until SIGTERM or SIGINT. The exit code: 0 when all drained.

        Raises ValueError for a user's mistake that a process has found, LaunchError; all processes have ended then.
        """
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stop = asyncio.create_task(self._stop_event().wait())
        self._spawn(self._come_up(on_ready))
        await asyncio.wait((stop, self._failed), return_when=asyncio.FIRST_COMPLETED)
        self._is_stopping = True
        await cancel_all([*self._tasks, stop])
        code = await self._drain()
        if self._failed.done():
            self._failed.result()
        return code

    async def _come_up(self, on_ready: Callable[[Ready], None]) -> None:
        total = 1 + len(self._plan.instances)
        gateway = await self._keep_up(self._plan.gateway)
        logger.info("1 of %d processes is ready", total)
        plans = [plan.with_arguments("--registry", gateway.registry) for plan in self._plan.instances]
        for number, ready in enumerate(asyncio.as_completed([self._keep_up(plan) for plan in plans]), 2):
            await ready
            logger.info("%d of %d processes are ready", number, total)
        await self._is_whole(gateway, len(plans))
        on_ready(gateway)

    def _keep_up(self, plan: ProcessPlan) -> asyncio.Future[Ready]:
        """Done when it is ready for the first time."""
        first = asyncio.get_running_loop().create_future()
        self._spawn(self._keep(plan, first))
        return first

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        def note_end(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (err := task.exception()) is not None and not self._failed.done():
                self._failed.set_exception(err)

        task = asyncio.create_task(work)
        task.add_done_callback(note_end)
        self._tasks.append(task)

    async def _keep(self, plan: ProcessPlan, first: asyncio.Future[Ready]) -> None:
        clock = asyncio.get_running_loop().time
        num_early = num_deaths = 0
        while not self._is_stopping:
            began_s = clock()
            child = await self._start(plan)
            self._children[plan.name] = child
            ready = await child.ready()
            if ready is not None:
                num_early = 0
                logger.info("%s is ready after %.1f s", plan.name, clock() - began_s)
                if not first.done():
                    first.set_result(ready)
                    # Whoever knows its ports finds them again.
                    plan = _at_same_ports(plan, ready)
            code = await child.wait()
            if self._is_stopping:
                return
            if ready is None:
                num_early += 1
                self._check_hope(plan, child, code, num_early, is_new=not first.done())
            num_deaths = 0 if clock() - began_s > self._config.stable_s else num_deaths + 1
            pause_s = min(self._config.last_pause_s, self._config.first_pause_s * 2 ** max(0, num_deaths - 1))
            logger.warning("%s %s; starting it again in %g s", plan.name, _ended(code), pause_s)
            await asyncio.sleep(pause_s)

    def _check_hope(self, plan: ProcessPlan, child: Child, code: int, num_early: int, *, is_new: bool) -> None:
        if code == EXIT_USAGE and is_new:
            # It would be the same the next time.
            raise ValueError(f"{plan.name}: {child.last_line.partition('error: ')[2] or child.last_line}")
        if num_early >= MAX_EARLY_DEATHS:
            raise LaunchError(
                f"{plan.name} died {num_early} times in a row before it was ready; the last one {_ended(code)}, "
                f"saying: {child.last_line or 'nothing'}"
            )

    async def _drain(self) -> int:
        """The gateway first: it needs the instances for what is open."""
        gateway = self._children.pop(self._plan.gateway.name, None)
        is_clean = await self._end([gateway] if gateway else [])
        instances = list(self._children.values())
        self._children.clear()
        return 0 if await self._end(instances) and is_clean else 1

    async def _end(self, children: list[Child]) -> bool:
        """Whether all that served ended well."""
        for child in children:
            child.send(signal.SIGTERM)
        is_clean = True
        waiting = {asyncio.create_task(child.wait()): child for child in children}
        if not waiting:
            return True
        done, late = await asyncio.wait(waiting, timeout=self._config.drain_timeout_s + self._config.cut_s)
        for task in late:
            logger.warning("a process did not end within %g s of its drain and is killed", self._config.cut_s)
            waiting[task].send(signal.SIGKILL)
            await task
            is_clean = False
        # One that was still starting dies of the signal, with nothing open.
        return is_clean and all(task.result() in (0, -signal.SIGTERM) for task in done)

    def _stop_event(self) -> asyncio.Event:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def handle(number: signal.Signals) -> None:
            if stop.is_set():
                logger.warning("second signal (%s): killing all processes", number.name)
                for child in self._children.values():
                    child.send(signal.SIGKILL)
                # Their parent's end kills the ones that are being waited for.
                os._exit(128 + number)
            logger.info("%s: draining the gateway, then the instances; a second signal kills them", number.name)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, handle, number)
        return stop


def _at_same_ports(plan: ProcessPlan, ready: Ready) -> ProcessPlan:
    """A gateway's: of instances the registry says where they are."""
    if not ready.registry:
        return plan
    port = ready.registry.rpartition(":")[2]
    ports = ("--port", str(ready.http_port), "--grpc-port", str(ready.grpc_port), "--registry-port", port)
    return replace(plan, arguments=(*plan.arguments, *ports))


def _ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
