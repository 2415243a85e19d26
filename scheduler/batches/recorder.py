"""Writes results as they come; those that come while one transaction is on its way share the next."""

import asyncio
import logging
from collections.abc import Callable

from xllm_compile.scheduler.batches.records import Result
from xllm_compile.scheduler.batches.store import BatchStore
from xllm_compile.scheduler.batches.store_thread import StoreThread

logger = logging.getLogger(__name__)

RETRY_S = 5.0
"""After a write that failed, as on a full disk."""


class ResultRecorder:
    """`run` until cancelled; then `flush`."""

    def __init__(self, store: BatchStore, thread: StoreThread, on_recorded: Callable[[Result], None]) -> None:
        """on_recorded is called once a result is on disk."""
        self._store = store
        self._thread = thread
        self._on_recorded = on_recorded
        self._results: list[Result] = []
        self._has_results = asyncio.Event()
        self.is_failing = False
        """The last write failed: results are kept and written again, and no more should be asked for."""

    def add(self, result: Result) -> None:
        self._results.append(result)
        self._has_results.set()

    async def run(self) -> None:
        while True:
            await self._has_results.wait()
            try:
                await self.flush()
                self.is_failing = False
            except Exception:
                self.is_failing = True
                logger.exception("results of batches cannot be written; trying again in %g s", RETRY_S)
                await asyncio.sleep(RETRY_S)

    async def flush(self) -> None:
        """Raises what the store raised; nothing is lost then."""
        results = list(self._results)
        if results:
            await self._thread.run(self._store.record, results)
        del self._results[: len(results)]
        if not self._results:
            self._has_results.clear()
        for result in results:
            self._on_recorded(result)
