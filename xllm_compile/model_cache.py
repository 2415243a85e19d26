"""Model directories compiled on first use: one artifact per model directory and dtype, in the user's cache."""

import subprocess
import sys
from pathlib import Path

import xxhash

from xllm_compile.machine import cache_dir
from xllm_compile.runtime.artifact import ArtifactMismatchError, is_artifact, read_manifest


def artifact_of(
    model: Path, *, dtype: str = "auto", kv_cache_dtype: str = "auto", max_model_len: int | None = None
) -> Path:
    """``model`` itself when it is an artifact, else the artifact its directory compiles to, built if it must be.

    The build runs in a process of its own, so that serving code never loads the compiler. Raises ValueError with
    the build's error line when it fails. kv_cache_dtype is for the build: an artifact's is checked by who opens it.
    """
    if is_artifact(model):
        built_with = read_manifest(model).model.dtype
        if dtype not in ("auto", built_with):
            raise ArtifactMismatchError(
                f"{model} was compiled for {built_with}, dtype={dtype!r} was asked for; compile it with --dtype {dtype}"
            )
        return model
    output = cached_artifact(model, dtype=dtype, kv_cache_dtype=kv_cache_dtype, max_model_len=max_model_len)
    command = [sys.executable, "-m", "xllm_compile.cli", str(model), "-o", str(output)]
    command += ["--dtype", dtype, "--kv-cache-dtype", kv_cache_dtype]
    if max_model_len is not None:
        command += ["--max-model-len", str(max_model_len)]
    # The build's progress goes to the terminal; its last line is the error, when there is one.
    done = subprocess.run(command, stderr=None if sys.stderr.isatty() else subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr or "see above").strip().splitlines()[-1]
        raise ValueError(f"compiling {model} failed: {reason.removeprefix('xllm-compile: error: ')}")
    return output


def cached_artifact(
    model: Path, *, dtype: str = "auto", kv_cache_dtype: str = "auto", max_model_len: int | None = None
) -> Path:
    """Where the artifact of a model directory is kept. The build itself notices when the model has changed."""
    name = model.resolve().name
    digest = xxhash.xxh3_64(f"{model.resolve()}\0{dtype}\0{kv_cache_dtype}\0{max_model_len}".encode()).hexdigest()
    return cache_dir() / "artifacts" / f"{name}-{digest}.xllm"
