import ctypes
import random

import pytest

from xllm_compile.runtime.ops import native

STREAMED = 256 << 10


@pytest.mark.parametrize("size", [0, 1, 63, 4097, STREAMED - 1, STREAMED, STREAMED + 1, STREAMED + 255, 2 << 20])
@pytest.mark.parametrize(("to", "since"), [(0, 0), (1, 0), (63, 5), (64, 33)])
def test_every_byte_is_copied_and_no_other(kernels, size, to, since):
    source = random.Random(size).randbytes(since + size + 100)
    target = ctypes.create_string_buffer(to + size + 100)
    held = ctypes.create_string_buffer(source, len(source))
    native.copy_bytes()(ctypes.addressof(target) + to, ctypes.addressof(held) + since, size)
    assert target.raw == bytes(to) + source[since : since + size] + bytes(100)
