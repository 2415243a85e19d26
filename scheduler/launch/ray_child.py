"""Children on the machines of a Ray cluster: each an actor that runs the process where Ray has placed it.

Ray is an extra: it is imported where it is used.
"""

import asyncio
import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from xllm_compile.scheduler.launch.child import Child, LocalChild, Ready
from xllm_compile.scheduler.launch.plan import ProcessPlan
from xllm_compile.scheduler.launch.supervisor import Start

logger = logging.getLogger(__name__)

_PLACEMENT_TIMEOUT_S = 60.0


class _Runner:
    """The actor: one process, which ends with it."""

    async def start(self, plan: ProcessPlan) -> None:
        import ray

        host = ray.util.get_node_ip_address()
        self._child = await LocalChild.start(plan.with_arguments("--host", host, "--transfer-host", host))

    async def ready(self) -> Ready | None:
        return await self._child.ready()

    async def wait(self) -> tuple[int, str]:
        """Its exit code, and the last line it logged."""
        return await self._child.wait(), self._child.last_line

    async def send(self, number: int) -> None:
        self._child.send(signal.Signals(number))


class RayChild:
    """See Child. An actor that is gone, with its machine or without, is a killed process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._ended: asyncio.Task[int] = asyncio.create_task(self._wait())
        self.last_line = ""

    async def ready(self) -> Ready | None:
        from ray.exceptions import RayError

        try:
            ready: Ready | None = await self._actor.ready.remote()
        except RayError:
            return None
        return ready

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    def send(self, number: signal.Signals) -> None:
        if not self._ended.done():
            self._actor.send.remote(int(number))

    async def _wait(self) -> int:
        import ray
        from ray.exceptions import RayError

        try:
            code, self.last_line = await self._actor.wait.remote()
        except RayError as err:
            self.last_line = " ".join(str(err).split())
            return -signal.SIGKILL
        ray.kill(self._actor)
        return int(code)


@contextmanager
def ray_starter(names: Sequence[str], *, num_cpus: int) -> Iterator[Start]:
    """Starts these on machines of the Ray cluster, spread as far as it goes, and all others here.

    num_cpus: of each. Ray finds new room for what a lost machine had. Raises ValueError where there is no cluster,
    or no such room.
    """
    try:
        import ray
        from ray.exceptions import RayError
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
    except ImportError as err:
        raise ValueError(f"--launcher ray needs Ray; pip install 'xllm-compile[ray]' ({err})") from err
    try:
        ray.init(address="auto", logging_level=logging.WARNING)
    except ConnectionError as err:
        raise ValueError(
            f"no Ray cluster runs here, or set RAY_ADDRESS to one; start one with ray start ({err})"
        ) from err
    group = placement_group([{"CPU": num_cpus}] * len(names), strategy="SPREAD")
    try:
        if not group.wait(_PLACEMENT_TIMEOUT_S):
            have = ray.cluster_resources().get("CPU", 0)
            raise ValueError(
                f"{len(names)} instances of --threads {num_cpus} find no room on the Ray cluster, which has {have:g} "
                "CPUs; lower --threads or --instances, or add machines"
            )

        async def start(plan: ProcessPlan) -> Child:
            if plan.name not in names:
                return await LocalChild.start(plan)
            bundle = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=names.index(plan.name))
            options = {"num_cpus": num_cpus, "scheduling_strategy": bundle, "max_concurrency": 8}
            actor = ray.remote(_Runner).options(**options).remote()
            try:
                await actor.start.remote(plan)
            except RayError as err:
                # Its wait says the same.
                logger.warning("%s could not be started: %s", plan.name, " ".join(str(err).split()))
            return RayChild(actor)

        yield start
    finally:
        remove_placement_group(group)
        ray.shutdown()
