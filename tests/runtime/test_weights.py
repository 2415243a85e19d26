"""The weights file: what is built from a checkpoint comes back, in place, from the mapping."""

import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xllm_compile.models.checkpoint import Checkpoint
from xllm_compile.runtime.artifact import ArtifactMismatchError
from xllm_compile.runtime.ops.reference import pack_weight
from xllm_compile.runtime.ops.spec import TensorSpec, WeightSpec
from xllm_compile.runtime.program import RegionProgram
from xllm_compile.runtime.weights import map_weights, release_weights, write_weights
from xllm_compile.weight_builder import artifact_weights, build_weights, weights_key


def spec(name, *sources, shape, dtype="float32", is_packed=False):
    return WeightSpec(name=name, sources=sources or (name,), shape=shape, dtype=dtype, is_packed=is_packed)


SPECS = [
    spec("odd", shape=(3,), dtype="bfloat16"),
    spec("merged", "left", "right", shape=(7, 5)),
    spec("packed", "left", "right", shape=(1, 5, 32), is_packed=True),
    spec("packed16", "left", shape=(1, 3, 32, 2), dtype="bfloat16", is_packed=True),
    spec("rope.inv_freq", shape=(4,)),
]
SOURCES = {
    "odd": torch.randn(3, generator=torch.Generator().manual_seed(1)),
    "left": torch.randn(4, 5, generator=torch.Generator().manual_seed(2)),
    "right": torch.randn(3, 5, generator=torch.Generator().manual_seed(3)).half(),
}
COMPUTED = {"rope.inv_freq": torch.tensor([1.0, 0.5, 0.25, 0.125])}


@pytest.fixture
def file(tmp_path) -> Path:
    save_file(SOURCES, tmp_path / "model.safetensors")
    seen: list[int] = []
    path = tmp_path / "weights"
    build_weights(path, Checkpoint(tmp_path), COMPUTED, SPECS, seen.append)
    assert sum(seen) == sum(tensor.nbytes for tensor in map_weights(path).values())
    return path


def test_round_trip(file):
    merged = torch.cat([SOURCES["left"], SOURCES["right"].float()])
    expected = {
        "odd": SOURCES["odd"].bfloat16(),
        "merged": merged,
        "packed": pack_weight(merged),
        "packed16": pack_weight(SOURCES["left"].bfloat16()),
        **COMPUTED,
    }
    found = map_weights(file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    # Any other reader of safetensors agrees.
    assert all(torch.equal(load_file(file)[name], tensor) for name, tensor in expected.items())


def test_packed_tensors_start_on_a_cache_line_and_nothing_is_copied(file):
    found = map_weights(file)
    begins, ends = mapped_range(file)
    for item in SPECS:
        tensor = found[item.name]
        assert begins <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= ends
        if item.is_packed:
            assert tensor.data_ptr() % 64 == 0
        assert tensor.data_ptr() % tensor.element_size() == 0


def mapped_range(file):
    """Addresses at which the kernel says the file is mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    (low, high) = (int(part, 16) for part in lines[-1][0].split("-"))
    assert high - low == -(-file.stat().st_size // mmap.PAGESIZE) * mmap.PAGESIZE
    return low, high


def test_the_mapping_outlives_the_file_and_the_other_tensors(file):
    tensor = map_weights(file)["merged"]
    file.unlink()
    assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("from_cache", [False, True])
def test_weights_that_were_given_back_come_again(tmp_path, from_cache):
    path = tmp_path / "large.safetensors"
    large = spec("large", shape=(1 << 18,))
    write_weights(
        path,
        [large, spec("odd", shape=(3,), dtype="bfloat16")],
        lambda each: torch.ones(each.shape).to(getattr(torch, each.dtype)),
    )
    weights = map_weights(path)
    assert weights["large"].sum() == 1 << 18
    before = _resident_kib(weights["large"])
    release_weights(weights, path, from_cache=from_cache)
    assert before >= 1024 and _resident_kib(weights["large"]) == 0
    assert weights["large"].sum() == 1 << 18 and weights["odd"].sum() == 3


def _resident_kib(tensor):
    """Of the mapping that the tensor lies in, as the system counts it."""
    address, found = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            begin, end = (int(part, 16) for part in words[0].split("-"))
            found = begin <= address < end
        elif found and words[0] == "Rss:":
            return int(words[1])
    raise AssertionError("the tensor lies in no mapping")


@pytest.mark.parametrize("damage", [lambda b: b[:6], lambda b: b[:200], lambda b: b[:-1], lambda b: b"\xff" * len(b)])
def test_damage_is_named(file, damage):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ArtifactMismatchError, match=rf"{file} is damaged.*rebuild"):
        map_weights(file)


def test_a_tensor_that_is_not_what_its_spec_says_is_our_bug(tmp_path):
    with pytest.raises(AssertionError, match="odd was made as"):
        write_weights(tmp_path / "weights", SPECS[:1], lambda item: torch.zeros(4))


def program(name, layers, *weights):
    inputs = (TensorSpec(name="x", shape=("T",), dtype="int32"),)
    return RegionProgram(name=name, code="", inputs=inputs, weights=weights, layers=layers)


def test_layers_get_their_own_weights_and_regions_share_theirs():
    shared = spec("embed", shape=(2,))
    of_layer = spec("layers.{layer}.w", "layers.{layer}.a", "layers.{layer}.b", shape=(2,))
    programs = [program("embed", (), shared), program("layer", (0, 2), of_layer), program("head", (), shared)]
    assert [(item.name, item.sources) for item in artifact_weights(programs)] == [
        ("embed", ("embed",)),
        ("layers.0.w", ("layers.0.a", "layers.0.b")),
        ("layers.2.w", ("layers.2.a", "layers.2.b")),
    ]
    with pytest.raises(AssertionError, match="regions disagree on weight embed"):
        artifact_weights([*programs, program("other", (), spec("embed", shape=(3,)))])


def test_the_key_covers_content_layout_and_constants():
    keys = {
        weights_key("hash", SPECS, COMPUTED),
        weights_key("other", SPECS, COMPUTED),
        weights_key("hash", SPECS[1:], COMPUTED),
        weights_key("hash", SPECS, {"rope.inv_freq": COMPUTED["rope.inv_freq"] * 2}),
    }
    assert len(keys) == 4
    assert weights_key("hash", SPECS[::-1], COMPUTED) in keys
