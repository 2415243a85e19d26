"""How weights are rounded and packed: error bounds, layouts, slices."""

import pytest
import torch

from xllm_compile.runtime.ops import quantised
from xllm_compile.runtime.ops.quantised import quantise_int4, quantise_int8


@pytest.fixture
def weight():
    return torch.randn(70, 96, generator=torch.Generator().manual_seed(0))


def dense_int4(values, scale):
    return values * scale.float().repeat_interleave(values.shape[1] // scale.shape[1], 1)


def test_int8_is_off_by_half_a_step_of_its_channel(weight):
    values, scale = quantise_int8(weight)
    assert values.dtype == torch.int8 and values.abs().amax(1).eq(127).all()
    error = (values * scale.unsqueeze(1) - weight).abs()
    assert (error <= scale.unsqueeze(1) * 0.5001).all()


def test_int4_uses_every_code_and_is_near(weight):
    values, scale = quantise_int4(weight, 32)
    assert scale.dtype == torch.bfloat16 and scale.shape == (70, 3)
    assert values.unique().tolist() == list(range(-8, 8))
    # Sixteen levels over about +-2.2 standard deviations: a tenth of the weight's norm.
    assert (dense_int4(values, scale) - weight).norm() < 0.1 * weight.norm()


def test_int4_is_no_worse_than_the_scale_that_keeps_the_largest(weight):
    values, scale = quantise_int4(weight, 32)
    groups = weight.view(70, 3, 32)
    naive = groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8
    rounded = (groups / naive).round().clamp(-8, 7) * naive
    error = (dense_int4(values, scale) - weight).square().sum()
    assert error < 0.9 * (rounded - groups).square().sum()


def test_int4_keeps_what_it_can_represent():
    values = torch.arange(-8, 8).repeat(3, 4).to(torch.int8)
    scale = torch.tensor([[0.5, -2.0], [1.0, 0.25], [-1.0, 4.0]]).to(torch.bfloat16)
    weight = dense_int4(values, scale)
    assert torch.equal(dense_int4(*quantise_int4(weight, 32)), weight)


@pytest.mark.parametrize("fill", [0.0, 1e-42])
def test_channels_of_nothing_stay_finite(fill):
    weight = torch.full((2, 32), fill)
    for values, scale in (quantise_int8(weight), quantise_int4(weight, 32)):
        assert scale.float().isfinite().all() and (values.float() * scale.float().view(2, 1)).abs().max() < 1e-40


@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (70, 96), (1, 8)])
def test_packing_round_trips(rows, columns):
    generator = torch.Generator().manual_seed(0)
    int8 = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    assert torch.equal(quantised.unpack_int8(quantised.pack_int8(int8), rows, columns), int8)
    odd = int8[:, : columns - 1]
    assert torch.equal(quantised.unpack_int8(quantised.pack_int8(odd), rows, columns - 1), odd)
    int4 = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=generator)
    packed = quantised.pack_int4(int4)
    assert packed.is_contiguous() and packed.numel() * 2 == -(-rows // 32) * 32 * columns
    assert torch.equal(quantised.unpack_int4(packed, rows), int4)
    assert torch.equal(quantised.unpack_scale(quantised.pack_scale(int8), rows), int8)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_shapes_are_known_without_values(weight, kind):
    made, said = quantised.quantise_packed(weight, kind, 32), quantised.quantise_packed_meta(weight, kind, 32)
    for found, expected in zip(made, said, strict=True):
        assert (found.shape, found.dtype, found.is_contiguous()) == (expected.shape, expected.dtype, True)


def test_a_shard_of_a_rounded_weight_is_the_rounded_shard(weight):
    """Tensor parallel ranks round their own rows, and for int4 their own groups, to what one rank would."""
    for values, shard in zip(quantise_int8(weight), quantise_int8(weight[32:64]), strict=True):
        assert torch.equal(values[32:64], shard)
    values, scale = quantise_int4(weight, 32)
    for rows, columns in ((slice(32, 64), slice(0, 96)), (slice(0, 70), slice(32, 96))):
        shard_values, shard_scale = quantise_int4(weight[rows, columns], 32)
        assert torch.equal(values[rows, columns], shard_values)
        assert torch.equal(scale[rows, columns.start // 32 :][: len(shard_scale)], shard_scale)


def test_an_odd_group_is_refused(weight):
    with pytest.raises(ValueError, match="reduction axis of 96 is no multiple of the group size 64"):
        quantise_int4(weight, 64)
