"""The key of a whole build: equal keys mean that building again would give the same artifact."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

import xllm_compile
from xllm_compile.build_config import BuildConfig
from xllm_compile.runtime import artifact
from xllm_compile.runtime.ops import native
from xllm_compile.targets import lowering_for

if TYPE_CHECKING:
    from xllm_compile.build_plan import Source
    from xllm_compile.device import ChosenDevice
    from xllm_compile.request_trace import TraceRequest

# Files of a model directory that the tokenizer, the chat template and the generation defaults are read from.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)

# Sources that decide what a build produces; demo models and their training are not among them.
_BUILD_SOURCES = (
    "*.py",
    "targets/**/*.py",
    "report/*.py",
    "report/*.j2",
    "models/*.py",
    "graph_passes/*.py",
    "graph_passes/devices/*.json",
    "runtime/ops/*.py",
    "runtime/artifact.py",
    "runtime/program.py",
    "runtime/weights.py",
    "runtime/isa.py",
)


def build_key(
    config: BuildConfig, source: "Source", workload: Sequence["TraceRequest"], device: "ChosenDevice", compiler: str
) -> str:
    """Covers model, options, target, versions and our own sources; no path, time, HOME or host name.

    Buckets are covered by what they are chosen from: choosing takes the captured graphs, which an unchanged build
    spares itself.
    """
    parts = {
        "config": hash_json(source.hf_config),
        "checkpoint": source.checkpoint_hash,
        "tokenizer": {
            name: artifact.file_digest(config.model_dir / name) for name in tokenizer_files(config.model_dir)
        },
        "name": config.model_dir.resolve().name,
        "target": config.target,
        "dtype": source.dtype,
        "kv_cache_dtype": source.kv_cache_dtype,
        "max_model_len": source.max_model_len,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "graph_mode": config.graph_mode,
        "buckets": sorted({*config.buckets}) if config.buckets is not None else None,
        "workload": [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in workload],
        "device": device.to_json(),
        "tensor_parallel_size": config.tensor_parallel_size,
        "disabled_passes": sorted(config.disabled_passes),
        "quantisation": config.quantisation.label if config.quantisation else None,
        "features": lowering_for(config.target).features(),
        "versions": artifact.runtime_versions(),
        "compiler": compiler,
        "kernels": native.kernel_source_hash(),
        "sources": _sources_hash(),
        "schema": artifact.SCHEMA_VERSION,
    }
    return hash_json(parts)


def hash_json(values: Any) -> str:
    return xxhash.xxh3_128(json.dumps(values, sort_keys=True).encode()).hexdigest()


def tokenizer_files(model_dir: Path) -> list[str]:
    return [name for name in _TOKENIZER_FILES if (model_dir / name).is_file()]


def compiler_version() -> str:
    """First line of the C++ compiler's --version. Raises native.CompilerNotFoundError when there is none."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise native.CompilerNotFoundError(
            f"no C++ compiler {os.environ.get('CXX', 'g++')!r} on PATH;"
            " install g++ (Debian: apt-get install g++) or set CXX"
        )
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def _sources_hash() -> str:
    root = Path(xllm_compile.__file__).parent
    digest = xxhash.xxh3_128()
    for pattern in _BUILD_SOURCES:
        for path in sorted(root.glob(pattern)):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
