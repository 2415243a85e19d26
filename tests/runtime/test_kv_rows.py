"""How a head's key or value becomes a row of an int8 cache."""

from typing import Any

import pytest
import torch

from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.ops.kv_rows import SCALE_BYTES, read_rows, round_rows, row_width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_off_by_half_a_step_of_its_own_scale(dtype: torch.dtype) -> None:
    heads = (torch.randn(5, 3, 64) * torch.logspace(-20, 20, 5)[:, None, None]).to(dtype)
    rows = round_rows(heads)
    assert rows.dtype == torch.int8 and rows.shape == (5, 3, row_width(64, is_int8=True))
    assert rows[..., :-SCALE_BYTES].abs().amax(-1).eq(127).all()
    largest = heads.float().abs().amax(-1, keepdim=True)
    assert ((read_rows(rows) - heads.float()).abs() <= largest / 254 * 1.0001).all()


def test_codes_times_a_scale_come_back_as_they_were() -> None:
    codes = torch.arange(-127, 128).float()
    for scale in (0.25, 1.0, 64.0):
        assert torch.equal(read_rows(round_rows(codes * scale)), codes * scale)


@pytest.mark.parametrize("value", [0.0, 1e-42])
def test_rows_without_magnitude_are_zero_or_near(value: float) -> None:
    assert read_rows(round_rows(torch.full((2, 8), value))).abs().max() <= 1e-41


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    heads = torch.randn(3, 8)
    heads[1, 5] = bad
    read = read_rows(round_rows(heads))
    assert not read[1].isfinite().any() and read[[0, 2]].isfinite().all()


def test_a_floating_cache_is_read_as_it_is() -> None:
    rows = torch.randn(2, 8).bfloat16()
    assert torch.equal(read_rows(rows), rows.float())


def test_a_cache_of_int8_rows() -> None:
    """Qwen3-0.6B: 132 bytes for 128 elements."""
    shape: dict[str, Any] = {"num_layers": 28, "num_kv_heads": 8, "head_dim": 128, "max_model_len": 64, "num_slots": 2}
    small, large = (KVCacheConfig(**shape, dtype=d, kv_memory_bytes=16 << 20) for d in (torch.int8, torch.bfloat16))
    assert small.bytes_per_token == 28 * 2 * 8 * 132
    assert small.bytes_per_token < 0.52 * large.bytes_per_token
    cache = KVCache(small)
    slot = cache.allocate()
    assert cache.extend(slot, 40)
    cache.settle(slot)
    heads = torch.randn(40, 2, 8, 128)
    for layer in cache.layers:
        assert layer.shape == (2, 64, 2, 8, 132) and layer.dtype == torch.int8
        layer[slot, :40] = round_rows(heads)
    # No layer wrote over its neighbour.
    for layer in cache.layers:
        assert torch.equal(layer[slot, :40], round_rows(heads))
    cache.free(slot)
    cache.close()
