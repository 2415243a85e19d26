"""Random checkpoints, and engines that run their programs operator by operator on the real kernels."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xllm_compile.benchmarks.parity import save_random_model
from xllm_compile.build_config import BuildConfig
from xllm_compile.build_key import compiler_version
from xllm_compile.build_plan import Source
from xllm_compile.graph_passes.step_cost import StepTimes
from xllm_compile.graph_store import GraphStore, graph_key
from xllm_compile.machine import cache_dir
from xllm_compile.models.rope import rope_constants
from xllm_compile.models.tensor_parallel import rank_shape
from xllm_compile.progress import NoProgress
from xllm_compile.region_programs import make_programs
from xllm_compile.runtime import artifact
from xllm_compile.runtime.artifact import FileEntry, Manifest, ModelInfo
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.llm import LLMBase
from xllm_compile.runtime.model_runner import CompiledModelRunner
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.program import RegionProgram
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.speculative.speculator import Speculator
from xllm_compile.runtime.tokenizer import Tokenizer
from xllm_compile.runtime.weights import map_weights
from xllm_compile.source_reader import read_source
from xllm_compile.weight_builder import artifact_weights, build_weights

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO_MODEL = REPOSITORY / "models" / "demo" / "demo-code"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

# No size is a multiple of the kernels' blocks, and head_dim is not hidden_size / num_attention_heads.
_SHAPE: dict[str, Any] = {
    "vocab_size": 4099,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2304,
}
# One checkpoint per family that uses everything the family adds to a plain decoder.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {
        **_SHAPE,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 40,
        "max_window_layers": 1,
        "tie_word_embeddings": False,
    },
    "qwen3": {**_SHAPE, "model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
    "llama": {
        **_SHAPE,
        "model_type": "llama",
        "head_dim": 32,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
}

# One bucket of 4: steps of 1 to 3 tokens, of 4 and of more take the three ways through the graph cache.
COMPILE_OPTIONS = ("--dtype", "float32", "--buckets", "4", "--max-num-batched-tokens", "256")


def model_directory(folder: Path, config: Mapping[str, Any], *, dtype: str = "float32", shards: str = "100GB") -> Path:
    """A random checkpoint of ``config`` with the demo tokenizer, made once: equal arguments name the same directory."""
    sources = (Path(__file__), Path(sys.modules[save_random_model.__module__].__file__ or ""))
    text = json.dumps([dict(config), dtype, shards], sort_keys=True).encode() + b"".join(map(Path.read_bytes, sources))
    target = folder / f"{config['model_type']}-{hashlib.sha256(text).hexdigest()[:12]}"
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=folder, prefix=".model-"))
        save_random_model(building, config, dtype=getattr(torch, dtype), max_shard_size=shards)
        for name in TOKENIZER_FILES:
            shutil.copyfile(DEMO_MODEL / name, building / name)
        try:
            os.rename(building, target)
        except OSError:
            # Another session made it meanwhile.
            shutil.rmtree(building)
    return target


def compile_model(*args: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the xllm-compile command."""
    command = [sys.executable, "-m", "xllm_compile.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})})


def kernel_library() -> Path:
    """The kernels of this checkout, from the graph store: the very bytes that artifacts hold."""
    store = GraphStore(cache_dir() / "graphs")
    key = graph_key(["kernels", native.kernel_source_hash(), torch.__version__, compiler_version()])
    if store.find(key) is None:
        native.build_kernels(store.path(key))
    return store.path(key)


@dataclass(frozen=True, kw_only=True)
class EagerModel:
    """The programs and weights of a checkpoint, as a build makes them, without compiled graphs."""

    source: Source
    manifest: Manifest
    weights: dict[str, Tensor]
    tokenizer: Tokenizer

    def engine(
        self, *, max_num_batched_tokens: int = 512, max_num_seqs: int = 8, speculator: Speculator | None = None
    ) -> Engine:
        """A fresh engine with an empty KV cache."""
        kv_cache = self.kv_cache(max_num_seqs)
        runner = self.runner(kv_cache.layers, max_num_batched_tokens=max_num_batched_tokens)
        return Engine(runner, kv_cache, self.tokenizer, speculator=speculator)

    def kv_cache(self, max_num_seqs: int) -> KVCache:
        """With room for so many of the longest sequences."""
        model = self.manifest.model
        return KVCache(
            KVCacheConfig(
                num_layers=model.num_layers,
                num_kv_heads=model.num_kv_heads,
                head_dim=model.head_dim,
                dtype=getattr(torch, model.kv_cache_dtype),
                max_model_len=model.max_model_len,
                num_slots=max_num_seqs,
                kv_memory_bytes=max_num_seqs * model.max_model_len * model.kv_bytes_per_token,
            )
        )

    def runner(
        self, kv_layers: Sequence[Tensor] | None = None, *, max_num_batched_tokens: int = 512
    ) -> CompiledModelRunner:
        """Without ``kv_layers``: on a cache of one slot."""
        model = self.manifest.model
        shape = (1, model.max_model_len, *model.kv_layer_shape)
        own = [torch.zeros(shape, dtype=getattr(torch, model.kv_cache_dtype)) for _ in range(model.num_layers)]
        return CompiledModelRunner(
            Path(),
            self.manifest,
            self.weights,
            kv_layers or own,
            max_model_len=model.max_model_len,
            max_num_seqs=8,
            max_num_batched_tokens=max_num_batched_tokens,
            enforce_eager=True,
        )


def eager_model(model_dir: Path, folder: Path, **options: Any) -> EagerModel:
    """``options`` are those of BuildConfig; ``folder`` takes the weights file. The kernels must be loaded."""
    config = BuildConfig(model_dir=model_dir, output=folder / "unused.xllm", **{"dtype": "float32", **options})
    source = read_source(config)
    programs, _ = make_programs(source, config, NoProgress())
    path = folder / f"{model_dir.name}-{source.dtype}.safetensors"
    computed = rope_constants(source.config)
    specs = artifact_weights(programs)
    build_weights(path, source.checkpoint, computed, specs, lambda done: None, stored=source.stored)
    return EagerModel(
        source=source,
        manifest=_manifest(source, programs, config),
        weights=map_weights(path),
        tokenizer=Tokenizer.from_directory(model_dir),
    )


def _manifest(source: Source, programs: Sequence[RegionProgram], config: BuildConfig) -> Manifest:
    nothing = FileEntry(path="", num_bytes=0, digest="")
    model = source.config
    return Manifest(
        schema_version=artifact.SCHEMA_VERSION,
        build_key="",
        model=ModelInfo(
            name="eager",
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            num_layers=model.num_layers,
            num_kv_heads=rank_shape(model, config.tensor_parallel_size).num_kv_heads,
            head_dim=model.head_dim,
            dtype=source.dtype,
            kv_cache_dtype=source.kv_cache_dtype,
            max_model_len=source.max_model_len,
        ),
        model_config=model.to_json(),
        config_hash="",
        target="cpu",
        target_features=(),
        versions={},
        passes=(),
        graph_mode=config.graph_mode,
        token_buckets=(),
        logits_buckets=(),
        buckets_reason="none",
        step_times=dict.fromkeys("TR", StepTimes(sizes=(1,), seconds=(1.0,), dynamic_overhead=1.0)),
        device_spec={},
        max_num_batched_tokens=config.max_num_batched_tokens,
        tensor_parallel_size=config.tensor_parallel_size,
        programs=tuple(programs),
        split_buckets=(),
        split_programs=(),
        graphs=(),
        kernels=nothing,
        weights=(nothing,),
        weights_key="",
        memory_plan={},
        graph_plans=(),
        quantisation=None,
        created="",
        pass_seconds=0.0,
    )


def greedy(engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """All prompts in one batch; tokens that each gets."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=num_tokens)
    outputs = LLMBase(engine).generate([list(prompt) for prompt in prompts], params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]
