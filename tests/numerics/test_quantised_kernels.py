"""The kernels of the quantised products against the reference, for every instruction set that this CPU can run."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from xllm_compile.runtime.ops import native, reference
from xllm_compile.runtime.ops.quantised import (
    pack_int4,
    pack_int8,
    pack_scale,
    quantise_packed,
    stored_packed,
    unpack_int4,
    unpack_int8,
    unpack_scale,
)

pytestmark = pytest.mark.numerics

DTYPES = [torch.float32, torch.bfloat16]
# Sums are ordered differently in kernel and reference, and two such sums may round to neighbouring bfloat16 (2^-8).
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 5e-5},
    torch.bfloat16: {"rtol": 8e-3, "atol": 8e-3},
}
HAS_TILES = "amx_bf16" in native.cpu_features()
OPERATORS = ["int8_linear", "int8_dynamic_linear", "int4_linear", "int4_dynamic_linear"]
# (operator, inputs, outputs): whole blocks, one more and one less than them, one panel of AMX and more.
CASES = [
    *((operator, inputs, outputs) for operator in OPERATORS for inputs, outputs in ((64, 32), (96, 31), (544, 70))),
    *((operator, inputs, outputs) for operator in OPERATORS[:2] for inputs, outputs in ((65, 33), (3, 1), (271, 40))),
]


def weights(operator: str, outputs: int, inputs: int, group_size: int = 32) -> tuple[Tensor, Tensor]:
    return quantise_packed(torch.randn(outputs, inputs) / inputs**0.5, operator[:4], group_size)


def tolerance_of(operator: str, x: torch.dtype, out: torch.dtype) -> dict[str, Any]:
    """AMX tiles multiply with weights of groups that are rounded to bfloat16."""
    is_rounded = HAS_TILES and operator.startswith(("int4", "int8_zero")) and x == torch.bfloat16
    return TOLERANCE[torch.bfloat16 if is_rounded else out]


def both(ops: native.Kernels, operator: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    return getattr(ops, operator)(*arguments), getattr(reference, operator)(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operator", "inputs", "outputs"), CASES)
def test_equals_the_reference(
    ops: native.Kernels, dtype: torch.dtype, operator: str, inputs: int, outputs: int
) -> None:
    weight, scale = weights(operator, outputs, inputs)
    bias = torch.randn(outputs).to(dtype)
    for rows in (0, 1, 2, 5, 7, 13, 35):
        x = torch.randn(rows, inputs + 5).to(dtype)[:, 3 : 3 + inputs]
        for f32_out in (True, False):
            tolerance = tolerance_of(operator, dtype, torch.float32 if f32_out else dtype)
            got, want = both(ops, operator, x, weight, scale, bias, outputs, f32_out)
            assert_close(got, want, **tolerance)
            got, want = both(ops, operator, x, weight, scale, None, outputs, f32_out)
            # The sums of the dynamic scheme are integers: exact in any order.
            exact: dict[str, Any] = {"rtol": 0, "atol": 0}
            assert_close(got, want, **(exact if operator == "int8_dynamic_linear" else tolerance))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [8, 128])
@pytest.mark.parametrize("operator", ["int4_linear", "int4_dynamic_linear"])
def test_int4_groups(ops: native.Kernels, dtype: torch.dtype, operator: str, group_size: int) -> None:
    weight, scale = weights(operator, 70, 384, group_size)
    for rows in (9, 29):
        x = torch.randn(rows, 384).to(dtype)
        got, want = both(ops, operator, x, weight, scale, None, 70, True)
        assert_close(got, want, **tolerance_of(operator, dtype, torch.float32))


@pytest.mark.parametrize("group_size", [8, 32, 512])
def test_int4_sums_of_integers_are_exact(ops: native.Kernels, group_size: int) -> None:
    """Every code with every rounded activation, in each place of a step; scales of powers of two round nothing."""
    codes = torch.randint(-8, 8, (40, 512))
    codes[:2] = torch.tensor([[-8], [7]])
    x = torch.randint(-127, 128, (26, 512))
    x[:, 0] = 127
    x[0], x[1] = 127, -127
    scales = 2.0 ** torch.randint(-2, 3, (40, 512 // group_size))
    packed = pack_int4(codes.to(torch.int8)), pack_scale(scales.to(torch.bfloat16))
    want = x.double() @ (codes * scales.repeat_interleave(group_size, 1)).double().T
    for rows in (x, x[:1], x[3:11]):
        got = ops.int4_dynamic_linear(rows.float(), *packed, None, 40, True)
        first = 3 if len(rows) == 8 else 0
        assert torch.equal(got.double(), want[first : first + len(rows)])


@pytest.mark.parametrize("group_size", [8, 24, 64])
def test_int4_products_of_what_is_near_the_largest_are_exact(ops: native.Kernels, group_size: int) -> None:
    """bfloat16 rows, which may become fixed-point numbers; 255 is the one significand that needs a larger unit."""
    codes = torch.randint(-8, 8, (40, group_size))
    codes[:2] = torch.tensor([[-8], [7]])
    packed = pack_int4(codes.to(torch.int8)), pack_scale(torch.ones(40, 1, dtype=torch.bfloat16))
    x = torch.randint(128, 256, (6, group_size)) * 2.0 ** torch.randint(-6, 1, (6, group_size))
    x[:, 0], x[0], x[1] = 128, 255, -255
    x[2:, 1::2] *= -1
    want = x.double() @ codes.double().T
    for rows in (slice(0, 1), slice(1, 2), slice(5, 6), slice(0, 6)):
        got = ops.int4_linear(x[rows].bfloat16(), *packed, None, 40, True)
        assert torch.equal(got.double(), want[rows])


@pytest.mark.parametrize("factor", [1.0, 1e-30, 1e-37, 1e30])
def test_int4_errors_are_far_below_those_of_the_largest_input(ops: native.Kernels, factor: float) -> None:
    """Inputs of any size beside one that is a thousand times as large in each group; a row as alone as in a batch."""
    weight, scale = weights("int4_linear", 70, 384)
    x = torch.randn(9, 384) * factor
    x[:, ::32] *= 1000
    x = x.bfloat16()
    codes = unpack_int4(weight, 70).double() * unpack_scale(scale, 70).double().repeat_interleave(32, dim=1)
    error = (ops.int4_linear(x, weight, scale, None, 70, True).double() - x.double() @ codes.T).abs()
    # Half a unit of 2^-14 for each input, and as much again for sums in float32.
    largest = x.double().abs().view(9, 12, 32).amax(-1).repeat_interleave(32, dim=1)
    assert bool((error <= 2**-14 * largest @ codes.abs().T + 1e-33).all()) or HAS_TILES
    for row in range(9):
        alone = ops.int4_linear(x[row : row + 1], weight, scale, None, 70, True)
        assert torch.equal(alone, ops.int4_linear(x, weight, scale, None, 70, True)[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [8, 32, 384])
@pytest.mark.parametrize(("kind", "half"), [("int4", 8), ("int8", 128)])
def test_zero_points(
    ops: native.Kernels, two_threads: None, dtype: torch.dtype, kind: str, half: int, group_size: int
) -> None:
    """Every code with zero points of the whole range, and float16's scales; a row does not depend on the batch."""
    codes = torch.arange(70 * 384).remainder(2 * half).sub(half).view(70, 384)
    zeros = torch.randint(-half, half, (70, 384 // group_size))
    scales = (torch.rand(70, 384 // group_size) / 6 / half).half()
    packed = stored_packed(codes.to(torch.int8), scales, zeros, kind)
    operator, bias = f"{kind}_zero_linear", torch.randn(70).to(dtype)
    for rows in (1, 5, 13, 37):
        x = torch.randn(rows, 384).to(dtype)
        for f32_out in (True, False):
            got, want = both(ops, operator, x, *packed, bias, 70, f32_out)
            assert_close(got, want, **tolerance_of(operator, dtype, torch.float32 if f32_out else dtype))
        assert torch.equal(getattr(ops, operator)(x[:1], *packed, bias, 70, False), got[:1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_groups_are_the_same_on_any_number_of_threads(ops: native.Kernels, dtype: torch.dtype, kind: str) -> None:
    half = 8 if kind == "int4" else 128
    codes, zeros = torch.randint(-half, half, (1200, 256)), torch.randint(-half, half, (1200, 8))
    packed = stored_packed(codes.to(torch.int8), torch.rand(1200, 8) / half, zeros, kind)
    x = torch.randn(40, 256).to(dtype)
    linear = getattr(ops, f"{kind}_zero_linear")
    whole = linear(x, *packed, None, 1200, True)
    for threads in (2, 3, 4, 7):
        ops.set_num_threads(threads)
        for begin, end in ((0, 40), (0, 1), (3, 9), (9, 40)):
            assert torch.equal(linear(x[begin:end], *packed, None, 1200, True), whole[begin:end])
    ops.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_group_of_int8_without_zero_points_is_int8(ops: native.Kernels, dtype: torch.dtype) -> None:
    weight, scale = weights("int8_linear", 70, 384)
    values = unpack_int8(weight, 70, 384)
    packed = stored_packed(values, scale.unsqueeze(1), torch.zeros(70, 1), "int8")
    for rows in (1, 9, 40):
        x = torch.randn(rows, 384).to(dtype)
        want = ops.int8_linear(x, weight, scale, None, 70, True)
        assert_close(
            ops.int8_zero_linear(x, *packed, None, 70, True),
            want,
            **tolerance_of("int8_zero_linear", dtype, torch.float32),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_without_zero_points_is_int4_with_zeros_of_nothing(ops: native.Kernels, dtype: torch.dtype) -> None:
    weight, scale = weights("int4_linear", 70, 384)
    x = torch.randn(9, 384).to(dtype)
    zero = torch.zeros_like(scale)
    got = ops.int4_zero_linear(x, weight, scale.float(), zero, None, 70, True)
    assert torch.equal(got, ops.int4_linear(x, weight, scale, None, 70, True))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_int8_embedding(ops: native.Kernels, index: torch.dtype) -> None:
    weight, scale = weights("int8_linear", 100, 37)
    ids = torch.tensor([0, 99, 31, 32, 32]).to(index)
    for f32_out in (True, False):
        got, want = both(ops, "int8_embedding", ids, weight, scale, 37, f32_out)
        assert torch.equal(got, want)
    rows = ops.int8_linear(torch.eye(37), weight, scale, None, 100, True).T
    assert torch.equal(ops.int8_embedding(ids, weight, scale, 37, True), rows[ids.long()])
    for token_id, limit in ((128, "128 rows"), (100, "100 scales")):
        with pytest.raises(native.KernelError, match=rf"token_ids\[1\] is {token_id}, .* {limit}"):
            ops.int8_embedding(torch.tensor([3, token_id]).to(index), weight, scale, 37, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_many_blocks_and_threads(ops: native.Kernels, two_threads: None, dtype: torch.dtype, operator: str) -> None:
    """Several column groups and row parts, and blocks that lie apart."""
    weight, scale = weights(operator, 1200, 512)
    apart = torch.stack([weight, weight], dim=1)[:, 0]
    for rows in (1, 4, 37, 150):
        x = torch.randn(rows, 512).to(dtype)
        got, want = both(ops, operator, x, weight, scale, None, 1200, True)
        assert_close(got, want, **tolerance_of(operator, dtype, torch.float32))
        assert torch.equal(getattr(ops, operator)(x, apart, scale, None, 1200, True), got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [3, 65, 514])
def test_blocks_that_follow_each_other_end_within_a_step(
    ops: native.Kernels, two_threads: None, dtype: torch.dtype, inputs: int
) -> None:
    """Each is unpacked while the one before it is multiplied, by whichever thread claimed it."""
    weight, scale = weights("int8_linear", 300, inputs)
    for rows in (6, 12, 13, 37):
        x = torch.randn(rows, inputs).to(dtype)
        got, want = both(ops, "int8_linear", x, weight, scale, None, 300, True)
        assert_close(got, want, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_rows_do_not_depend_on_the_batch(ops: native.Kernels, dtype: torch.dtype, operator: str) -> None:
    weight, scale = weights(operator, 320, 160)
    bias, x = torch.randn(320).to(dtype), torch.randn(70, 160).to(dtype)
    linear = getattr(ops, operator)
    whole = linear(x, weight, scale, bias, 320, True)
    for threads in (1, 2, 7):
        ops.set_num_threads(threads)
        for begin, end in ((0, 1), (3, 5), (7, 20), (20, 70)):
            assert torch.equal(linear(x[begin:end], weight, scale, bias, 320, True), whole[begin:end])
    ops.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_exact(ops: native.Kernels, dtype: torch.dtype) -> None:
    """Products with unit vectors read the weights back, also -128, which other quantisers write."""
    int8 = torch.arange(-128, 128, dtype=torch.int8).view(32, 8)
    got = ops.int8_linear(torch.eye(8, dtype=dtype), pack_int8(int8), torch.ones(32), None, 32, True)
    assert torch.equal(got.T, int8.float())
    int4 = torch.arange(256).remainder(16).sub(8).to(torch.int8).view(8, 32).T.contiguous()
    scale = pack_scale(torch.ones(32, 1, dtype=torch.bfloat16))
    got = ops.int4_linear(torch.eye(8, dtype=dtype), pack_int4(int4), scale, None, 32, True)
    assert torch.equal(got.T, int4.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_extremes_do_not_saturate(ops: native.Kernels, dtype: torch.dtype) -> None:
    """Every product is 127 * 127 of one sign: the largest sums there are."""
    weight, scale = quantise_packed(torch.tensor([[1.0], [-1.0]]).expand(2, 4096).contiguous(), "int8", 0)
    x = torch.tensor([[1.0], [-1.0]]).expand(2, 4096).contiguous().to(dtype)
    want = torch.tensor([[4096.0, -4096.0], [-4096.0, 4096.0]])
    for operator in OPERATORS[:2]:
        assert_close(getattr(ops, operator)(x, weight, scale, None, 2, True), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS[:2])
def test_int8_has_a_smallest_value_that_rounding_never_gives(
    ops: native.Kernels, dtype: torch.dtype, operator: str
) -> None:
    """-128, as checkpoints hold it."""
    weight, scale = pack_int8(torch.full((3, 64), -128, dtype=torch.int8)), torch.ones(3)
    x = torch.ones(2, 64).to(dtype)
    assert torch.equal(getattr(ops, operator)(x, weight, scale, None, 3, True), torch.full((2, 3), -8192.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_zeros_and_what_is_not_finite(ops: native.Kernels, dtype: torch.dtype, operator: str) -> None:
    """A row of zeros is zero, a row with NaN or infinity is never a finite number, and no other row hears of it."""
    weight, scale = weights(operator, 64, 64)
    x = torch.randn(5, 64).to(dtype)
    x[0], x[1, 7], x[2, 9], x[3, 11] = 0, float("nan"), float("inf"), float("-inf")
    got = getattr(ops, operator)(x, weight, scale, None, 64, True)
    assert got[0].eq(0).all() and not got[1:4].isfinite().any()
    assert torch.equal(got[4:], getattr(ops, operator)(x[4:], weight, scale, None, 64, True))


def test_errors_name_operator_value_and_limit(ops: native.Kernels) -> None:
    x, (int8, scale), (int4, scales) = torch.randn(2, 64), weights("int8", 40, 64), weights("int4", 40, 64)
    refused: list[tuple[str, str, tuple[Any, ...]]] = [
        (r"int8_linear: weight.shape\[1\] is 16, expected 15", "int8_linear", (x[:, 4:], int8, scale, None, 40, True)),
        (r"int8_linear: weight.shape\[0\] is 2, expected 3", "int8_linear", (x, int8, scale, None, 65, True)),
        (r"int8_linear: scale.shape\[0\] is 40, expected 41", "int8_linear", (x, int8, scale, None, 41, True)),
        (r"int8_linear: weight has dtype", "int8_linear", (x, int4, scale, None, 40, True)),
        (r"int8_linear: x has dtype", "int8_linear", (x.half(), int8, scale, None, 40, True)),
        (r"int8_dynamic_linear: bias.shape\[0\] is 3", "int8_dynamic_linear", (x, int8, scale, x[0, :3], 40, True)),
        (
            r"int4_linear: x.shape\[1\] is 60, expected a multiple of 8",
            "int4_linear",
            (x[:, 4:], int4, scales, None, 40, True),
        ),
        (r"int4_linear: scale has dtype", "int4_linear", (x, int4, scales.float(), None, 40, True)),
        (r"int4_dynamic_linear: scale has dtype", "int4_dynamic_linear", (x, int4, scales.float(), None, 40, True)),
        (
            r"int4_dynamic_linear: weight.shape\[1\] is 8, expected 7",
            "int4_dynamic_linear",
            (x[:, 8:], int4, scales, None, 40, True),
        ),
        (
            r"int4_zero_linear: zero.shape\[1\] is 1, expected 2",
            "int4_zero_linear",
            (x, int4, scales.float(), scales[:, :1], None, 40, True),
        ),
        (
            r"int8_zero_linear: weight has dtype",
            "int8_zero_linear",
            (x, int4, scales.float(), scales, None, 40, True),
        ),
        (
            r"int4_linear: scale.shape\[1\] is 5, expected to cut 64",
            "int4_linear",
            (x, int4, scales.new_ones(2, 5, 32), None, 40, True),
        ),
    ]
    for pattern, operator, arguments in refused:
        with pytest.raises(native.KernelError, match=pattern):
            getattr(ops, operator)(*arguments)
