"""The store's thread: its transactions wait for the disk, which the event loop must not."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class StoreThread:
    """Calls in the order they were made. A caller that is cancelled leaves its transaction to be done."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="xllm-batches")

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.shield(asyncio.wrap_future(self._executor.submit(function, *args, **kwargs)))

    def close(self) -> None:
        """Returns when all calls are done."""
        self._executor.shutdown()
