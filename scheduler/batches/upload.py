"""POST /v1/files: from the socket to the disk, a megabyte at a time."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO

from starlette.requests import ClientDisconnect, Request

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.batches.multipart import MultipartError, boundary_of, read_parts
from xllm_compile.scheduler.batches.records import FILE_LIFETIME_S
from xllm_compile.scheduler.http_io import BODY_TIMEOUT_S
from xllm_compile.scheduler.service import ClientGoneError

MIN_LIFETIME_S = 3600
"""As OpenAI; the most is FILE_LIFETIME_S."""
MAX_FILENAME_CHARS = 255

_WRITE_BYTES = 1 << 20
_MAX_FIELD_BYTES = 1024
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


class Upload:
    """One form with a file; `read` it, then see its fields. The file at ``path`` is whole and synced then."""

    def __init__(self, path: Path, take_bytes: Callable[[int], None]) -> None:
        """take_bytes is told of bytes before they are written, and raises ApiError where there is no room."""
        self._path = path
        self._take_bytes = take_bytes
        self._pending = bytearray()
        self._fields: dict[str, bytearray] = {}
        self.filename: str | None = None
        self.num_bytes = 0

    async def read(self, request: Request) -> None:
        """Raises ApiError (400, 413), and ClientGoneError."""
        try:
            boundary = boundary_of(request.headers.get("content-type", ""))
            with self._path.open("xb") as file:
                await self._read_parts(request, boundary, file)
                await asyncio.to_thread(self._finish, file)
        except MultipartError as err:
            raise errors.invalid(f"The body is no form with a file: {err}.", code="invalid_form") from None
        except ClientDisconnect:
            raise ClientGoneError from None
        if self.filename is None:
            raise errors.invalid("Missing required parameter: 'file'.", param="file", code="missing_required_parameter")

    async def _read_parts(self, request: Request, boundary: bytes, file: BinaryIO) -> None:
        async for part, piece in read_parts(_chunks(request), boundary):
            is_file = part.name == "file" and part.filename is not None
            if not piece:
                self._begin_part(part.name, part.filename, is_file=is_file)
            elif is_file:
                await self._write(piece, file)
            else:
                self._fields[part.name] += piece
                if len(self._fields[part.name]) > _MAX_FIELD_BYTES:
                    message = f"'{part.name}' is longer than {_MAX_FIELD_BYTES} bytes."
                    raise errors.invalid(message, param=part.name)

    def _begin_part(self, name: str, filename: str | None, *, is_file: bool) -> None:
        if is_file:
            if self.filename is not None:
                raise errors.invalid("Upload one file at a time.", param="file")
            assert filename is not None
            printable = "".join(char for char in filename if char.isprintable())
            self.filename = printable[:MAX_FILENAME_CHARS] or "upload"
        elif name not in _FIELDS:
            raise errors.invalid(f"Unknown parameter: '{name[:64]}'.", param=name[:64], code="unknown_parameter")
        elif name in self._fields:
            raise errors.invalid(f"'{name}' is given twice.", param=name)
        else:
            self._fields[name] = bytearray()

    async def _write(self, piece: bytes, file: BinaryIO) -> None:
        self._take_bytes(len(piece))
        self.num_bytes += len(piece)
        self._pending += piece
        if len(self._pending) >= _WRITE_BYTES:
            await asyncio.to_thread(self._flush, file)

    def _flush(self, file: BinaryIO) -> None:
        file.write(self._pending)
        self._pending.clear()

    def _finish(self, file: BinaryIO) -> None:
        self._flush(file)
        file.flush()
        os.fsync(file.fileno())

    def _field(self, name: str) -> str | None:
        return self._fields[name].decode("utf-8", "replace") if name in self._fields else None

    @property
    def purpose(self) -> str:
        """Raises ApiError (400) for another than the one that is served."""
        purpose = self._field("purpose")
        if purpose is None:
            message = "Missing required parameter: 'purpose'."
            raise errors.invalid(message, param="purpose", code="missing_required_parameter")
        if purpose != "batch":
            message = f"purpose='{purpose[:64]}' is not available on this server; use 'batch'."
            raise errors.invalid(message, param="purpose")
        return purpose

    @property
    def lifetime_s(self) -> int:
        """Raises ApiError (400)."""
        anchor, seconds = self._field("expires_after[anchor]"), self._field("expires_after[seconds]")
        if anchor is None and seconds is None:
            return FILE_LIFETIME_S
        if anchor != "created_at":
            raise errors.invalid("'expires_after[anchor]' must be 'created_at'.", param="expires_after")
        if seconds is None or not (seconds.isascii() and seconds.isdigit()):
            raise errors.invalid("'expires_after[seconds]' must be a number of seconds.", param="expires_after")
        check_lifetime(int(seconds), "expires_after")
        return int(seconds)


def check_lifetime(seconds: int, param: str) -> None:
    if not MIN_LIFETIME_S <= seconds <= FILE_LIFETIME_S:
        message = f"'{param}' has seconds={seconds}, which must be in [{MIN_LIFETIME_S}, {FILE_LIFETIME_S}]."
        raise errors.invalid(message, param=param)


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    """The body, which may be long, as long as it moves."""
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            message = f"No byte of the body came for {BODY_TIMEOUT_S:g} s."
            raise errors.invalid(message, code="body_timeout") from None
        yield chunk
