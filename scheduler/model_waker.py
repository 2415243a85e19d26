"""Wakes a sleeping model for its request, and puts others to sleep where it has no room beside them.

The model used longest ago goes first, idle ones before busy ones; a busy one finishes what it has. Requests that come
for it meanwhile wait, and wake it up again in their turn.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from xllm_compile.runtime.memory.shared_pages import SharedMemoryFullError
from xllm_compile.scheduler.engine_client import EngineClient

logger = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True, slots=True)
class _Model:
    name: str
    engine: EngineClient
    num_open: int = 0
    """Requests under way."""
    last_used: int = 0
    """Grows with every request of any model."""
    is_leaving: bool = False
    """About to sleep: new requests wait."""
    is_idle: asyncio.Event = field(default_factory=asyncio.Event)


class ModelWaker:
    """Belongs to one event loop."""

    def __init__(self, engines: Mapping[str, EngineClient]) -> None:
        """Of each model, by name; they share their memory."""
        self._models = {name: _Model(name=name, engine=engine) for name, engine in engines.items()}
        self._num_uses = 0
        # One at a time: what one has freed is not for the next.
        self._waking = asyncio.Lock()

    @asynccontextmanager
    async def awake(self, name: str) -> AsyncIterator[None]:
        """The model is awake inside, and is not put to sleep for another one.

        Raises SharedMemoryFullError when it has no room even with all others asleep.
        """
        model = self._models[name]
        while model.engine.is_sleeping or model.is_leaving:
            async with self._waking:
                if model.engine.is_sleeping:
                    await self._wake(model)
        self._num_uses += 1
        model.last_used = self._num_uses
        model.num_open += 1
        try:
            yield
        finally:
            model.num_open -= 1
            if model.num_open == 0:
                model.is_idle.set()

    async def _wake(self, model: _Model) -> None:
        while True:
            try:
                await asyncio.to_thread(model.engine.wake_up)
            except SharedMemoryFullError:
                others = [other for other in self._models.values() if not other.engine.is_sleeping]
                if not others:
                    raise
                await self._put_to_sleep(min(others, key=lambda other: (other.num_open > 0, other.last_used)))
            else:
                logger.info("model %s woke up for a request", model.name)
                return

    async def _put_to_sleep(self, model: _Model) -> None:
        model.is_leaving = True
        try:
            while model.num_open:
                model.is_idle.clear()
                await model.is_idle.wait()
            await model.engine.sleep(1, "wait")
            logger.info("model %s sleeps, to make room", model.name)
        finally:
            model.is_leaving = False
