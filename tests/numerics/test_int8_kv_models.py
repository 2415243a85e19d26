"""Whole models with an int8 KV cache: near those without, and the same tokens whichever way the KV goes."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.helpers import DEMO_MODEL, EagerModel, eager_model, greedy
from tests.numerics.test_parity import all_logits, rms
from xllm_compile import LLM
from xllm_compile.benchmarks.parity import random_prompts
from xllm_compile.machine import cache_dir
from xllm_compile.runtime.artifact import read_manifest
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.memory.kv_tiers import DiskTier, KVTiers
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.speculative.adaptive import StepSeconds
from xllm_compile.runtime.speculative.speculator import Speculator
from xllm_compile.runtime.speculative.suffix import SuffixProposer

pytestmark = pytest.mark.numerics

LENGTHS = (1, 7, 33, 64, 300)
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def model(tiny_model_dir, tmp_path_factory, kernels) -> EagerModel:
    return eager_model(tiny_model_dir("qwen3"), tmp_path_factory.mktemp("qwen3"), kv_cache_dtype="int8")


@pytest.fixture(scope="module")
def prompts(model) -> list[list[int]]:
    return random_prompts(LENGTHS, model.manifest.model.vocab_size)


@pytest.fixture(scope="module")
def expected(model, prompts) -> list[list[int]]:
    """Each prompt alone on an engine of its own."""
    return [greedy(model.engine(), [prompt], NUM_TOKENS)[0] for prompt in prompts]


def engine_with(model: EagerModel, num_tokens: int, **options: Any) -> Engine:
    """An engine whose cache holds few tokens."""
    kv_cache = KVCache(
        KVCacheConfig(
            num_layers=model.manifest.model.num_layers,
            num_kv_heads=model.manifest.model.num_kv_heads,
            head_dim=model.manifest.model.head_dim,
            dtype=torch.int8,
            max_model_len=400,
            num_slots=8,
            kv_memory_bytes=num_tokens * model.manifest.model.kv_bytes_per_token,
            page_bytes=4096,
        ),
        **options,
    )
    return Engine(model.runner(kv_cache.layers, max_num_batched_tokens=50), kv_cache, model.tokenizer)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_logits_are_near_and_rounding_shows(family, tiny_model_dir, tmp_path, kernels):
    model_dir = tiny_model_dir(family)
    plain, ours = (eager_model(model_dir, tmp_path, kv_cache_dtype=dtype) for dtype in ("auto", "int8"))
    (prompt,) = random_prompts((300,), ours.manifest.model.vocab_size)
    exact, found = (all_logits(each, prompt) for each in (plain, ours))
    # Codes are off by 0.4% of a row's largest element at most, which random weights make more of.
    assert 1e-4 * rms(exact) < rms(found - exact) < 0.05 * rms(exact)


@pytest.mark.parametrize("chunk", [13, 64, 512])
def test_chunks_and_batches(model, prompts, expected, chunk):
    assert greedy(model.engine(max_num_batched_tokens=chunk), prompts, NUM_TOKENS) == expected


def test_prefixes_are_shared(model, prompts, expected):
    engine = model.engine()
    for _ in range(2):
        assert greedy(engine, prompts, NUM_TOKENS) == expected
    assert engine.stats().prefix_hit_tokens == sum((length - 1) // 16 * 16 for length in LENGTHS)


@pytest.mark.parametrize("swap_bytes", [None, 1 << 24])
def test_preemption(model, swap_bytes, monkeypatch):
    monkeypatch.setattr("xllm_compile.runtime.step_planner.swap_pays", lambda *_: True)
    # Admission looks 64 steps ahead: three of these start, and two have room to the end.
    engine = engine_with(model, 420, swap_bytes=swap_bytes)
    prompts = random_prompts((40,) * 5, model.manifest.model.vocab_size)
    alone = [greedy(model.engine(), [prompt], 110)[0] for prompt in prompts]
    assert greedy(engine, prompts, 110) == alone
    stats = engine.stats()
    assert stats.num_preemptions > 0 and bool(stats.num_swaps) == (swap_bytes is not None)


def test_blocks_come_back_from_a_tier(model, prompts, expected):
    tiers = KVTiers(host_bytes=1 << 24)
    engine = engine_with(model, 420, tiers=tiers)
    for _ in range(2):
        for prompt, tokens in zip(prompts, expected, strict=True):
            assert greedy(engine, [prompt], NUM_TOKENS) == [tokens]
    assert tiers.stats.num_restored > 0
    engine.close()


def test_the_next_start_finds_on_disk_what_the_last_one_left(model, prompts, expected, tmp_path):
    """The first has room for no block in host memory, so whatever loses its pages goes to disk."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=NUM_TOKENS)
    for is_first in (True, False):
        disk = DiskTier(tmp_path, max_bytes=1 << 24, layout="int8 rows")
        tiers = KVTiers(host_bytes=1 if is_first else 1 << 24, disk=disk)
        engine = engine_with(model, 420, tiers=tiers)
        for _ in range(2 if is_first else 1):
            for prompt, tokens in zip(prompts, expected, strict=True):
                request = engine.make_request("r", prompt, params)
                reading = engine.prefetch(request)
                if reading is not None:
                    reading.result()
                engine.add(request)
                found = []
                while engine.has_work:
                    found += engine.step()
                assert found[-1].outputs[0].token_ids == tokens
        engine.close()
        assert tiers.stats.num_damaged == 0
    assert tiers.stats.num_restored > 0


def test_speculation(model, prompts, expected):
    speculator = Speculator(
        SuffixProposer(max_shared_tokens=1000),
        max_length=6,
        step_seconds=StepSeconds(lambda rows: 1 + 0.01 * rows),
        clock=lambda: 0.0,
    )
    engine = model.engine(speculator=speculator)
    for _ in range(2):
        assert greedy(engine, prompts, NUM_TOKENS) == expected
    stats = speculator.stats()
    assert stats is not None and stats.num_accepted_tokens > 0


def test_compiled(int8_kv_artifact, prompts, expected, kernels):
    model = read_manifest(int8_kv_artifact).model
    assert (model.dtype, model.kv_cache_dtype) == ("float32", "int8")
    assert model.kv_bytes_per_token == 3 * 2 * 2 * (24 + 4)
    llm = LLM(int8_kv_artifact, max_num_seqs=8, kv_cache_dtype="int8")
    assert greedy(llm.engine, prompts, NUM_TOKENS) == expected
    assert [greedy(llm.engine, [prompt], NUM_TOKENS)[0] for prompt in prompts] == expected
    counts = llm.engine.stats().graph_cache.by_outcome()
    assert counts["exact"] + counts["padded"] and counts["dynamic"] and not counts["eager"]


def test_a_promoted_graph_is_checked_against_its_program(int8_kv_artifact):
    command = [sys.executable, "-m", "xllm_compile.promote", str(int8_kv_artifact), "--tokens", "6"]
    done = subprocess.run(
        [*command, "--store", str(cache_dir() / "graphs")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_demo_code_says_the_same(tmp_path, kernels):
    """In bfloat16, which changes more by itself: rounding KV to int8 leaves most greedy tokens as they were."""
    prompts = [
        "class Stack:\n    def push(self, item):\n        self.items.append(item)\n\n    def pop(self):\n",
        "def read_lines(path):\n    ",
        "import os\nimport sys\n\n\ndef main():\n",
        "for index, value in enumerate(values):\n",
    ]
    outputs = []
    for dtype in ("auto", "int8"):
        (tmp_path / dtype).mkdir()
        model = eager_model(DEMO_MODEL, tmp_path / dtype, dtype="bfloat16", kv_cache_dtype=dtype)
        ids = [model.tokenizer.encode(prompt) for prompt in prompts]
        outputs.append(greedy(model.engine(), ids, 16))
    same = sum(a == b for plain, ours in zip(*outputs, strict=True) for a, b in zip(plain, ours, strict=True))
    assert same >= 0.8 * 16 * len(prompts)
