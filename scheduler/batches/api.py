"""/v1/files and /v1/batches, as OpenAI defines them."""

import json
from collections.abc import Sequence
from typing import Any, Literal, Never

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.batches.batches import Batches
from xllm_compile.scheduler.batches.records import COMPLETION_WINDOWS_S, ENDPOINTS, FILE_LIFETIME_S, Batch, File
from xllm_compile.scheduler.batches.store import Order
from xllm_compile.scheduler.batches.upload import check_lifetime
from xllm_compile.scheduler.http_io import read_body
from xllm_compile.scheduler.openai_validation import parse_body

_ORDERS: dict[str, Order] = {"asc": "asc", "desc": "desc"}
_MAX_FILES, _MAX_BATCHES = 10_000, 100
_DEFAULT_BATCHES = 20
_MAX_METADATA, _MAX_KEY_CHARS, _MAX_VALUE_CHARS = 16, 64, 512
_MAX_BODY_BYTES = 64 << 10


class OutputExpiresAfter(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    anchor: Literal["created_at"]
    seconds: int


class CreateBatchRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: OutputExpiresAfter | None = None


class BatchApi:
    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def routes(self) -> list[Route]:
        return [
            Route("/v1/files", self.upload, methods=["POST"]),
            Route("/v1/files", self.files, methods=["GET"]),
            Route("/v1/files/{file_id}", self.file, methods=["GET"]),
            Route("/v1/files/{file_id}", self.delete_file, methods=["DELETE"]),
            Route("/v1/files/{file_id}/content", self.content, methods=["GET"]),
            Route("/v1/batches", self.create, methods=["POST"]),
            Route("/v1/batches", self.batches, methods=["GET"]),
            Route("/v1/batches/{batch_id}", self.batch, methods=["GET"]),
            Route("/v1/batches/{batch_id}/cancel", self.cancel, methods=["POST"]),
        ]

    async def upload(self, request: Request) -> Response:
        return _json((await self._batches.upload(request)).to_json())

    async def files(self, request: Request) -> Response:
        query = request.query_params
        limit = _limit(request, _MAX_FILES, _MAX_FILES)
        order = query.get("order", "desc")
        if order not in _ORDERS:
            raise errors.invalid(f"order={order[:64]!r} must be 'asc' or 'desc'.", param="order")
        found = await self._batches.files(
            after=query.get("after"), limit=limit + 1, order=_ORDERS[order], purpose=query.get("purpose")
        )
        return _page(found, limit)

    async def file(self, request: Request) -> Response:
        return _json((await self._batches.file(request.path_params["file_id"])).to_json())

    async def delete_file(self, request: Request) -> Response:
        file = await self._batches.file(request.path_params["file_id"])
        await self._batches.delete_file(file)
        return _json({"id": file.id, "object": "file", "deleted": True})

    async def content(self, request: Request) -> Response:
        file = await self._batches.file(request.path_params["file_id"])
        headers = {"content-length": str(file.num_bytes)}
        content = self._batches.content(file)
        return StreamingResponse(content, headers=headers, media_type="application/octet-stream")

    async def create(self, request: Request) -> Response:
        asked = parse_body(CreateBatchRequest, await read_body(request.scope, request.receive, _MAX_BODY_BYTES))
        if asked.endpoint not in ENDPOINTS:
            message = f"endpoint='{asked.endpoint[:64]}' must be one of {', '.join(ENDPOINTS)}."
            raise errors.invalid(message, param="endpoint")
        if asked.completion_window not in COMPLETION_WINDOWS_S:
            message = f"completion_window must be {' or '.join(map(repr, COMPLETION_WINDOWS_S))}."
            raise errors.invalid(message, param="completion_window")
        _check_metadata(asked.metadata or {})
        lifetime_s = FILE_LIFETIME_S
        if asked.output_expires_after is not None:
            lifetime_s = asked.output_expires_after.seconds
            check_lifetime(lifetime_s, "output_expires_after")
        batch = await self._batches.create(
            input_file_id=asked.input_file_id,
            endpoint=asked.endpoint,
            completion_window=asked.completion_window,
            window_s=COMPLETION_WINDOWS_S[asked.completion_window],
            metadata=asked.metadata,
            output_lifetime_s=lifetime_s,
        )
        return _json(batch.to_json())

    async def batches(self, request: Request) -> Response:
        limit = _limit(request, _DEFAULT_BATCHES, _MAX_BATCHES)
        found = await self._batches.batches(after=request.query_params.get("after"), limit=limit + 1)
        return _page(found, limit)

    async def batch(self, request: Request) -> Response:
        return _json((await self._batches.batch(request.path_params["batch_id"])).to_json())

    async def cancel(self, request: Request) -> Response:
        return _json((await self._batches.cancel(request.path_params["batch_id"])).to_json())


def disabled_routes() -> list[Route]:
    """Of a server without a folder for batches."""
    paths = ("/v1/files", "/v1/files/{rest:path}", "/v1/batches", "/v1/batches/{rest:path}")
    return [Route(path, _disabled, methods=["GET", "POST", "DELETE"]) for path in paths]


async def _disabled(request: Request) -> Never:
    message = "This server has no place for files and batches; start xllm-serve with --batch-dir DIR."
    raise errors.ApiError(errors.NOT_FOUND, message, code="batches_disabled")


def _limit(request: Request, default: int, most: int) -> int:
    text = request.query_params.get("limit", str(default))
    limit = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0
    if not 1 <= limit <= most:
        raise errors.invalid(f"limit={text[:64]!r} must be in [1, {most}].", param="limit")
    return limit


def _check_metadata(metadata: dict[str, str]) -> None:
    message = None
    if len(metadata) > _MAX_METADATA:
        message = f"metadata has {len(metadata)} keys, at most {_MAX_METADATA} are kept."
    elif any(len(key) > _MAX_KEY_CHARS or len(value) > _MAX_VALUE_CHARS for key, value in metadata.items()):
        message = f"metadata has keys of at most {_MAX_KEY_CHARS} and values of at most {_MAX_VALUE_CHARS} characters."
    if message is not None:
        raise errors.invalid(message, param="metadata")


def _page(found: Sequence[File] | Sequence[Batch], limit: int) -> Response:
    """found: one more than the limit, where there are more."""
    shown = found[:limit]
    return _json(
        {
            "object": "list",
            "data": [item.to_json() for item in shown],
            "first_id": shown[0].id if shown else None,
            "last_id": shown[-1].id if shown else None,
            "has_more": len(found) > limit,
        }
    )


def _json(content: Any) -> Response:
    return Response(json.dumps(content), media_type="application/json")
