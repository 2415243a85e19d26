"""POST /pause, /resume, /sleep and /wake_up, GET /is_paused and /is_sleeping: for whoever runs the server.

?model=NAME says which model, where the process has several.
"""

import asyncio
import json
from collections.abc import Mapping
from typing import TypeVar, get_args

from starlette.requests import Request
from starlette.responses import Response

from xllm_compile.runtime.async_engine import SleepLevel, SleepMode
from xllm_compile.runtime.engine_thread import PauseMode
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.engine_client import EngineClient
from xllm_compile.scheduler.service import Service

_PAUSE_MODES: dict[str, PauseMode] = {mode: mode for mode in get_args(PauseMode)}
_SLEEP_MODES: dict[str, SleepMode] = {mode: mode for mode in get_args(SleepMode)}
_SLEEP_LEVELS: dict[str, SleepLevel] = {str(level): level for level in get_args(SleepLevel)}

T = TypeVar("T")


class ControlApi:
    def __init__(self, service: Service) -> None:
        self._service = service

    def _engine(self, request: Request) -> EngineClient:
        """Raises ApiError where no model is named and there are several (400), or none has the name (404)."""
        name = request.query_params.get("model")
        if name is None and len(self._service.services) > 1:
            served = "', '".join(self._service.models)
            raise errors.invalid(f"This server has '{served}'; say which with ?model=NAME.", param="model")
        return self._service.for_model(name).engine

    async def pause(self, request: Request) -> Response:
        """Answers once the device is idle. ?mode=keep (the default), wait or abort: see AsyncEngine.pause."""
        await self._engine(request).pause(_choice(request, "mode", _PAUSE_MODES, "keep"))
        return Response(status_code=200)

    async def resume(self, request: Request) -> Response:
        self._engine(request).resume()
        return Response(status_code=200)

    async def is_paused(self, request: Request) -> Response:
        return _json({"is_paused": self._engine(request).is_paused})

    async def sleep(self, request: Request) -> Response:
        """Answers once the memory is given back. ?level=1 (the default) or 2, ?mode=wait or abort: see AsyncEngine."""
        level = _choice(request, "level", _SLEEP_LEVELS, "1")
        await self._engine(request).sleep(level, _choice(request, "mode", _SLEEP_MODES, "wait"))
        return Response(status_code=200)

    async def wake_up(self, request: Request) -> Response:
        # Where several share the memory it waits for the others' steps.
        await asyncio.to_thread(self._engine(request).wake_up)
        return Response(status_code=200)

    async def is_sleeping(self, request: Request) -> Response:
        return _json({"is_sleeping": self._engine(request).is_sleeping})


def _choice(request: Request, name: str, choices: Mapping[str, T], default: str) -> T:
    """Raises ApiError (400) with what there is to choose."""
    asked = request.query_params.get(name, default)
    if asked not in choices:
        raise errors.invalid(f"{name}={asked!r} must be one of {', '.join(choices)}.", param=name)
    return choices[asked]


def _json(content: Mapping[str, bool]) -> Response:
    return Response(json.dumps(content), media_type="application/json")
