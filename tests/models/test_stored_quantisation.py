"""Quantised checkpoints of each format: read as they were written, and refused by field and value."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from tests.stored_checkpoints import (
    AWQ_ORDER,
    CONFIGS,
    DYNAMIC,
    compressed_config,
    pack_words,
    random_codes,
    stored_parts,
)
from xllm_compile.models.checkpoint import Checkpoint, CheckpointError
from xllm_compile.models.config import UnsupportedModelError
from xllm_compile.models.stored_quantisation import read_stored_quantisation

NAME = "model.layers.0.mlp.up_proj.weight"
# Words are not filled along the outputs of compressed-tensors, nor along its inputs in rows.
SHAPES = {
    "compressed int4, groups with zeros": (20, 64),
    "compressed int4, rows with zeros": (20, 44),
    "compressed int8, rows with zeros": (21, 46),
}


def read(config):
    return read_stored_quantisation({"quantization_config": config})


def written(folder, config, shape, parts=None):
    codes, zero, scale = random_codes(config, shape)
    tensors = stored_parts(config, NAME, codes, zero, scale) if parts is None else parts
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder), codes, zero, scale


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_written_is_read(name, tmp_path):
    config, shape = CONFIGS[name], SHAPES.get(name, (24, 64))
    checkpoint, codes, zero, scale = written(tmp_path, config, shape)
    stored = read(config)
    stored.check(checkpoint, {NAME: shape})
    matrix = stored.matrix(checkpoint, NAME)
    half = 1 << stored.num_bits - 1
    assert matrix.values.dtype == matrix.zero.dtype == torch.int8
    assert torch.equal(matrix.values.long() + half, codes)
    assert torch.equal(matrix.zero.long() + half, zero)
    assert torch.equal(matrix.scale, scale)
    # One rounding, that of the product to the scale's dtype.
    group_size = shape[1] // scale.shape[1]
    exact = (codes - zero.repeat_interleave(group_size, 1)).double() * scale.double().repeat_interleave(group_size, 1)
    assert torch.equal(matrix.dequantised(), exact.half())


@pytest.mark.parametrize(
    ("name", "scheme", "group_size"),
    [
        ("compressed int4, groups", "int4", 32),
        ("compressed int4, rows", "int4", 0),
        ("compressed int8, packed", "int8", 0),
        ("compressed int8, groups", "int8", 32),
        ("gptq int8", "int8", 32),
        ("compressed int8", "int8", 0),
        ("compressed int8, dynamic", "int8-dynamic", 0),
        ("awq", "int4", 32),
        ("gptq, one group", "int4", 0),
    ],
)
def test_schemes(name, scheme, group_size):
    stored = read(CONFIGS[name])
    assert (stored.scheme, stored.group_size) == (scheme, group_size)


def test_a_checkpoint_of_floats_has_none():
    assert read_stored_quantisation({}) is read_stored_quantisation({"quantization_config": None}) is None


def test_words_as_the_packages_make_them():
    """0 to 7 in a word of AutoAWQ and in one of everything else."""
    assert pack_words(torch.arange(8).view(1, 8), 4, AWQ_ORDER).item() == 0x75316420
    assert pack_words(torch.arange(8).view(1, 8), 4).item() == 0x76543210


def test_zero_points_of_gptq_are_stored_less_one(tmp_path):
    """And 0 as 15."""
    config = CONFIGS["gptq"]
    codes, _, scale = random_codes(config, (8, 32))
    parts = stored_parts(config, NAME, codes, torch.arange(8).view(8, 1), scale)
    assert parts[NAME.replace("weight", "qzeros")].item() == 0x6543210F
    checkpoint = written(tmp_path, config, (8, 32), parts)[0]
    assert (read(config).matrix(checkpoint, NAME).zero.flatten() + 8).tolist() == list(range(8))


def changed(name, path, value):
    config = copy.deepcopy(CONFIGS[name])
    at = config
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return config


GROUP = ("config_groups", "group_0")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "fp8"}, ["quant_method='fp8'", "compressed-tensors, awq, gptq", "--quantize"]),
        ({}, None),
        (changed("awq", ["version"], "gemv"), ["version='gemv'", "supported: gemm"]),
        (changed("awq", ["zero_point"], False), ["zero_point=False"]),
        (changed("awq", ["bits"], 8), ["bits=8", "supported: 4"]),
        (changed("awq", ["group_size"], 12), ["group_size=12", "multiples of 8"]),
        (changed("gptq", ["bits"], 3), ["bits=3", "supported: 4, 8"]),
        (changed("gptq", ["lm_head"], True), ["lm_head=True"]),
        (changed("gptq", ["dynamic"], {"-:x": {}}), ["dynamic="]),
        (changed("gptq", ["checkpoint_format"], "marlin"), ["checkpoint_format='marlin'", "gptq, gptq_v2"]),
        (compressed_config(8, "float-quantized"), ["format='float-quantized'", "pack-quantized, int-quantized"]),
        (compressed_config(8, type="float"), ["group_0.weights: type='float'", "supported: int"]),
        (compressed_config(3), ["num_bits=3", "supported: 4, 8"]),
        (
            compressed_config(8, "int-quantized", strategy="group", group_size=32),
            ["strategy='group'", "supported: channel"],
        ),
        (compressed_config(4, strategy="block"), ["strategy='block'", "group, channel"]),
        (compressed_config(8, "int-quantized", symmetric=False), ["symmetric=False"]),
        (compressed_config(4, strategy="group", group_size=32, actorder="group"), ["actorder='group'", "weight"]),
        (changed("compressed int8", ["kv_cache_scheme"], DYNAMIC), ["kv_cache_scheme="]),
        (
            changed("compressed int8, dynamic", [*GROUP, "input_activations", "dynamic"], False),
            ["group_0.input_activations: dynamic=False", "supported: True"],
        ),
        (changed("compressed int4, groups", [*GROUP, "input_activations"], DYNAMIC), ["input_activations={"]),
        (changed("compressed int8", ["config_groups"], {"a": {}, "b": {}}), ["2 groups (a, b)"]),
    ],
)
def test_what_is_not_supported_names_field_and_value(config, said):
    if said is None:
        assert read(config) is None
        return
    with pytest.raises(UnsupportedModelError) as error:
        read(config)
    assert [part for part in said if part not in str(error.value)] == []


def test_inputs_that_are_no_whole_groups():
    with pytest.raises(UnsupportedModelError, match=r"up_proj.weight has 40 inputs, no multiple of group_size=32"):
        read(CONFIGS["awq"]).parts(NAME, (24, 40))


def test_groups_in_the_order_of_activations_are_refused(tmp_path):
    config = CONFIGS["gptq"]
    parts = stored_parts(config, NAME, *random_codes(config, (24, 64)))
    index = NAME.replace("weight", "g_idx")
    parts[index] = parts[index].flip(0)
    checkpoint = written(tmp_path, config, (24, 64), parts)[0]
    with pytest.raises(
        UnsupportedModelError, match=r"up_proj.g_idx does not number the groups in order.*desc_act=false"
    ):
        read(config).check(checkpoint, {NAME: (24, 64)})


@pytest.mark.parametrize("name", ["awq", "compressed int4, groups"])
def test_a_product_that_is_not_quantised_is_named(name, tmp_path):
    checkpoint = written(tmp_path, CONFIGS[name], (24, 64), {NAME: torch.zeros(24, 64)})[0]
    with pytest.raises(CheckpointError, match=r"lacks tensor .*up_proj.*every product of every layer.*quantised alike"):
        read(CONFIGS[name]).check(checkpoint, {NAME: (24, 64)})
