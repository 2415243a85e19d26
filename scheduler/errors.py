"""Errors a client sees, the same over HTTP and gRPC, in OpenAI's words."""

import math
from dataclasses import dataclass
from typing import Any

RETRY_AFTER_S = 1
"""What a refused client is told to wait: a queue of running requests moves within about a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorKind:
    """HTTP status, the name of the gRPC status code, and OpenAI's `type`."""

    status: int
    grpc: str
    type: str


INVALID = ErrorKind(status=400, grpc="INVALID_ARGUMENT", type="invalid_request_error")
UNAUTHENTICATED = ErrorKind(status=401, grpc="UNAUTHENTICATED", type="invalid_request_error")
NOT_FOUND = ErrorKind(status=404, grpc="NOT_FOUND", type="invalid_request_error")
METHOD_NOT_ALLOWED = ErrorKind(status=405, grpc="UNIMPLEMENTED", type="invalid_request_error")
TOO_LARGE = ErrorKind(status=413, grpc="RESOURCE_EXHAUSTED", type="invalid_request_error")
OVERLOADED = ErrorKind(status=429, grpc="RESOURCE_EXHAUSTED", type="rate_limit_error")
INTERNAL = ErrorKind(status=500, grpc="INTERNAL", type="server_error")
UNAVAILABLE = ErrorKind(status=503, grpc="UNAVAILABLE", type="server_error")
ALREADY_EXISTS = ErrorKind(status=409, grpc="ALREADY_EXISTS", type="invalid_request_error")
CONFLICT = ErrorKind(status=409, grpc="FAILED_PRECONDITION", type="invalid_request_error")

PRECONDITION = ErrorKind(status=412, grpc="FAILED_PRECONDITION", type="invalid_request_error")

KINDS_BY_STATUS = {
    kind.status: kind
    for kind in (
        INVALID,
        UNAUTHENTICATED,
        NOT_FOUND,
        METHOD_NOT_ALLOWED,
        TOO_LARGE,
        OVERLOADED,
        INTERNAL,
        UNAVAILABLE,
        ALREADY_EXISTS,
        PRECONDITION,
    )
}


class ApiError(Exception):
    """A refusal with everything the client needs to know; caught where HTTP and gRPC write their answers."""

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.is_sent = False
        """Already told to the client, as the last event of a stream."""

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {"message": self.message, "type": self.kind.type, "param": self.param, "code": self.code},
        }


def invalid(message: str, *, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    return ApiError(INVALID, message, param=param, code=code)


def not_available(param: str) -> ApiError:
    return invalid(f"'{param}' is not available yet on this server.", param=param, code="unsupported_parameter")


def model_not_found(name: str, served: str) -> ApiError:
    message = f"The model '{name}' does not exist; this server has '{served}'."
    return ApiError(NOT_FOUND, message, param="model", code="model_not_found")


def context_length_exceeded(num_prompt: int, num_output: int, limit: int, param: str) -> ApiError:
    """num_output is the completion length asked for, 0 when the prompt alone is too long."""
    asked = (
        f"{num_prompt} tokens"
        if not num_output
        else (f"{num_prompt + num_output} tokens ({num_prompt} in the prompt, {num_output} in the completion)")
    )
    message = (
        f"This model's maximum context length is {limit} tokens. However, you requested {asked}. "
        "Please reduce the length of the prompt or of the completion."
    )
    return invalid(message, param=param, code="context_length_exceeded")


def draining() -> ApiError:
    message = "The server is shutting down and takes no new requests; send it to another instance."
    return ApiError(UNAVAILABLE, message, code="draining", retry_after_s=RETRY_AFTER_S)


def asleep() -> ApiError:
    message = "The model is asleep; POST /wake_up, or send the request to another instance."
    return ApiError(UNAVAILABLE, message, code="asleep", retry_after_s=RETRY_AFTER_S)


def memory_full(message: str) -> ApiError:
    return ApiError(UNAVAILABLE, message, code="memory_full", retry_after_s=RETRY_AFTER_S)


def queue_full(message: str, retry_after_s: float) -> ApiError:
    """retry_after_s is what the engine predicts; clients are told whole seconds, at least one."""
    return ApiError(OVERLOADED, message, code="queue_full", retry_after_s=max(RETRY_AFTER_S, math.ceil(retry_after_s)))


def engine_dead() -> ApiError:
    return ApiError(INTERNAL, "The engine of this server has stopped; its log has the cause.", code="engine_dead")


def engine_stopped() -> ApiError:
    """Of a server that is asked for its health; its requests fail with engine_dead."""
    return ApiError(UNAVAILABLE, "The engine of this server has stopped.", code="engine_dead")


def no_instance() -> ApiError:
    message = "No instance of this service is up; start one, or see the gateway's log."
    return ApiError(UNAVAILABLE, message, code="no_instance", retry_after_s=RETRY_AFTER_S)


def internal() -> ApiError:
    """The text is fixed: an exception's own text may hold prompts or paths; the log has it."""
    return ApiError(INTERNAL, "The server had an error while processing your request.", code="internal_error")
