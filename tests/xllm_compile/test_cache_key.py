"""What the key of a compiled graph and of a whole build cover, one ingredient at a time; and what they must not."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from tests.helpers import REPOSITORY
from xllm_compile import build_key, graph_jobs
from xllm_compile.build_config import BuildConfig
from xllm_compile.graph_jobs import bucket_sizes, graph_job, list_jobs
from xllm_compile.graph_passes.quantisation import Quantisation
from xllm_compile.progress import NoProgress
from xllm_compile.region_programs import make_programs
from xllm_compile.runtime.ops import SCHEMAS
from xllm_compile.source_reader import read_source
from xllm_compile.targets import cpu, lowering_for


@pytest.fixture(scope="module")
def layer(tiny_model_dir):
    """layer(dtype="bfloat16"): the program of a layer, with those options of the build."""
    model = tiny_model_dir("qwen3")

    def make(**options):
        config = BuildConfig(model_dir=model, output=model / "unused.xllm", **{"dtype": "float32", **options})
        programs, _ = make_programs(read_source(config), config, NoProgress())
        return next(program for program in programs if program.name.startswith("layer"))

    return make


def key_of(program, tokens=4):
    return graph_job(program, bucket_sizes(program, tokens), lowering_for("cpu")).key


def compiler(folder, version):
    """A compiler that only says which it is."""
    folder.mkdir(exist_ok=True)
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\necho 'cxx {version}'\n")
    path.chmod(0o755)
    return str(path)


def test_every_ingredient_of_a_graph_makes_a_miss(layer, tmp_path, monkeypatch):
    program = layer()
    monkeypatch.setenv("CXX", compiler(tmp_path, "1"))
    keys = {
        "as it is": key_of(program),
        "bucket": key_of(program, tokens=5),
        "dtype": key_of(layer(dtype="bfloat16")),
        "pass left out": key_of(layer(disabled_passes=frozenset({"silu_mul"}))),
        "pass asked for": key_of(layer(quantisation=Quantisation(scheme="int4"))),
        "option of a pass": key_of(layer(quantisation=Quantisation(scheme="int8"))),
        "pieces": key_of(layer(graph_mode="partial")),
        "type of the KV cache": key_of(layer(kv_cache_dtype="int8")),
        "share of a rank": key_of(layer(tensor_parallel_size=2)),
        "program": key_of(replace(program, code=program.code.replace("1e-06", "1e-05"))),
        "dynamic": graph_job(program, {}, lowering_for("cpu")).key,
    }
    with monkeypatch.context() as changed:
        changed.setattr(torch, "__version__", torch.__version__ + ".post1")
        keys["torch"] = key_of(program)
    with monkeypatch.context() as changed:
        changed.setattr(cpu, "isa_features", lambda: ("avx2",))
        keys["CPU feature"] = key_of(program)
    with monkeypatch.context() as changed:
        changed.setenv("CXX", compiler(tmp_path, "2"))
        keys["compiler"] = key_of(program)
    with monkeypatch.context() as changed:
        options = cpu.inductor_options
        changed.setattr(cpu, "inductor_options", lambda **given: {**options(**given), "max_autotune": True})
        keys["option of inductor"] = key_of(program)
    with monkeypatch.context() as changed:
        schema = SCHEMAS["silu_mul"].replace("gate_up", "gate_up, bool is_exact")
        changed.setattr(graph_jobs, "SCHEMAS", {**SCHEMAS, "silu_mul": schema})
        keys["schema of an operator it calls"] = key_of(program)
    same = [pair for pair in zip(keys, keys.values(), strict=True) if list(keys.values()).count(pair[1]) > 1]
    assert not same


def test_what_does_not_matter_to_a_graph_is_a_hit(layer, tmp_path, monkeypatch):
    program = layer()
    monkeypatch.setenv("CXX", compiler(tmp_path / "one", "1"))
    before = key_of(program)
    # The same compiler somewhere else.
    monkeypatch.setenv("CXX", compiler(tmp_path / "two", "1"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    monkeypatch.setattr(platform, "node", lambda: "another")
    monkeypatch.setattr(graph_jobs, "SCHEMAS", {**SCHEMAS, "of_another_model": "(Tensor x) -> Tensor"})
    assert key_of(program) == before
    assert key_of(layer(max_num_batched_tokens=77, jobs=1)) == before
    # Depth is not in it: layers of one kind share a graph.
    assert key_of(replace(program, layers=(0,))) == before


def test_all_ranks_run_the_same_graphs(layer):
    """Of a region and a bucket there is one graph, however many ranks there are: what differs is their weights."""
    files = []
    for size in (1, 2):
        jobs = list_jobs([layer(tensor_parallel_size=size)], (1, 4), (), lowering_for("cpu"))
        files.append([job.file for job in jobs])
        assert len({job.key for job in jobs}) == len(jobs)
    assert files[0] == files[1] == [f"graphs/layer-{which}.so" for which in ("dynamic", "T1", "T4")]


SCRIPT = """
import json, sys
from pathlib import Path
from xllm_compile import build_key
from xllm_compile.region_programs import make_programs
from xllm_compile.source_reader import read_source
from xllm_compile.build_config import BuildConfig
from xllm_compile.graph_jobs import bucket_sizes, graph_job
from xllm_compile.progress import NoProgress
from xllm_compile.targets import lowering_for
config = BuildConfig(model_dir=Path(sys.argv[1]), output=Path("x.xllm"), dtype="float32")
programs, _ = make_programs(read_source(config), config, NoProgress())
jobs = {p.name: graph_job(p, bucket_sizes(p, 4), lowering_for("cpu")).key for p in programs if p.layers}
print(json.dumps([build_key._sources_hash(), jobs]))
"""


@pytest.fixture
def checkout(tmp_path):
    """checkout(path, old, new): the keys found by a copy of the sources with that one edit."""
    for part in ("xllm_compile", "graph_passes", "models", "runtime", "scheduler", "benchmarks"):
        ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", "results")
        shutil.copytree(REPOSITORY / part, tmp_path / part, symlinks=True, ignore=ignore)

    def keys(model, path, old, new):
        source = tmp_path / path
        text = source.read_text()
        assert old in text
        source.write_text(text.replace(old, new))
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(model)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        source.write_text(text)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return keys


def test_the_source_of_a_pass(checkout, layer, tiny_model_dir):
    """Any edit is a new build; graphs are compiled anew exactly where the edit changes their program."""
    model, here = tiny_model_dir("qwen3"), key_of(layer())
    sources, graphs = checkout(model, "graph_passes/silu_mul.py", "Numerics:", "Numerics :")
    assert sources != build_key._sources_hash()
    assert graphs == {"layer": here}
    edited = checkout(model, "graph_passes/merge_linear.py", "< 2", "< 3")
    assert edited[0] != sources and edited[1] != graphs
