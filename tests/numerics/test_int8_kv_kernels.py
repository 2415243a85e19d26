"""The kernels on an int8 KV cache against the plain-torch reference, for every instruction set this CPU can run."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.numerics.test_cpu_kernels import DTYPES, SUM_TOLERANCE, check_attention, check_qkv_rope_write, ints
from xllm_compile.runtime.ops import native, reference
from xllm_compile.runtime.ops.kv_rows import SCALE_BYTES, read_rows, round_rows

pytestmark = pytest.mark.numerics


def make_cache(slots: int, tokens: int, heads: int, width: int) -> Tensor:
    """One layer's view of [slot, token, layer, K/V, head, row]; the scales of unwritten memory are NaN."""
    return torch.full((slots, tokens, 3, 2, heads, width + SCALE_BYTES), -1, dtype=torch.int8)[:, :, 1]


def attention_case(
    dtype: torch.dtype, tokens: list[int], context: list[int], heads: int, kv_heads: int, width: int, padding: int = 0
) -> tuple[Any, ...]:
    """Arguments of attention up to the slots; magnitudes differ from row to row."""
    cache = make_cache(len(tokens) + 2, max(context) + 3, kv_heads, width)
    slot = ints(*range(len(tokens), 0, -1))
    for row, total in zip(slot.tolist(), context, strict=True):
        cache[row, :total] = round_rows(torch.randn(total, 2, kv_heads, width) * torch.rand(total, 2, kv_heads, 1) * 2)
    q = torch.randn(sum(tokens) + padding, heads + 3, width).to(dtype)[:, :heads]
    return q, cache, torch.tensor([0, *tokens]).cumsum(0).int(), ints(*context), slot


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_written_as_the_reference_rounds_them(ops: native.Kernels, dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 6, 2, 36).to(dtype)
    k[0] *= 1e20
    k[1] = 0
    v[0, 0] = 1e-42
    # Halfway between two codes: rounded to even.
    v[1] = torch.arange(36) + 0.5
    v[1, :, 0] = 127
    caches = [make_cache(3, 8, 2, 36) for _ in range(2)]
    for cache, kv_write in zip(caches, (ops.kv_write, reference.kv_write), strict=True):
        kv_write(k, v, cache, ints(2, 3, 7, 0, 0, 0), ints(0, 2, 2, 3), ints(2, 1, 0))
    assert torch.equal(*caches)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_output(ops: native.Kernels, bad: float) -> None:
    k, v = torch.randn(2, 3, 1, 32)
    v[1, 0, 7] = bad
    cache = make_cache(1, 4, 1, 32)
    ops.kv_write(k, v, cache, ints(0, 1, 2), ints(0, 3), ints(0))
    assert not read_rows(cache[0, 1, 1]).isfinite().any()
    out = ops.attention(torch.randn(1, 2, 32), cache, ints(0, 1), ints(3), ints(0), 1.0, 0)
    assert not out.isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 128), (7, 1, 36), (3, 3, 80)])
def test_qkv_rope_write(
    ops: native.Kernels, dtype: torch.dtype, with_norm: bool, heads: int, kv_heads: int, width: int
) -> None:
    caches = [make_cache(5, 40, kv_heads, width) for _ in range(2)]
    check_qkv_rope_write(ops, caches, dtype, with_norm=with_norm, heads=heads, kv_heads=kv_heads, width=width)
    # Values are rounded from the same bits. Keys may differ by a rounding before, which moves a code by one.
    assert torch.equal(caches[0][:, :, 1], caches[1][:, :, 1])
    written, expected = (read_rows(cache[:, :, 0]) for cache in caches)
    step = expected.abs().amax(-1, keepdim=True) / 127
    near = (written - expected).abs() <= 1.1 * step
    assert (near | (written.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 4, 7, 13])
@pytest.mark.parametrize("width", [128, 80, 36, 33, 6])
def test_attention_mixed_step(ops: native.Kernels, dtype: torch.dtype, group: int, width: int) -> None:
    tokens, context = [1, 0, 7, 1, 90], [600, 0, 7, 1, 130]
    check_attention(ops, attention_case(dtype, tokens, context, 2 * group, 2, width, padding=3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 500, 5000])
def test_attention_window(ops: native.Kernels, dtype: torch.dtype, window: int) -> None:
    check_attention(ops, attention_case(dtype, [1, 80, 5], [1100, 200, 700], 4, 2, 64), window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [1, 2, 63, 64, 65, 511, 512, 513, 1025])
def test_attention_decode_edges(ops: native.Kernels, dtype: torch.dtype, context: int) -> None:
    check_attention(ops, attention_case(dtype, [1], [context], 2, 1, 128))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_long_prefill(ops: native.Kernels, two_threads: None, dtype: torch.dtype) -> None:
    check_attention(ops, attention_case(dtype, [700, 30], [700, 1200], 4, 2, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [128, 36])
def test_every_code_is_exact(ops: native.Kernels, dtype: torch.dtype, width: int) -> None:
    """On codes with the scale 1, -128 too, attention is what it is on a cache that holds the codes as numbers."""
    codes = torch.randint(-128, 128, (2, 300, 2, 2, width), dtype=torch.int8)
    codes[0, 0, 0, 0] = -128
    ones = torch.ones(*codes.shape[:-1], 1).view(torch.int8)
    cache = torch.cat((codes, ones), -1)
    q = torch.randn(21, 4, width).to(dtype)
    rest: tuple[Any, ...] = (ints(0, 20, 21), ints(200, 300), ints(0, 1), 1e-3, 0)
    got, want = ops.attention(q, cache, *rest), ops.attention(q, codes.to(dtype), *rest)
    if "amx_tile" in native.cpu_features():
        # Numbers meet AMX tiles, which sum in another order.
        assert_close(got, want, **SUM_TOLERANCE[dtype])
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_the_batch(ops: native.Kernels, dtype: torch.dtype) -> None:
    """The same row gives the same bits alone, in a batch, and with any number of threads."""
    q, cache, _, _, slot = attention_case(dtype, [1300], [1300], 4, 2, 128)
    prefill = ops.attention(q, cache, ints(0, 1300), ints(1300), slot, 0.1, 0)
    for position in (0, 5, 63, 700, 1299):
        one = q[position : position + 1]
        for threads in (1, 2, 7):
            ops.set_num_threads(threads)
            decode = ops.attention(one, cache, ints(0, 1), ints(position + 1), slot, 0.1, 0)
            assert torch.equal(decode, prefill[position : position + 1]), position
    ops.set_num_threads(1)


def test_errors_name_operator_value_and_limit(ops: native.Kernels) -> None:
    q, cache, start, context, slot = attention_case(torch.float32, [2], [5], 2, 1, 16)
    key = q[:, :1]
    refused: list[tuple[str, Any, tuple[Any, ...]]] = [
        (
            r"attention: q.shape\[2\] is 12, expected 16",
            ops.attention,
            (q[..., :12], cache, start, context, slot, 1.0, 0),
        ),
        (r"attention: q has dtype code", ops.attention, (q.half(), cache, start, context, slot, 1.0, 0)),
        (r"attention: kv_cache has 1 heads of 0", ops.attention, (q, cache[..., :4], start, context, slot, 1.0, 0)),
        (r"kv_write: k has dtype code", ops.kv_write, (key.half(), key.half(), cache, ints(0, 1), start, slot)),
        (r"kv_write: v has dtype code", ops.kv_write, (key, key.bfloat16(), cache, ints(0, 1), start, slot)),
    ]
    for pattern, operator, arguments in refused:
        with pytest.raises(native.KernelError, match=pattern):
            operator(*arguments)
