"""Samples the service once a second, and answers GET /dashboard and /dashboard/data."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.dashboard.history import History
from xllm_compile.scheduler.dashboard.page import HEADERS, page
from xllm_compile.scheduler.dashboard.reading import Reading
from xllm_compile.scheduler.dashboard.sample import INSTANCE_FIELDS, Sampler
from xllm_compile.scheduler.tasks import cancel_all

T = TypeVar("T")

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
KEPT_S = 900.0
MAX_SAMPLES = int(KEPT_S / PERIOD_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class DashboardConfig:
    title: str
    """What is served."""
    version: str
    is_gateway: bool = False
    ttft_slo_ms: float | None = None
    """Drawn as a line; likewise tpot_slo_ms."""
    tpot_slo_ms: float | None = None


class Dashboard:
    """Samples while entered. Belongs to one event loop."""

    def __init__(self, read: Callable[[float], Reading], config: DashboardConfig) -> None:
        """read gets the time of the monotonic clock."""
        self._read = read
        self._config = config
        self._sampler = Sampler()
        self.history = History(MAX_SAMPLES)
        # Numbers of samples begin anew with each process: a page that was open before must notice.
        self._epoch = uuid.uuid4().hex
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            await cancel_all([self._task])

    async def beside(self, serving: Awaitable[T]) -> T:
        """Sample as long as it takes."""
        async with self:
            return await serving

    async def _run(self) -> None:
        while True:
            try:
                self.take()
            except Exception:
                # The service goes on without what it looks like.
                logger.exception("a sample for /dashboard failed")
            await asyncio.sleep(PERIOD_S)

    def take(self) -> None:
        now_s = time.monotonic()
        self.history.append(self._sampler.sample(self._read(now_s), now_s=now_s, wall_s=time.time()))

    def routes(self) -> list[Route]:
        return [Route("/dashboard", self.show), Route("/dashboard/data", self.data)]

    async def show(self, request: Request) -> Response:
        """Open to all: it has nothing in it, and asks whoever looks for the key to /dashboard/data."""
        return Response(page(), headers=HEADERS)

    async def data(self, request: Request) -> Response:
        """?since=NUMBER (0 by default): the samples from that one on, and with ?epoch= of another process all."""
        since = _number(request.query_params.get("since", "0"))
        if request.query_params.get("epoch", self._epoch) != self._epoch:
            since = 0
        config = self._config
        head = json.dumps(
            {
                "epoch": self._epoch,
                "next": self.history.next_number,
                "period_s": PERIOD_S,
                "kept_s": KEPT_S,
                "title": config.title,
                "version": config.version,
                "is_gateway": config.is_gateway,
                "ttft_slo_ms": config.ttft_slo_ms,
                "tpot_slo_ms": config.tpot_slo_ms,
                "instance_fields": INSTANCE_FIELDS,
            }
        ).encode()
        body = head[:-1] + b',"samples":[' + b",".join(self.history.since(since)) + b"]}"
        return Response(body, media_type="application/json", headers={"cache-control": "no-store"})


def _number(text: str) -> int:
    """Raises ApiError (400)."""
    if not text.isdecimal() or len(text) > 15:
        raise errors.invalid(
            f"since={text!r} must be the number of a sample; take 'next' of the last answer, or 0.", param="since"
        )
    return int(text)
