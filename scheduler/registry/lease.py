"""Keeps a lease alive from its grant until it is lost."""

import asyncio
import logging
import time
from collections.abc import Callable

from xllm_compile.scheduler.registry.registry import LeaseLostError, Registry, RegistryUnavailableError

logger = logging.getLogger(__name__)

DEFAULT_TTL_S = 3
KEEP_ALIVES_PER_TTL = 3


async def keep_alive(
    registry: Registry, lease_id: int, ttl_s: int, *, clock: Callable[[], float] = time.monotonic
) -> None:
    """Returns never. Raises LeaseLostError when the registry says so, or could not be asked for ttl_s.

    In the second case the lease may live on (a registry that restarts gives all of them a new time): what it stands
    for can be taken up again with it, but must not be relied on meanwhile.
    """
    alive_s = clock()
    while True:
        await asyncio.sleep(ttl_s / KEEP_ALIVES_PER_TTL)
        asked_s = clock()
        try:
            await registry.keep_alive(lease_id)
            alive_s = asked_s
        except RegistryUnavailableError as err:
            if clock() - alive_s >= ttl_s:
                raise LeaseLostError(f"lease {lease_id} of {ttl_s} s could not be kept alive: {err}") from err
