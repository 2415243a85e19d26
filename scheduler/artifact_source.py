"""What `xllm-serve ARTIFACT` was given: an artifact, or a model directory that has to be compiled first."""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

logger = logging.getLogger(__name__)


def find_artifact(path: Path, options: Mapping[str, Any]) -> Path:
    """The artifact to open, compiled now if --compile asks for it. Raises ValueError naming the next step."""
    if (path / "manifest.json").is_file():
        return path
    if not path.exists():
        raise ValueError(f"{path} does not exist; build an artifact with: xllm-compile MODEL_DIR -o {path}")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is neither an artifact (no manifest.json) nor a model directory (no config.json)")
    if not options["use_compile"]:
        name = path.resolve().name
        raise ValueError(
            f"{path} is a model directory, not an artifact. Compile it once ({compile_estimate(path)}): "
            f"xllm-compile {path} -o {name}.xllm, then: xllm-serve {name}.xllm; or let xllm-serve do both: --compile"
        )
    return _compile(path, options)


def compile_estimate(model_dir: Path) -> str:
    """Roughly how long a first compile takes: the graphs cost the same for every size, the weights are rewritten."""
    num_bytes = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    # A dozen graphs at some 10 s of C++ compiler each on two cores, then the weights at some 200 MB/s.
    minutes = 2 + num_bytes / 200e6 / 60
    return f"about {minutes:.0f} min on two idle cores"


def _compile(model_dir: Path, options: Mapping[str, Any]) -> Path:
    """Run the compiler as its own process: the server must not carry it. A build that is up to date is a quick no."""
    max_model_len, kv_cache_dtype = options["max_model_len"], options["kv_cache_dtype"]
    output = cached_artifact(model_dir, max_model_len, kv_cache_dtype)
    command = [sys.executable, "-m", "xllm_compile.cli", str(model_dir), "-o", str(output)]
    command += ["--kv-cache-dtype", kv_cache_dtype]
    if max_model_len is not None:
        command += ["--max-model-len", str(max_model_len)]
    logger.info("compiling %s into %s", model_dir, output)
    # stdout is for the ready line alone.
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise ValueError(f"compiling {model_dir} failed with exit code {done.returncode}; its message is above")
    return output


def cached_artifact(model_dir: Path, max_model_len: int | None, kv_cache_dtype: str) -> Path:
    """The place where xllm_compile.model_cache, which serving may not import, keeps the same artifact."""
    root = os.environ.get("XDG_CACHE_HOME")
    cache = Path(root) if root else Path.home() / ".cache"
    resolved = model_dir.resolve()
    digest = xxhash.xxh3_64(f"{resolved}\0auto\0{kv_cache_dtype}\0{max_model_len}".encode()).hexdigest()
    return cache / "xllm-compile" / "artifacts" / f"{resolved.name}-{digest}.xllm"
