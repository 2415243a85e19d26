"""multipart/form-data (RFC 7578) as it arrives: no part is held, and the head of each is bounded.

Starlette's parser spools a file of any size into the system's temporary folder before a handler sees a byte of it; an
upload belongs into the folder where it stays, and is refused at the byte that is one too many.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser

MAX_HEAD_BYTES = 8 << 10
"""Headers of one part."""
_MAX_BOUNDARY_CHARS = 70


class MultipartError(ValueError):
    """The body is not what its content type says."""


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    filename: str | None
    """None for an ordinary field."""


def boundary_of(content_type: str) -> bytes:
    """Raises MultipartError for another type."""
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_boundary()
    if header.get_content_type() != "multipart/form-data" or not boundary:
        raise MultipartError("its Content-Type must be multipart/form-data with a boundary")
    if len(boundary) > _MAX_BOUNDARY_CHARS or not boundary.isascii():
        raise MultipartError(f"its boundary must be of at most {_MAX_BOUNDARY_CHARS} ASCII characters")
    return boundary.encode()


async def read_parts(chunks: AsyncIterator[bytes], boundary: bytes) -> AsyncIterator[tuple[Part, bytes]]:
    """The content of the parts piece by piece, in order; an empty piece begins each. Raises MultipartError.

    What comes behind the last part is not read.
    """
    delimiter = b"\r\n--" + boundary
    # The first delimiter has no line end before it.
    buffer = _Buffer(chunks, b"\r\n")
    part: Part | None = None
    while True:
        while (at := buffer.data.find(delimiter)) < 0:
            # The end may be the beginning of a delimiter.
            piece = buffer.take(max(0, len(buffer.data) - len(delimiter) + 1))
            if part is not None and piece:
                yield part, piece
            await buffer.fill()
        piece = buffer.take(at)
        if part is not None and piece:
            yield part, piece
        buffer.take(len(delimiter))
        if await buffer.starts_with(b"--"):
            return
        part = _part(await buffer.take_until(b"\r\n\r\n", MAX_HEAD_BYTES))
        yield part, b""


class _Buffer:
    def __init__(self, chunks: AsyncIterator[bytes], data: bytes) -> None:
        self._chunks = chunks
        self.data = bytearray(data)

    async def fill(self) -> None:
        """One chunk more."""
        try:
            self.data += await anext(self._chunks)
        except StopAsyncIteration:
            raise MultipartError("it ends before its last boundary") from None

    def take(self, num_bytes: int) -> bytes:
        taken = bytes(self.data[:num_bytes])
        del self.data[:num_bytes]
        return taken

    async def starts_with(self, prefix: bytes) -> bool:
        while len(self.data) < len(prefix):
            await self.fill()
        return self.data.startswith(prefix)

    async def take_until(self, end: bytes, max_bytes: int) -> bytes:
        """What is before ``end``, and that."""
        while (at := self.data.find(end, 0, max_bytes + len(end))) < 0:
            if len(self.data) > max_bytes:
                raise MultipartError(f"the headers of a part are longer than {max_bytes} bytes")
            await self.fill()
        return self.take(at + len(end))


def _part(head: bytes) -> Part:
    # Before the headers is the rest of the boundary's line.
    text = head.partition(b"\r\n")[2].decode("utf-8", "replace")
    headers = HeaderParser().parsestr(text)
    name = headers.get_param("name", header="content-disposition")
    if headers.get_content_disposition() != "form-data" or not isinstance(name, str):
        raise MultipartError("a part has no 'Content-Disposition: form-data' with a name")
    return Part(name=name, filename=headers.get_filename())
