"""How many generations may be open at once, over HTTP and gRPC together."""

import asyncio
import contextlib
from collections.abc import Iterator

from xllm_compile.scheduler import errors


class StreamLimiter:
    """Counts open generations and refuses the one too many before anything is allocated for it.

    Used from the event loop only. A slot is held from admission until the last byte is handed to the transport,
    so memory is bounded by max_open times one request, however many clients there are.
    """

    def __init__(self, max_open: int) -> None:
        if max_open < 1:
            raise ValueError(f"max_open={max_open} must be at least 1")
        self.max_open = max_open
        self.num_open = 0
        self.num_refused = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one slot. Raises ApiError (429, retry later) when all are taken."""
        if self.num_open >= self.max_open:
            self.num_refused += 1
            raise errors.ApiError(
                errors.OVERLOADED,
                f"All {self.max_open} streams of this server are in use; retry later or raise --max-streams.",
                code="too_many_streams",
                retry_after_s=errors.RETRY_AFTER_S,
            )
        self.num_open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_open -= 1
            if self.num_open == 0:
                self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """True once no slot is held; False when timeout_s passed first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
