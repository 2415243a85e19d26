"""What the batch API keeps of files, batches and their lines. Times are Unix seconds."""

from dataclasses import dataclass
from typing import Any, Literal

BatchStatus = Literal["validating", "failed", "in_progress", "completed", "expired", "cancelling", "cancelled"]
"""OpenAI's, without `finalizing`: results are in the output files as soon as they are recorded."""
FinalStatus = Literal["completed", "expired", "cancelled"]

OPEN_STATUSES: tuple[BatchStatus, ...] = ("validating", "in_progress", "cancelling")
FINAL_STATUSES: tuple[FinalStatus, ...] = ("completed", "expired", "cancelled")

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
COMPLETION_WINDOWS_S = {"24h": 24 * 3600}
"""Seconds until a batch expires, by OpenAI's name for it."""
FILE_LIFETIME_S = 30 * 24 * 3600
"""Of files that name no other, as OpenAI keeps inputs and outputs of batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """An upload, whose content is the file of its id in the folder; or the output of a batch, which is its results."""

    number: int = 0
    """Order of creation; given by the store."""
    id: str
    filename: str
    """As the user named it; never a path of ours."""
    purpose: str
    num_bytes: int
    created_at: int
    expires_at: int
    batch: int | None = None
    """The batch whose output it is; None for an upload."""
    is_error: bool = False
    """Of an output: whether it holds the lines that failed."""

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class LineError:
    """Why an input file was refused."""

    code: str
    message: str
    line: int | None = None
    """From 1."""
    param: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    number: int = 0
    """Order of creation; given by the store."""
    id: str
    status: BatchStatus = "validating"
    endpoint: str
    input_file_id: str
    completion_window: str
    output_lifetime_s: int = FILE_LIFETIME_S
    metadata: dict[str, str] | None = None
    created_at: int
    expires_at: int
    in_progress_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    output_file_id: str | None = None
    """Once it has ended, where any line was answered; likewise below."""
    error_file_id: str | None = None
    errors: tuple[LineError, ...] = ()
    num_lines: int = 0
    num_completed: int = 0
    num_failed: int = 0
    """Lines that were answered with an error; not those that never ran."""
    num_output_bytes: int = 0
    num_error_bytes: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    """Of input_tokens, found in the prefix cache."""
    output_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        errors = [
            {"code": error.code, "line": error.line, "message": error.message, "param": error.param}
            for error in self.errors
        ]
        ended_at = self.completed_at or self.expired_at or self.cancelled_at
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "in_progress_at": self.in_progress_at,
            "expires_at": self.expires_at,
            "finalizing_at": ended_at,
            "completed_at": self.completed_at,
            "failed_at": self.failed_at,
            "expired_at": self.expired_at,
            "cancelling_at": self.cancelling_at,
            "cancelled_at": self.cancelled_at,
            "request_counts": {"total": self.num_lines, "completed": self.num_completed, "failed": self.num_failed},
            "usage": {
                "input_tokens": self.input_tokens,
                "input_tokens_details": {"cached_tokens": self.cached_tokens},
                "output_tokens": self.output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self.input_tokens + self.output_tokens,
            },
            "metadata": self.metadata,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One request of an input file."""

    number: int
    """From 1, as users count; lines without content count too."""
    offset: int
    """Bytes from the beginning of the file."""
    num_bytes: int
    custom_id: str
    num_attempts: int = 0
    """Times that the server failed at it, or ended while it ran."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What became of one line."""

    batch: int
    number: int
    is_error: bool
    content: bytes
    """Its line of the output or error file, with the line end."""
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
