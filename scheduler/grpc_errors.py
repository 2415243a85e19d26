"""Between ApiError and what gRPC says of an error: status code, trailing metadata, Google's error details."""

import logging
from typing import Any

import grpc
import grpc.aio

from xllm_compile.scheduler.engine_errors import to_api_error
from xllm_compile.scheduler.errors import KINDS_BY_STATUS, ApiError

logger = logging.getLogger(__name__)

DETAILS_KEY = "grpc-status-details-bin"
"""The trailing metadata in which clients of every language look for google.rpc.Status."""


def retry_details(error: ApiError) -> bytes:
    """A google.rpc.Status with a RetryInfo, for an error that has retry_after_s."""
    # Imported by the first refusal only: starting up is not to wait for it.
    from google.protobuf.duration_pb2 import Duration
    from google.rpc.error_details_pb2 import RetryInfo
    from google.rpc.status_pb2 import Status

    code = getattr(grpc.StatusCode, error.kind.grpc).value[0]
    status = Status(code=code, message=error.message)
    status.details.add().Pack(RetryInfo(retry_delay=Duration(seconds=error.retry_after_s or 0)))
    return bytes(status.SerializeToString())


async def abort_call(context: Any, err: Exception) -> None:
    """End the call with the status code of the error; the metadata holds OpenAI's code and field."""
    error = to_api_error(err)
    if error.code == "internal_error":
        logger.error("a gRPC call failed", exc_info=err)
    metadata = [
        ("error-status", str(error.kind.status)),
        ("error-code", error.code),
        ("error-param", error.param),
    ]
    if error.retry_after_s is not None:
        metadata.append(("retry-after", str(error.retry_after_s)))
    pairs: list[tuple[str, str | bytes]] = [(key, value) for key, value in metadata if value is not None]
    if error.retry_after_s is not None:
        pairs.append((DETAILS_KEY, retry_details(error)))
    await context.abort(getattr(grpc.StatusCode, error.kind.grpc), error.message, tuple(pairs))


def api_error_of(err: grpc.aio.AioRpcError) -> ApiError | None:
    """What a server of ours said; None where it is gRPC that speaks: there was no answer."""
    details = {key: value for key, value in err.trailing_metadata() or () if isinstance(value, str)}
    if "error-status" not in details:
        return None
    retry_after = details.get("retry-after")
    return ApiError(
        KINDS_BY_STATUS[int(details["error-status"])],
        err.details() or "",
        param=details.get("error-param"),
        code=details.get("error-code"),
        retry_after_s=None if retry_after is None else int(retry_after),
    )
