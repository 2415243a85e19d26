"""What an instance sends for one request, until the request's own task takes it."""

import asyncio
import time
from collections import deque
from typing import Any

from xllm_compile.runtime.outputs import CompletionOutput
from xllm_compile.scheduler.cluster.generate_messages import completion_of
from xllm_compile.scheduler.proto import xllm_pb2


class InstanceLostError(Exception):
    """The instance is gone, or does not answer. What a request had until then is with its caller."""


class EndedEarlyError(InstanceLostError):
    """The instance answers, and ended the request before it was finished."""


class Run:
    """One completion on one instance.

    Tokens that nobody has taken yet are joined, so what is held is one output, however far its reader fell behind.
    """

    def __init__(self) -> None:
        self.is_over = False
        """Its last response was taken, or it was refused."""
        self.arrived_s = 0.0
        """When the newest tokens came, on the monotonic clock: their reader may take them later."""
        self._items: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None
        """Of the reader. An Event would do the same at twice the price, for each token."""

    def put(self, response: Any) -> None:
        """A GenerateResponse."""
        self.arrived_s = time.monotonic()
        if response.HasField("usage") or response.prompt_logprobs:
            self._add(response)
            return
        # Nothing of the message is kept: it is part of one that holds the whole step.
        for choice in response.choices:
            output = completion_of(choice, 0)
            if self._items and isinstance(self._items[-1], CompletionOutput):
                self._items[-1].join(output)
            else:
                self._add(output)

    def abort(self, request_id: str) -> None:
        """Its last response says that it was ended."""
        choice = xllm_pb2.Choice(finish_reason=xllm_pb2.FINISH_REASON_ABORT)
        self.put(xllm_pb2.GenerateResponse(request_id=request_id, choices=[choice], usage=xllm_pb2.Usage()))

    def fail(self, error: Exception) -> None:
        self._add(error)

    def _add(self, item: Any) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> Any:
        """New tokens as a CompletionOutput, or a GenerateResponse where there is more to it than that.

        Raises ApiError where the instance refuses, InstanceLostError.
        """
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        item = self._items.popleft()
        if isinstance(item, Exception):
            self.is_over = not isinstance(item, InstanceLostError)
            raise item
        self.is_over = not isinstance(item, CompletionOutput) and item.HasField("usage")
        return item
