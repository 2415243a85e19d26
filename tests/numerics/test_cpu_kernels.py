"""The CPU kernels against the plain-torch reference, for every instruction set this CPU can run."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from xllm_compile.runtime.ops import native, reference
from xllm_compile.runtime.ops.reference import pack_weight

pytestmark = pytest.mark.numerics

DTYPES = [torch.float32, torch.bfloat16]
Tolerance = dict[torch.dtype, dict[str, Any]]
# One rounding to bfloat16 is 2^-9 relative; two differently ordered sums may round to neighbours (2^-8).
TOLERANCE: Tolerance = {torch.float32: {"rtol": 2e-6, "atol": 2e-6}, torch.bfloat16: {"rtol": 8e-3, "atol": 1e-5}}
# Sums of products are ordered differently: float32 error grows with the number of terms; attention weights are
# rounded to bfloat16 before they meet the values.
SUM_TOLERANCE: Tolerance = {
    torch.float32: {"rtol": 1e-5, "atol": 5e-5},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
}


def make_cache(slots: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """A cache as one layer's view of [slot, token, layer, K/V, head, width]; unwritten memory is NaN."""
    return torch.full((slots, tokens, 3, 2, heads, width), float("nan"), dtype=dtype)[:, :, 1]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 128, 1100])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_norms(ops: native.Kernels, dtype: torch.dtype, width: int, rows: int) -> None:
    x = torch.randn(rows, 2 * width + 3).to(dtype)[:, 2 : 2 + width]
    residual = torch.randn(rows, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    assert_close(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), **TOLERANCE[dtype])
    got, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    want, want_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert_close(got, want, **TOLERANCE[dtype])
    assert_close(total, want_total, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_wise_operators_share_rows(ops: native.Kernels, two_threads: None, dtype: torch.dtype) -> None:
    """Enough rows for several threads."""
    x, weight = torch.randn(40, 1024).to(dtype), torch.randn(1024).to(dtype)
    assert_close(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), **TOLERANCE[dtype])
    assert_close(ops.add_rms_norm(x, x, weight, 1e-6), reference.add_rms_norm(x, x, weight, 1e-6), **TOLERANCE[dtype])
    assert_close(ops.silu_mul(x), reference.silu_mul(x), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_heads(ops: native.Kernels, dtype: torch.dtype) -> None:
    x = torch.randn(7, 10, 80).to(dtype)[:, 3:8]
    weight = torch.randn(80).to(dtype)
    assert_close(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 37, 3072, 4097])
def test_silu_mul(ops: native.Kernels, dtype: torch.dtype, width: int) -> None:
    for rows in (0, 1, 9):
        gate_up = (torch.randn(rows, 2 * width + 8) * 8).to(dtype)[:, 5 : 5 + 2 * width]
        assert_close(ops.silu_mul(gate_up), reference.silu_mul(gate_up), **TOLERANCE[dtype])
    extreme = torch.tensor([[-1e4, -100.0, -88.0, 0.0, 88.0, 1e4] + [1.0] * 6]).to(dtype)
    assert_close(ops.silu_mul(extreme), reference.silu_mul(extreme), **TOLERANCE[dtype])
    nan = torch.full((1, 64), float("nan"), dtype=dtype)
    assert ops.silu_mul(nan).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "rotated"), [(128, 128), (36, 36), (80, 20), (64, 32), (6, 2)])
def test_rope(ops: native.Kernels, dtype: torch.dtype, width: int, rotated: int) -> None:
    for tokens in (0, 1, 33):
        x = torch.randn(tokens, 9, width).to(dtype)[:, 2:7]
        angle = torch.rand(tokens, rotated // 2) * 6
        assert_close(
            ops.rope(x, angle.cos(), angle.sin()), reference.rope(x, angle.cos(), angle.sin()), **TOLERANCE[dtype]
        )


def check_qkv_rope_write(
    ops: native.Kernels,
    caches: list[Tensor],
    dtype: torch.dtype,
    *,
    with_norm: bool,
    heads: int,
    kv_heads: int,
    width: int,
) -> None:
    """The kernel writes to the first of two caches [5, 40, ...], the reference to the other; queries come out equal."""
    lengths, cached, padding = [3, 0, 1, 20], [5, 0, 31, 0], 4
    tokens = sum(lengths) + padding
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * width + 8).to(dtype)[:, 4:-4]
    norms: tuple[Any, ...] = tuple(torch.randn(width).to(dtype) if with_norm else None for _ in range(2))
    angle = torch.rand(tokens, width // 2) * 6
    where = [c + i for n, c in zip(lengths, cached, strict=True) for i in range(n)]
    positions = ints(*where, *[0] * padding)
    seq_start, slot = torch.tensor([0, *lengths]).cumsum(0).int(), ints(4, 0, 1, 2)
    rest: tuple[Any, ...] = (positions, seq_start, slot, heads, kv_heads, 1e-6)
    got = ops.qkv_rope_write(qkv, *norms, angle.cos(), angle.sin(), caches[0], *rest)
    reference_of: Callable[..., Tensor] = reference.qkv_rope_write
    want = reference_of(qkv.contiguous(), *norms, angle.cos(), angle.sin(), caches[1], *rest)
    assert_close(got, want, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 128), (7, 1, 36), (3, 3, 80)])
def test_qkv_rope_write(
    ops: native.Kernels, dtype: torch.dtype, with_norm: bool, heads: int, kv_heads: int, width: int
) -> None:
    caches = [make_cache(5, 40, kv_heads, width, dtype) for _ in range(2)]
    check_qkv_rope_write(ops, caches, dtype, with_norm=with_norm, heads=heads, kv_heads=kv_heads, width=width)
    assert_close(*caches, **TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_write(ops: native.Kernels, dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 5, 2, 36).to(dtype)
    caches = [make_cache(3, 8, 2, 36, dtype) for _ in range(2)]
    for cache, kv_write in zip(caches, (ops.kv_write, reference.kv_write), strict=True):
        kv_write(k, v, cache, ints(2, 3, 7, 0, 0), ints(0, 2, 2, 3), ints(2, 1, 0))
    assert_close(*caches, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 6, 7, 11, 12, 13, 25])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (65, 33), (1, 1), (96, 31), (130, 300)])
def test_packed_linear(ops: native.Kernels, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    x = torch.randn(rows, inputs + 5).to(dtype)[:, 3 : 3 + inputs]
    weight = pack_weight(torch.randn(outputs, inputs).to(dtype))
    bias = torch.randn(outputs).to(dtype)
    for f32_out in (True, False):
        for offset in (None, bias):
            got = ops.packed_linear(x, weight, offset, outputs, f32_out)
            want = reference.packed_linear(x, weight, offset, outputs, f32_out)
            tolerance = SUM_TOLERANCE[torch.float32 if f32_out else dtype]
            assert_close(got, want, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_linear_many_blocks(ops: native.Kernels, two_threads: None, dtype: torch.dtype) -> None:
    """Several column groups and row parts, and blocks that lie apart."""
    weight = pack_weight(torch.randn(1200, 512).to(dtype) / 16)
    apart = torch.stack([weight, weight], dim=1)[:, 0]
    for rows in (1, 4, 37, 150):
        x = torch.randn(rows, 512).to(dtype)
        want = reference.packed_linear(x, weight, None, 1200, True)
        assert_close(ops.packed_linear(x, weight, None, 1200, True), want, **SUM_TOLERANCE[torch.float32])
        assert_close(ops.packed_linear(x, apart, None, 1200, True), want, **SUM_TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 12, 30])
def test_packed_linear_on_any_number_of_threads(ops: native.Kernels, dtype: torch.dtype, rows: int) -> None:
    """Threads take over what others have left; with 64 of them most begin with nothing, or next to it."""
    x, weight = torch.randn(rows, 1024).to(dtype), pack_weight(torch.randn(1200, 1024).to(dtype) / 32)
    want = ops.packed_linear(x, weight, None, 1200, True)
    for threads in (2, 3, 7, 64):
        ops.set_num_threads(threads)
        for _ in range(5):
            assert_close(ops.packed_linear(x, weight, None, 1200, True), want, rtol=0, atol=0)
    ops.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_embedding(ops: native.Kernels, dtype: torch.dtype, index: torch.dtype) -> None:
    table = torch.randn(100, 37).to(dtype)
    ids = torch.tensor([0, 99, 31, 32, 32]).to(index)
    assert_close(ops.packed_embedding(ids, pack_weight(table), 37), table[ids.long()], rtol=0, atol=0)
    with pytest.raises(native.KernelError, match=r"token_ids\[1\] is 128"):
        ops.packed_embedding(torch.tensor([3, 128]).to(index), pack_weight(table), 37)


def attention_case(
    dtype: torch.dtype, tokens: list[int], context: list[int], heads: int, kv_heads: int, width: int, padding: int = 0
) -> tuple[Any, ...]:
    """Arguments of attention up to the slots; only the context of each sequence is written in the cache."""
    cache = make_cache(len(tokens) + 2, max(context) + 3, kv_heads, width, dtype)
    slot = ints(*range(len(tokens), 0, -1))
    for row, total in zip(slot.tolist(), context, strict=True):
        cache[row, :total] = torch.randn(total, 2, kv_heads, width).to(dtype)
    qkv = torch.randn(sum(tokens) + padding, heads + 3, width).to(dtype)
    return qkv[:, :heads], cache, torch.tensor([0, *tokens]).cumsum(0).int(), ints(*context), slot


reference_attention: Callable[..., Tensor] = reference.attention


def check_attention(ops: native.Kernels, arguments: tuple[Any, ...], window: int = 0) -> None:
    q = arguments[0]
    scale = q.shape[-1] ** -0.5
    got = ops.attention(*arguments, scale, window)
    assert_close(got, reference_attention(*arguments, scale, window), **SUM_TOLERANCE[q.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 4, 7, 13])
@pytest.mark.parametrize("width", [128, 80, 36, 33])
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


def test_attention_of_padding_only_is_zero(ops: native.Kernels) -> None:
    arguments = attention_case(torch.float32, [0], [0], 2, 2, 16, padding=4)
    assert ops.attention(*arguments, 1.0, 0).eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_large_scores(ops: native.Kernels, dtype: torch.dtype) -> None:
    arguments = attention_case(dtype, [3], [70], 2, 1, 64)
    got = ops.attention(*arguments, 1000.0, 0)
    assert_close(got, reference_attention(*arguments, 1000.0, 0), **SUM_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_the_batch(ops: native.Kernels, dtype: torch.dtype) -> None:
    """The same row gives the same bits alone, in a batch, and with any number of threads."""
    weight = pack_weight(torch.randn(320, 160).to(dtype))
    x = torch.randn(50, 160).to(dtype)
    whole = ops.packed_linear(x, weight, None, 320, True)
    for begin, end in ((0, 1), (3, 5), (7, 20), (20, 50)):
        assert torch.equal(ops.packed_linear(x[begin:end], weight, None, 320, True), whole[begin:end])
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
    x, weight = torch.randn(2, 64), pack_weight(torch.randn(40, 64))
    strided = torch.randn(2, 128)[:, ::2]
    q, cache, start, context, slot = attention_case(torch.float32, [2], [5], 2, 1, 16)
    angle = torch.randn(2, 10)
    refused: list[tuple[str, Any, tuple[Any, ...]]] = [
        (r"packed_linear: weight.shape\[1\] is 64, expected 60", ops.packed_linear, (x[:, 4:], weight, None, 40, True)),
        (r"packed_linear: weight.shape\[0\] is 2, expected 3", ops.packed_linear, (x, weight, None, 65, True)),
        (r"packed_linear: x has dtype", ops.packed_linear, (x.half(), weight.half(), None, 40, True)),
        (r"packed_linear: weight has dtype", ops.packed_linear, (x.bfloat16(), weight, None, 40, True)),
        (r"packed_linear: the last axis of x has stride 2", ops.packed_linear, (strided, weight, None, 40, True)),
        (r"packed_linear: bias.shape\[0\] is 3", ops.packed_linear, (x, weight, torch.randn(3), 40, True)),
        (r"rms_norm: weight.shape\[0\] is 3, expected 64", ops.rms_norm, (x, torch.randn(3), 1e-6)),
        (r"silu_mul: the last axis of gate_up is 5", ops.silu_mul, (torch.randn(2, 5),)),
        (r"rope: cos rotates 20 of 16", ops.rope, (q, angle, angle)),
        (r"attention: slot\[0\] is 9, kv_cache has 3", ops.attention, (q, cache, start, context, ints(9), 1.0, 0)),
        (r"attention: context_len\[0\] is 9,", ops.attention, (q, cache, start, ints(9), slot, 1.0, 0)),
        (r"attention: context_len\[0\] is 1,", ops.attention, (q, cache, start, ints(1), slot, 1.0, 0)),
        (r"attention: seq_start ends at 3", ops.attention, (q, cache, ints(0, 3), context, slot, 1.0, 0)),
        (r"attention: seq_start has dtype", ops.attention, (q, cache, start.long(), context, slot, 1.0, 0)),
        (r"kv_write: positions\[1\] is 8,", ops.kv_write, (q[:, :1], q[:, :1], cache, ints(0, 8), start, slot)),
    ]
    for pattern, operator, arguments in refused:
        with pytest.raises(native.KernelError, match=pattern):
            operator(*arguments)


MOVING_CALLER = """
import os, sys
from pathlib import Path
cpus = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, cpus)
import torch
from xllm_compile.runtime.ops import native

kernels = native.Kernels(Path(sys.argv[1]))
kernels.set_num_threads(2)
x = torch.randn(512, 2048)
kernels.silu_mul(x)
affinities = {int(name): os.sched_getaffinity(int(name)) for name in os.listdir("/proc/self/task")}
(worker,) = [thread for thread, where in affinities.items() if len(where) == 1]
for cpu in (*cpus, *cpus):
    os.sched_setaffinity(0, {cpu})
    kernels.silu_mul(x)
    print(cpu not in os.sched_getaffinity(worker), len(os.sched_getaffinity(worker)))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU has room for no worker beside the caller")
def test_a_worker_leaves_the_cpu_that_the_caller_comes_to(build: Callable[[str], Path]) -> None:
    arguments = [sys.executable, "-c", MOVING_CALLER, str(build("machine"))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:-1] == ["True 1"] * 4, done.stderr


LEAK_LOOP = """
import resource, sys, torch
from pathlib import Path
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.ops.reference import pack_weight

native.load_kernels(Path(sys.argv[1]))
native.load_kernels(Path(sys.argv[1]))
assert not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in sys.modules)
x, weight = torch.randn(2, 64), torch.randn(64)
packed = pack_weight(torch.randn(32, 64))
def loop(count):
    for _ in range(count):
        torch.ops.xllm.add_rms_norm(x, x, weight, 1e-6)
        torch.ops.xllm.packed_linear(x, packed, weight[:32], 32, False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = loop(2000)
print(loop(20000) - before)
"""


def test_registered_kernels_do_not_leak(build: Callable[[str], Path]) -> None:
    """In a process of its own: operators are registered once per process."""
    path = build("machine")
    done = subprocess.run([sys.executable, "-c", LEAK_LOOP, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # 20000 leaked handles of either kind are more than a megabyte.
    assert int(done.stdout) < 600, f"grew by {done.stdout.strip()} KiB in 20000 calls"


def test_build_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown CPU features"):
        native.build_kernels(tmp_path / "k.so", ["mmx"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.CompilerNotFoundError, match=r"install g\+\+"):
        native.build_kernels(tmp_path / "k.so")
    monkeypatch.setenv("CXX", "g++ -no-such-flag")
    with pytest.raises(native.KernelBuildError, match="no-such-flag"):
        native.build_kernels(tmp_path / "k.so")
    assert list(tmp_path.iterdir()) == []


def test_source_hash_depends_on_the_features() -> None:
    assert native.kernel_source_hash() == native.kernel_source_hash(native.cpu_features())
    assert native.kernel_source_hash(()) != native.kernel_source_hash(("avx2", "fma"))


def test_load_errors(tmp_path: Path) -> None:
    with pytest.raises(native.KernelLoadError, match="cannot read"):
        native.load_kernels(tmp_path / "absent.so")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(native.KernelLoadError, match="rebuild it"):
        native.Kernels(tmp_path / "text.so")
