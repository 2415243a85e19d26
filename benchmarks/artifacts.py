"""Artifacts for the benchmarks, built the way a user builds them: by running xllm-compile."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from xllm_compile.benchmarks.checkpoints import Shape, checkpoint
from xllm_compile.benchmarks.parity import DEMO_MODEL
from xllm_compile.runtime.artifact import Manifest, read_manifest


def compile_model(
    model_dir: Path, output: Path, options: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> float:
    """Run xllm-compile; returns seconds from process start to exit. Raises RuntimeError with its message."""
    command = [sys.executable, "-m", "xllm_compile.cli", str(model_dir), "-o", str(output), *options]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})})
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        raise RuntimeError(f"xllm-compile ended with exit code {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    return seconds


def artifact_of_shape(
    shape: Shape,
    work_dir: Path,
    *,
    seed: int,
    dtype: str = "bfloat16",
    quantize: str = "none",
    kv_cache_dtype: str = "auto",
) -> tuple[Path, Manifest]:
    """The artifact of a checkpoint of this shape, up to date with the sources; built only where it is not. ``quantize``
    is a scheme of --quantize, for layers and head."""
    precision = dtype if quantize == "none" else f"{dtype}-{quantize}"
    if kv_cache_dtype != "auto":
        precision += f"-kv-{kv_cache_dtype}"
    output = work_dir / "artifacts" / f"{shape.name}-{precision}-seed{seed}.xllm"
    options = ["--dtype", dtype, "--kv-cache-dtype", kv_cache_dtype]
    if quantize != "none":
        options += ["--quantize", quantize, "--quantize-head"]
    compile_model(checkpoint(shape, work_dir, seed=seed), output, options)
    return output, read_manifest(output)


def artifact_of_demo(work_dir: Path) -> Path:
    """The artifact of demo-code with the buckets of a plain build, up to date with the sources."""
    output = work_dir / "artifacts" / "demo-code.xllm"
    compile_model(DEMO_MODEL, output, ["--dtype", "bfloat16"])
    return output
