"""Checkpoints on disk, whole and damaged in every way seen so far."""

import json

import pytest
import torch
from safetensors.torch import save_file

from xllm_compile.models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, CheckpointError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
SHAPES = {"a": (2, 3), "b": (4,)}


@pytest.fixture
def single(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    write_index(tmp_path, {name: f"{name}.safetensors" for name in TENSORS})
    return tmp_path


def write_index(folder, weight_map):
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder, *said, shapes=SHAPES):
    with pytest.raises(CheckpointError) as error:
        Checkpoint(folder).check(shapes)
    assert [part for part in said if part not in str(error.value)] == []


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_a_whole_checkpoint(kind, request):
    checkpoint = Checkpoint(request.getfixturevalue(kind))
    checkpoint.check(SHAPES)
    for name, tensor in TENSORS.items():
        assert checkpoint.tensor(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_the_hash_is_of_content_alone(single, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save_file(TENSORS, elsewhere / SINGLE_FILE)
    assert Checkpoint(single).content_hash() == Checkpoint(elsewhere).content_hash()
    save_file(TENSORS | {"b": torch.zeros(4, dtype=torch.bfloat16)}, elsewhere / SINGLE_FILE)
    assert Checkpoint(single).content_hash() != Checkpoint(elsewhere).content_hash()


def test_missing_tensor(single):
    refused(single, "lacks tensor c of shape [2]", "do not belong together", shapes=SHAPES | {"c": (2,)})


def test_wrong_shape(single):
    refused(single, "tensor a has shape [2, 3]", "asks for [3, 2]", shapes=SHAPES | {"a": (3, 2)})


def test_wrong_dtype(single):
    save_file(TENSORS | {"a": torch.ones(2, 3, dtype=torch.int8)}, single / SINGLE_FILE)
    refused(single, "tensor a has dtype I8", "BF16, F16, F32", "unquantised")


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_shard(sharded, keep):
    path = sharded / "b.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(sharded, "b.safetensors", "truncated or damaged", "fetch the checkpoint again")


def test_shard_that_the_index_names_is_missing(sharded):
    (sharded / "b.safetensors").unlink()
    refused(sharded, "lacks 1 shards", "b.safetensors", "fetch the checkpoint again")


def test_index_that_names_the_wrong_shard(sharded):
    write_index(sharded, {"a": "b.safetensors", "b": "b.safetensors"})
    refused(sharded, "places a in b.safetensors")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "\xff"])
def test_index_that_is_none(sharded, text):
    (sharded / INDEX_FILE).write_bytes(text.encode("latin-1"))
    refused(sharded, INDEX_FILE, "fetch the checkpoint again")


def test_no_safetensors(tmp_path):
    refused(tmp_path, "found nothing", "convert the checkpoint to safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path, "found pytorch_model.bin", "convert the checkpoint to safetensors")
