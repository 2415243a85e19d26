"""Outputs on their way from the engine's thread to the tasks that asked for them.

After a step, all outputs for one event loop travel in one ``call_soon_threadsafe``; when that loop has not yet run the
last one, they join it.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable

from xllm_compile.runtime.outputs import RequestOutput
from xllm_compile.runtime.sampling_params import RequestOutputKind
from xllm_compile.runtime.sequence import Request


class RequestStream:
    """Outputs of one request, for one consumer. Closing it before the end aborts the request.

    Those that nobody has read yet are joined.
    """

    def __init__(self, request: Request, mailbox: "Mailbox", on_leave: Callable[["RequestStream"], None]) -> None:
        """mailbox is that of the consumer's event loop; on_leave is called where it stops listening before the end."""
        self.request_id = request.request_id
        self.prompt_token_ids = request.prompt_token_ids
        self.mailbox = mailbox
        self._on_leave = on_leave
        self._kind = request.params.output_kind
        self._items: deque[RequestOutput | BaseException] = deque()
        self._has_items = asyncio.Event()
        self._is_ended = False

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._items:
            if self._is_ended:
                raise StopAsyncIteration
            self._has_items.clear()
            await self._has_items.wait()
        item = self._items.popleft()
        if isinstance(item, BaseException):
            self._is_ended = True
            raise item
        self._is_ended = item.finished
        return item

    async def aclose(self) -> None:
        """Stop listening; aborts the request unless its end was reached. Safe to call twice."""
        if not self._is_ended:
            self._is_ended = True
            self._items.clear()
            self._has_items.set()
            self._on_leave(self)

    def push(self, item: RequestOutput | BaseException) -> None:
        """From its event loop."""
        if self._is_ended:
            return
        if self._items and isinstance(item, RequestOutput):
            # A consumer that fell behind catches up in one step, and what is held is one output.
            held = self._items.pop()
            assert isinstance(held, RequestOutput), "nothing comes behind an error"
            if self._kind is RequestOutputKind.DELTA:
                held.join(item)
                item = held
        self._items.append(item)
        self._has_items.set()


class Mailbox:
    """Carries items from the engine's thread to one event loop with as few wake-ups as possible."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._items: list[tuple[RequestStream, RequestOutput | BaseException]] = []

    def post(self, items: list[tuple[RequestStream, RequestOutput | BaseException]]) -> bool:
        """From the engine's thread. False when the loop is closed and nobody will ever read."""
        with self._lock:
            is_first = not self._items
            self._items += items
        if is_first:
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                return False
        return True

    def _deliver(self) -> None:
        with self._lock:
            items, self._items = self._items, []
        for stream, item in items:
            stream.push(item)
