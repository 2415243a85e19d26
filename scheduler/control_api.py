"""POST /pause and /resume, GET /is_paused: what whoever runs the server asks of it."""

import json
from typing import get_args

from starlette.requests import Request
from starlette.responses import Response

from xllm_compile.runtime.async_engine import PauseMode
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.service import Service


class ControlApi:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def pause(self, request: Request) -> Response:
        """Answers once the device is idle. ?mode=keep (the default), wait or abort: see AsyncEngine.pause."""
        asked = request.query_params.get("mode", "keep")
        modes: dict[str, PauseMode] = {mode: mode for mode in get_args(PauseMode)}
        if asked not in modes:
            raise errors.invalid(f"mode={asked!r} must be one of {', '.join(modes)}.", param="mode")
        await self._service.engine.pause(modes[asked])
        return Response(status_code=200)

    async def resume(self, request: Request) -> Response:
        self._service.engine.resume()
        return Response(status_code=200)

    async def is_paused(self, request: Request) -> Response:
        content = json.dumps({"is_paused": self._service.engine.is_paused})
        return Response(content, media_type="application/json")
