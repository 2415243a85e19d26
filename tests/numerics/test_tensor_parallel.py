"""Two ranks on this machine, started by rank 0: greedy tokens against transformers, and how the ranks end."""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import COMPILE_OPTIONS, compile_model, eager_model, greedy
from tests.numerics.test_embeddings import expected_embeddings
from tests.numerics.test_parity import NUM_TOKENS, all_logits, assert_parity, chains_of, rms
from xllm_compile.benchmarks.parity import random_prompts
from xllm_compile.graph_passes.device_spec import device_spec
from xllm_compile.runtime.artifact import read_manifest, write_manifest
from xllm_compile.runtime.async_engine import AsyncEngine
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.follower import opened_instance
from xllm_compile.runtime.instance import open_instance
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.llm import LLMBase
from xllm_compile.runtime.pooling import PoolingParams
from xllm_compile.runtime.step import Step

pytestmark = pytest.mark.numerics

# Heads cut in two; and one key/value head that both ranks hold, with a bias on every projection.
MODELS = {"qwen3": {}, "llama": {"num_key_value_heads": 1}}


@pytest.fixture(scope="module", params=list(MODELS))
def model_dir(request, tiny_model_dir) -> Path:
    return tiny_model_dir(request.param, **MODELS[request.param])


@pytest.fixture(scope="module")
def artifact(model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tp")
    # A link so slow and launches so cheap that splitting a step pays even for a model this small.
    spec = folder / "spec.json"
    slow = replace(device_spec("cpu-avx2"), link_bytes_per_s=3e8, link_latency_s=0.0, launch_s=0.0)
    spec.write_text(json.dumps(slow.to_json()))
    output = folder / "tp2.xllm"
    options = (*COMPILE_OPTIONS, "--buckets", "4,129", "--device-spec", spec, "--tensor-parallel-size", "2")
    done = compile_model(model_dir, "-o", output, *options)
    assert done.returncode == 0, done.stderr
    assert read_manifest(output).split_buckets == (4, 129)
    return output


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def test_greedy_tokens(model_dir, artifact):
    chains = chains_of(model_dir, (1, 3, 4, 33, 130))
    before = children()
    with opened_instance(artifact, InstanceConfig(max_num_seqs=8)) as instance:
        assert len(children() - before) == 1
        prompts = [chain.prompt for chain in chains]
        assert_parity(chains, greedy(instance.engine, prompts, NUM_TOKENS))
        assert_parity(chains, [greedy(instance.engine, [prompt], NUM_TOKENS)[0] for prompt in prompts])
        assert_parity(chains[:4], greedy(instance.engine, prompts[:4], NUM_TOKENS))
        outcomes = {outcome for _, outcome, _ in instance.engine.stats().graph_cache.choices}
        assert outcomes == {"exact", "padded", "dynamic"}
    assert children() == before


def test_steps_in_halves_are_bitwise_those_in_one(artifact, tmp_path):
    whole = tmp_path / "whole.xllm"
    shutil.copytree(artifact, whole)
    write_manifest(whole, replace(read_manifest(whole), split_buckets=()))
    prompts = random_prompts((1, 3, 4, 33, 129, 127, 70), 4099)
    logits: dict[Path, list[Tensor]] = {artifact: [], whole: []}
    for root, seen in logits.items():
        with opened_instance(root, InstanceConfig(max_num_seqs=8, warm_up=True)) as instance:
            record_logits(instance.engine, seen)
            for batch in (*([prompt] for prompt in prompts), prompts[:3], prompts):
                greedy(instance.engine, batch, 4)
    for split, plain in zip(*logits.values(), strict=True):
        torch.testing.assert_close(split, plain, rtol=0, atol=0)


def record_logits(engine: Engine, seen: list[Tensor]) -> None:
    execute = engine._runner.execute

    def recorded(step: Step, on_layers: Callable[[], None] | None = None) -> Tensor:
        seen.append(execute(step, on_layers).clone())
        return seen[-1]

    engine._runner.execute = recorded  # type: ignore[method-assign]


def test_embeddings_of_whole_and_halved_steps(model_dir, artifact):
    """129 tokens run in halves, whose states are joined for it; 33 as a whole."""
    prompts = random_prompts((3, 4, 33, 129), 4099)
    params = PoolingParams(pooling="mean")
    with opened_instance(artifact, InstanceConfig(max_num_seqs=8)) as instance:
        llm = LLMBase(instance.engine)
        for prompt, expected in zip(prompts, expected_embeddings(model_dir, prompts, params), strict=True):
            (output,) = llm.embed(prompt, params)
            assert output.embedding is not None
            np.testing.assert_allclose(output.embedding, expected, rtol=1e-3, atol=2e-5)


def shared_memory_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss_Shmem:"))


@pytest.mark.parametrize("level", [1, 2])
def test_all_ranks_sleep_and_wake_up(artifact, level):
    prompts = random_prompts((3, 40, 129), 4099)
    before = children()
    with opened_instance(artifact, InstanceConfig(max_num_seqs=8)) as instance:
        (follower,) = children() - before
        expected = greedy(instance.engine, prompts, 8)
        awake = shared_memory_kib(follower)
        engine = AsyncEngine(instance.engine, instance.release_weights)
        try:
            asyncio.run(engine.sleep(level))
            assert all(count == 0 for state, count in engine.stats().kv_pages.items() if state != "free")
            engine.wake_up()
        finally:
            engine.shutdown()
        # The next step comes after the word to sleep.
        assert greedy(instance.engine, prompts[:1], 8) == expected[:1]
        assert shared_memory_kib(follower) < awake
        assert greedy(instance.engine, prompts, 8) == expected


@pytest.mark.parametrize("size", [3, 4])
def test_more_ranks(size, tiny_model_dir, tmp_path):
    """Run operator by operator: what is compiled does not depend on how many there are."""
    model_dir = tiny_model_dir("qwen3", num_attention_heads=12, num_key_value_heads=12, intermediate_size=120)
    output = tmp_path / "ranks.xllm"
    options = (*COMPILE_OPTIONS, "--graph-mode", "eager", "--tensor-parallel-size", str(size))
    done = compile_model(model_dir, "-o", output, *options)
    assert done.returncode == 0, done.stderr
    chains, before = chains_of(model_dir, (1, 4, 33)), children()
    with opened_instance(output, InstanceConfig(max_num_seqs=4)) as instance:
        assert len(children() - before) == size - 1
        assert_parity(chains, greedy(instance.engine, [chain.prompt for chain in chains], NUM_TOKENS))
    assert children() == before


def test_quantised_ranks(tiny_model_dir, tmp_path, kernels):
    """Each rank rounds its own part: products that are cut along their inputs have scales per rank."""
    model_dir = tiny_model_dir("qwen3", hidden_size=96, intermediate_size=128, head_dim=32)
    output = tmp_path / "int8.xllm"
    options = (*COMPILE_OPTIONS, "--graph-mode", "eager", "--tensor-parallel-size", "2", "--quantize", "int8")
    done = compile_model(model_dir, "-o", output, *options)
    assert done.returncode == 0, done.stderr
    quantised = [spec.name for program in read_manifest(output).programs for spec in program.weights if spec.quantised]
    assert len(quantised) == 8
    (prompt,) = random_prompts((20,), 4099)
    exact = all_logits(eager_model(model_dir, tmp_path), prompt)[-1:]
    seen: list[Tensor] = []
    with opened_instance(output, InstanceConfig(max_num_seqs=2)) as instance:
        record_logits(instance.engine, seen)
        greedy(instance.engine, [prompt], 1)
    # Rounding shows, and by no more than steps of 1/127 do.
    assert 1e-4 * rms(exact) < rms(seen[-1] - exact) < 0.05 * rms(exact)


def test_ranks_with_an_int8_kv_cache(tiny_model_dir, tmp_path, kernels):
    """Rows are rounded head by head, so whoever holds a head has the bytes that one rank would have."""
    model_dir = tiny_model_dir("qwen3")
    output = tmp_path / "int8-kv.xllm"
    options = (*COMPILE_OPTIONS, "--graph-mode", "eager", "--tensor-parallel-size", "2", "--kv-cache-dtype", "int8")
    done = compile_model(model_dir, "-o", output, *options)
    assert done.returncode == 0, done.stderr
    assert read_manifest(output).model.kv_cache_dtype == "int8"
    (prompt,) = random_prompts((130,), 4099)
    exact, of_one_rank = (
        all_logits(eager_model(model_dir, tmp_path, kv_cache_dtype=dtype), prompt)[-1:] for dtype in ("auto", "int8")
    )
    seen: list[Tensor] = []
    with opened_instance(output, InstanceConfig(max_num_seqs=2, kv_cache_dtype="int8")) as instance:
        record_logits(instance.engine, seen)
        greedy(instance.engine, [prompt], 1)
    # Rounding shows, and is the same but for codes that another order of summing tips over.
    assert rms(of_one_rank - exact) > 1e-4 * rms(exact)
    assert rms(seen[-1] - of_one_rank) < 0.3 * rms(of_one_rank - exact)


def test_ranks_share_their_graphs(artifact):
    """One graph per region and size, for every rank: the keys cover nothing that differs between two."""
    manifest = read_manifest(artifact)
    found = [(entry.region, tuple(sorted(entry.sizes.items()))) for entry in manifest.graphs]
    assert len(set(found)) == len(found) == len({entry.key for entry in manifest.graphs})
    assert {name for name, _ in found} == {program.name for program in (*manifest.programs, *manifest.split_programs)}


def test_each_rank_holds_its_part(artifact):
    manifest = read_manifest(artifact)
    assert manifest.model.num_kv_heads == 1
    assert [entry.path for entry in manifest.weights] == [
        "weights/rank0-of-2.safetensors",
        "weights/rank1-of-2.safetensors",
    ]
    assert manifest.weights[0].digest != manifest.weights[1].digest
    assert manifest.weights[0].num_bytes == manifest.weights[1].num_bytes
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2, this process is one of 1; start 2 ranks"):
        open_instance(artifact)


def test_a_dead_follower_is_an_error_of_the_step(artifact):
    before = children()
    with opened_instance(artifact) as instance:
        (follower,) = children() - before
        os.kill(follower, signal.SIGKILL)
        with pytest.raises(RuntimeError):
            greedy(instance.engine, [[1, 2, 3]], 2)
    assert children() == before
