from collections.abc import AsyncIterator, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_compile.scheduler.batches.multipart import MAX_HEAD_BYTES, MultipartError, Part, boundary_of, read_parts

BOUNDARY = b"bound"


async def _chunks(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def parts(*pieces: bytes, boundary: bytes = BOUNDARY) -> list[tuple[Part, bytes]]:
    """The parts with their whole content."""
    found: list[tuple[Part, bytes]] = []
    async for part, piece in read_parts(_chunks(pieces), boundary):
        if not piece:
            found.append((part, b""))
        assert found[-1][0] is part
        found[-1] = (part, found[-1][1] + piece)
    return found


def form(*contents: bytes) -> bytes:
    heads = b"".join(
        b'--bound\r\nContent-Disposition: form-data; name="f%d"; filename="n"\r\n\r\n%s\r\n' % (number, content)
        for number, content in enumerate(contents)
    )
    return heads + b"--bound--\r\n"


# Made of what could be mistaken for a boundary.
contents = st.lists(st.sampled_from([b"\r", b"\n", b"-", b"--bound", b"\r\n--boun", b"x", b"\r\n\r\n"])).map(b"".join)


@given(st.lists(contents.filter(lambda content: b"\r\n--bound" not in b"\r\n" + content), max_size=3), st.data())
async def test_content_does_not_depend_on_how_it_is_cut(expected, data):
    body = b"preamble\r\n" + form(*expected) + b"epilogue"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8)))
    pieces = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert [content for _, content in await parts(*pieces)] == expected


async def test_byte_by_byte():
    body = form(b"a\r\n--boun", b"")
    assert [content for _, content in await parts(*(body[at : at + 1] for at in range(len(body))))] == [
        b"a\r\n--boun",
        b"",
    ]


@pytest.mark.parametrize(
    ("disposition", "expected"),
    [
        (b'form-data; name="file"; filename="a b.jsonl"', Part("file", "a b.jsonl")),
        (b"form-data; name=file; filename=a", Part("file", "a")),
        (b'form-data; name="file"; filename="a\\"b"', Part("file", 'a"b')),
        ('form-data; name="file"; filename="größe"'.encode(), Part("file", "größe")),
        (b"form-data; name=\"file\"; filename*=UTF-8''gr%C3%B6", Part("file", "grö")),
        (b'form-data; name="purpose"', Part("purpose", None)),
    ],
)
async def test_heads(disposition, expected):
    body = b"--bound\r\nContent-Type: text/plain\r\ncontent-disposition: " + disposition + b"\r\n\r\nx\r\n--bound--"
    assert await parts(body) == [(expected, b"x")]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--bound",
        b"--bound\r\n",
        b"--other--",
        b"--bound\r\n\r\nx\r\n--bound--",
        b"--bound\r\nContent-Disposition: attachment; name=a\r\n\r\nx\r\n--bound--",
        b"--bound\r\nContent-Disposition: form-data\r\n\r\nx\r\n--bound--",
        form(b"x")[:-8],
        b"--bound\r\nX: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n",
    ],
)
async def test_bad_bodies(body):
    with pytest.raises(MultipartError):
        await parts(body)


async def test_an_endless_head_is_not_collected():
    async def endless() -> AsyncIterator[bytes]:
        yield b"--bound\r\n"
        for _ in range(100):
            yield b"X: " + b"x" * 1000
        pytest.fail("read on")

    with pytest.raises(MultipartError, match="headers"):
        async for _ in read_parts(endless(), BOUNDARY):
            pass


def test_boundaries():
    assert boundary_of('multipart/form-data; boundary="a b"') == b"a b"
    for bad in (
        "",
        "text/plain",
        "multipart/form-data",
        "multipart/mixed; boundary=b",
        f"multipart/form-data; boundary={'b' * 71}",
    ):
        with pytest.raises(MultipartError):
            boundary_of(bad)
