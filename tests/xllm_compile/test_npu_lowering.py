"""The NPU target without torch_npu; with it, tests/npu."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers import DEMO_MODEL, compile_model
from xllm_compile.build_config import BuildConfig
from xllm_compile.runtime.program import RegionProgram
from xllm_compile.targets import lowering_for
from xllm_compile.targets.npu.lowering import MAX_NUM_SEQS
from xllm_compile.targets.npu.null_device import NullDeviceError, _assembly

without_torch_npu = pytest.mark.skipif(find_spec("torch_npu") is not None, reason="torch_npu is here")


def program(name):
    return RegionProgram(name=name, code="", inputs=(), weights=(), layers=())


@without_torch_npu
def test_without_torch_npu_the_error_names_the_next_step(tmp_path):
    with pytest.raises(NullDeviceError, match=re.escape("pip install 'xllm-compile[npu]'")):
        lowering_for("npu").check()
    done = compile_model(DEMO_MODEL, "-o", tmp_path / "demo.xllm", "--target", "npu")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("xllm-compile: error: target npu needs torch_npu, which this Python does not have")
    assert not (tmp_path / "demo.xllm").exists()


def test_what_the_passes_do_is_explained_anywhere():
    done = compile_model(DEMO_MODEL, "--target", "npu", "--explain")
    assert done.returncode == 0, done.stderr
    assert "lower_npu" in done.stdout and "npu.npu_add_rms_norm.default" in done.stdout


def test_every_shape_is_fixed():
    lowering = lowering_for("npu")
    assert lowering.graph_sizes(program("layer"), [4, 512], [4, 64]) == [
        {"T": 4, "S": 4},
        # Padding rows are one sequence more than there can be.
        {"T": 512, "S": MAX_NUM_SEQS + 1},
    ]
    assert lowering.graph_sizes(program("embed"), [4], [4]) == [{"T": 4, "S": 4}]
    # The head reads rows of the buffers of the largest bucket.
    assert lowering.graph_sizes(program("head"), [4, 512], [4, 64]) == [{"R": 4, "T": 512}, {"R": 64, "T": 512}]
    assert lowering.logits_buckets([1, 16, 100, 512]) == (1, 16, 64)


def test_options_that_the_target_does_not_have():
    def config(**options):
        return BuildConfig(model_dir=Path("model"), output=Path("out"), target="npu", **options)

    assert config(buckets=(8, 64), max_num_batched_tokens=64).target == "npu"
    with pytest.raises(ValueError, match="give a bucket of max_num_batched_tokens=512 too"):
        config(buckets=(8,))
    with pytest.raises(ValueError, match="graph_mode='partial' is not built for target npu"):
        config(graph_mode="partial")
    with pytest.raises(ValueError, match="kv_cache_dtype=int8 is for the cpu target; leave it out"):
        config(kv_cache_dtype="int8")
    with pytest.raises(ValueError, match="target 'tpu' is not built yet; available: cpu, npu"):
        BuildConfig(model_dir=Path("model"), output=Path("out"), target="tpu")


def test_trampolines_are_weak_and_traced():
    text = _assembly(["aclInit", "HcclAllReduce"])
    assert text.count(".weak aclInit") == text.count('.asciz "HcclAllReduce"') == 1
    assert text.count("jmp null_npu_call@PLT") == 2
