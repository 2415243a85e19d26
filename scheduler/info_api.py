"""GET /v1/models, /health, /version and /metrics."""

import json
import time
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.service import Service


class InfoApi:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())

    async def models(self, request: Request) -> Response:
        cards = [self._card(name) for name in self._service.models]
        return _json({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._service.for_model(name)
        return _json(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        service = self._service.models[name]
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "xllm-compile",
            "root": service.model_name,
            "parent": None,
            "max_model_len": service.max_model_len,
        }

    async def health(self, request: Request) -> Response:
        """200 while new requests are taken."""
        if self._service.is_draining:
            raise errors.draining()
        if not self._service.is_healthy:
            raise self._service.unhealthy()
        return Response(status_code=200)

    async def version(self, request: Request) -> Response:
        return _json({"version": self._service.version})

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.render_metrics(), headers={"content-type": CONTENT_TYPE_LATEST})


def _json(content: Any) -> Response:
    return Response(json.dumps(content), media_type="application/json")
