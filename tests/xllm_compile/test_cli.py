"""xllm-compile as a command: what is refused, with one line and exit code 2."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import compile_model
from xllm_compile.cli import main


@pytest.fixture
def model(tiny_model_dir, tmp_path):
    """A copy of a small checkpoint, free to be damaged."""
    return shutil.copytree(tiny_model_dir("qwen3"), tmp_path / "model")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run the command in this process; returns its one line."""

    def run(*args):
        monkeypatch.setattr("sys.argv", ["xllm-compile", *map(str, args)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        assert exit_.value.code == 2
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("xllm-compile: error: ")
        return line

    return run


def assert_all_in(parts, line):
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--buckets", "1,x"], ["'1,x'", "such as 1,4,16,512"]),
        (["--buckets", "0"], ["bucket 0", "[1, max_num_batched_tokens=512]"]),
        (["--buckets", "1", "--workload", "w.csv"], ["exclude each other"]),
        (["--workload", "w.csv"], ["w.csv does not exist"]),
        (["--target", "tpu"], ["'tpu'", "available: cpu"]),
        (["--dtype", "int4"], ["int4", "bfloat16"]),
        (["--max-model-len", "99999"], ["99999", "limit of 2304 positions; lower it"]),
        (["--max-model-len", "many"], ["--max-model-len", "many"]),
        (["--disable-pass", "silu"], ["'silu'", "silu_mul", "cube_vector_balance"]),
        (["--disable-pass", "memory_plan"], ["'memory_plan' cannot be left out"]),
        (["--graph-mode", "partial", "--disable-pass", "partition"], ["--graph-mode partial", "leave out one"]),
        (["--disable-pass", "merge_linear"], ["'merge_linear' cannot be left out"]),
        (["--quantize", "fp8"], ["'fp8'", "int8-dynamic"]),
        (["--quantize", "int8", "--quantize-group", "32"], ["quantize-group=32 is for int4 and int4-dynamic only"]),
        (["--quantize", "int4", "--quantize-group", "64"], ["quantize-group=64", "supported: 32, 128"]),
        (["--quantize", "int8", "--disable-pass", "quantise"], ["leave out one of the two"]),
        (
            ["--quantize-head"],
            ["--quantize-head needs --quantize int8, int4, int8-dynamic or int4-dynamic"],
        ),
        (["--quantize-group", "32"], ["--quantize-group needs --quantize int4 or int4-dynamic"]),
        (["--jobs", "0"], ["jobs=0"]),
        (["--colour"], ["--colour", "--help"]),
    ],
)
def test_bad_options(model, refused, tmp_path, options, said):
    assert_all_in(said, refused(model, "-o", tmp_path / "out.xllm", *options))
    assert not (tmp_path / "out.xllm").exists()


def edit_config(model, **changes):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def remove_tensor(model):
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.norm.weight")
    save_file(tensors, path)


def reshape_tensor(model):
    path = model / "model.safetensors"
    save_file(load_file(path) | {"model.norm.weight": torch.ones(7)}, path)


def truncate(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def only_bin(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, ["is no directory", "give a Hugging Face model directory"]),
        (lambda model: (model / "config.json").unlink(), ["no config.json"]),
        (lambda model: (model / "config.json").write_text("{"), ["not valid JSON", "fetch"]),
        (lambda model: (model / "tokenizer.json").unlink(), ["no tokenizer.json", "save_pretrained"]),
        (lambda model: edit_config(model, architectures=["X"]), ["'X'", "Qwen3ForCausalLM"]),
        (lambda model: edit_config(model, rope_parameters={"rope_type": "longrope"}), ["'longrope'", "yarn"]),
        (
            lambda model: edit_config(model, quantization_config={"quant_method": "fp8"}),
            ["'fp8'", "compressed-tensors, awq, gptq", "bfloat16", "--quantize"],
        ),
        (lambda model: edit_config(model, num_hidden_layers=4, layer_types=None), ["lacks tensor model.layers.3."]),
        (remove_tensor, ["lacks tensor model.norm.weight", "do not belong together"]),
        (reshape_tensor, ["model.norm.weight has shape [7]", "[72]"]),
        (truncate, ["truncated or damaged", "fetch"]),
        (only_bin, ["pytorch_model.bin", "convert"]),
    ],
)
def test_bad_models(model, refused, tmp_path, damage, said):
    damage(model)
    assert_all_in(said, refused(model, "-o", tmp_path / "out.xllm"))
    assert not (tmp_path / "out.xllm").exists()


def test_output_that_cannot_be_written(model, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_all_in([f"{tmp_path}/file", "check the path"], refused(model, "-o", tmp_path / "file" / "out.xllm"))
    assert (tmp_path / "file").read_text() == "mine"


def test_output_that_is_something_else(model, refused, tmp_path):
    """It would be replaced, so it is left alone."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "folder", model):
        assert_all_in([f"{output} exists and is no artifact"], refused(model, "-o", output))
    assert (tmp_path / "folder" / "file").read_text() == (tmp_path / "file").read_text() == "mine"
    assert (model / "model.safetensors").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_without_permission(model, refused, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    assert_all_in(["Permission denied", "check the path"], refused(model, "-o", folder / "out.xllm"))


def test_cache_that_cannot_be_written(model, refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert_all_in(["cannot write the graph cache", "XDG_CACHE_HOME"], refused(model, "-o", tmp_path / "out.xllm"))


def test_no_compiler(model, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_all_in(["'g++'", "PATH", "install g++"], refused(model, "-o", tmp_path / "out.xllm"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert_all_in(["'no-such-compiler'", "set CXX"], refused(model, "-o", tmp_path / "out.xllm"))


@pytest.fixture
def small_disk(tmp_path):
    """6 MiB; a mount needs root."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_disk_too_small(model, refused, small_disk):
    assert_all_in(["MiB are free there", "free some space"], refused(model, "-o", small_disk / "out.xllm"))
    assert list(small_disk.iterdir()) == []


def test_the_real_command_prints_no_traceback(model, tmp_path):
    done = compile_model(model, "-o", tmp_path / "out.xllm", "--disable-pass", "silu")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("xllm-compile: error: no pass is named 'silu'")


@pytest.mark.parametrize(
    ("mode", "ending"),
    [
        ("full", "Each layer region runs once per layer; its graphs are compiled once."),
        ("eager", "With --graph-mode eager no graph is compiled: steps run operator by operator."),
    ],
)
def test_explain_compiles_nothing(model, tmp_path, capsys, monkeypatch, mode, ending):
    arguments = ["xllm-compile", str(model), "-o", str(tmp_path / "out.xllm"), "--explain", "--buckets", "1,4"]
    arguments += ["--graph-mode", mode]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as exit_:
        main()
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    said = ["merge_linear", "2 (23 -> 22)", "Passes not run", "xllm.qkv_rope_write.default", "Token buckets [1, 4]"]
    assert_all_in(said, " ".join(out.split()))
    assert " ".join(out.split()).endswith(ending)
    assert not (tmp_path / "out.xllm").exists()
