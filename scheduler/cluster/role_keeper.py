"""Dynamic roles: the elected gateway decides who prefills and who decodes, all gateways route by it."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping

from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.state import Pool
from xllm_compile.scheduler.policies.roles import RoleRules, Roles, decide
from xllm_compile.scheduler.registry.registry import (
    CompactedError,
    Guard,
    LeaseLostError,
    Registry,
    RegistryUnavailableError,
)

logger = logging.getLogger(__name__)

POOLS_KEY = "/xllm/pools"
"""A namespace of the user's may come before it."""

_PERIOD_S = 0.5
_RETRY_S = 1.0


class RoleKeeper:
    """What the leader does."""

    def __init__(
        self,
        cluster: Cluster,
        registry: Registry,
        rules: RoleRules,
        *,
        namespace: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._registry = registry
        self._rules = rules
        self._key = namespace + POOLS_KEY
        self._clock = clock

    async def lead(self, guard: Guard) -> None:
        """Decide until cancelled. Raises LeaseLostError when another leads."""
        roles, written = Roles(), None
        while True:
            roles = decide(self._cluster.instances(), roles, self._rules, self._clock())
            if roles.pools != written:
                written = await self._write(roles.pools, guard)
            await asyncio.sleep(_PERIOD_S)

    async def _write(self, pools: Mapping[str, Pool], guard: Guard) -> dict[str, Pool] | None:
        """What is written; None where the registry does not answer, to be tried again."""
        try:
            if await self._registry.put(self._key, pools_json(pools), guard=guard) is None:
                raise LeaseLostError("another gateway decides on roles")
        except RegistryUnavailableError as err:
            logger.warning("roles stay as they are: %s", err)
            return None
        logger.info("roles: %s", ", ".join(f"{name} {pool}" for name, pool in sorted(pools.items())))
        return dict(pools)


async def follow_pools(cluster: Cluster, registry: Registry, *, namespace: str = "") -> None:
    """Route by what the leader decides, until cancelled."""
    key = namespace + POOLS_KEY
    while True:
        try:
            snapshot = await registry.snapshot(key)
            for entry in snapshot.entries:
                cluster.set_pools(read_pools(entry.value))
            async for batch in registry.watch(key, snapshot.revision):
                for change in batch:
                    if change.entry is not None:
                        cluster.set_pools(read_pools(change.entry.value))
        except CompactedError:
            continue
        except RegistryUnavailableError:
            await asyncio.sleep(_RETRY_S)


def pools_json(pools: Mapping[str, Pool]) -> bytes:
    return json.dumps(dict(sorted(pools.items()))).encode()


def read_pools(data: bytes) -> dict[str, Pool]:
    """What is no pool, such as of a newer version, is left out with a warning: its instances' roles count."""
    try:
        return {str(name): Pool(value) for name, value in json.loads(data).items()}
    except (ValueError, AttributeError) as err:
        logger.warning("the registry's %s is left out: %s", POOLS_KEY, err)
        return {}
