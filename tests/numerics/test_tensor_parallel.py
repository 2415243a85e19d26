"""Two ranks on this machine, started by rank 0: greedy tokens against transformers, and how the ranks end."""

import os
import signal
from pathlib import Path

import pytest

from tests.helpers import COMPILE_OPTIONS, compile_model, greedy
from tests.numerics.test_parity import NUM_TOKENS, assert_parity, chains_of
from xllm_compile.runtime.artifact import read_manifest
from xllm_compile.runtime.follower import opened_instance
from xllm_compile.runtime.instance import InstanceConfig, open_instance

pytestmark = pytest.mark.numerics

# Heads cut in two; and one key/value head that both ranks hold, with a bias on every projection.
MODELS = {"qwen3": {}, "llama": {"num_key_value_heads": 1}}


@pytest.fixture(scope="module", params=list(MODELS))
def model_dir(request, tiny_model_dir) -> Path:
    return tiny_model_dir(request.param, **MODELS[request.param])


@pytest.fixture(scope="module")
def artifact(model_dir, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("tp") / "tp2.xllm"
    done = compile_model(model_dir, "-o", output, *COMPILE_OPTIONS, "--tensor-parallel-size", "2")
    assert done.returncode == 0, done.stderr
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
