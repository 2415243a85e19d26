"""What quantising costs: bits per byte of demo-code on held-out text, through compiled artifacts of every scheme."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xllm_compile.benchmarks.artifacts import compile_model
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.parity import DEMO_MODEL
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.models.demo.corpus import END_OF_TEXT, SourceFile, standard_library_files
from xllm_compile.runtime.artifact import Manifest, cpu_kernels, read_manifest
from xllm_compile.runtime.model_runner import CompiledModelRunner
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.step import Step
from xllm_compile.runtime.tokenizer import Tokenizer
from xllm_compile.runtime.weights import map_weights

SCHEMES: dict[str, tuple[str, ...]] = {
    "bfloat16": (),
    "int8": ("--quantize", "int8"),
    "int8-dynamic": ("--quantize", "int8-dynamic"),
    "int4, groups of 32": ("--quantize", "int4"),
    "int4-dynamic, groups of 32": ("--quantize", "int4-dynamic"),
    # Half of the products only: the others have 288 inputs, which stay bfloat16.
    "int4, groups of 128": ("--quantize", "int4", "--quantize-group", "128"),
    "int8 and head": ("--quantize", "int8", "--quantize-head"),
    "int4 and head": ("--quantize", "int4", "--quantize-head"),
    "int8 KV cache": ("--kv-cache-dtype", "int8"),
    "int4-dynamic, head and KV cache": ("--quantize", "int4-dynamic", "--quantize-head", "--kv-cache-dtype", "int8"),
}
# Most a scheme may lose against bfloat16, in bits per byte.
MAX_LOSS = {
    "int8": 0.002,
    "int8-dynamic": 0.005,
    "int4, groups of 32": 0.015,
    "int4-dynamic, groups of 32": 0.02,
    "int4, groups of 128": 0.015,
    "int8 and head": 0.003,
    "int4 and head": 0.016,
    "int8 KV cache": 0.002,
    "int4-dynamic, head and KV cache": 0.023,
}
# Windows as in models/demo/evaluate.py, which measured the float32 model.
WINDOW, STRIDE = 2048, 1024
CHUNK = 512


def run_quantisation(work_dir: Path, results: Path, command: Sequence[str], *, every: int) -> None:
    """Measure and write quantisation_demo_code.json. ``every``: score one in this many held-out files."""
    held_out = [file for file in standard_library_files() if file.is_held_out][::every]
    num_bytes = sum(len(file.text.encode()) for file in held_out)
    tokenizer = Tokenizer.from_directory(DEMO_MODEL)
    bits, manifests = {}, {}
    for name, options in SCHEMES.items():
        artifact = work_dir / "artifacts" / f"demo-code-{name.replace(',', '').replace(' ', '-')}.xllm"
        say(f"{name}: compiling")
        shapes = ["--dtype", "bfloat16", "--buckets", str(CHUNK), "--max-num-batched-tokens", str(CHUNK)]
        compile_model(DEMO_MODEL, artifact, [*shapes, *options])
        manifests[name] = read_manifest(artifact)
        runner = open_runner(artifact)
        say(f"{name}: {len(held_out)} files, {num_bytes} bytes")
        bits[name] = sum(_text_bits(runner, tokenizer, file) for file in held_out) / num_bytes
    matrices = {name: _matrix_bytes(manifest) for name, manifest in manifests.items()}
    rows = [
        (
            name,
            f"{bits[name]:.4f}",
            f"{bits[name] - bits['bfloat16']:+.4f}",
            f"{matrices[name] / matrices['bfloat16']:.3f}",
            f"{manifests[name].memory_plan['weights_bytes'] / 1e6:.2f}",
            str(manifests[name].memory_plan["kv_bytes_per_token"]),
        )
        for name in SCHEMES
    ]
    columns = ("scheme", "bits per byte", "loss", "layer matrices", "all weights, MB", "KV, bytes/token")
    show_table(f"demo-code, {num_bytes} held-out bytes", columns, rows)
    raw = {
        "held_out_files": len(held_out),
        "held_out_bytes": num_bytes,
        "window": WINDOW,
        "stride": STRIDE,
        "schemes": {
            name: {
                "options": SCHEMES[name],
                "bits_per_byte": bits[name],
                "manifest": manifests[name].quantisation,
                "layer_matrix_bytes": matrices[name],
                "weights_bytes": manifests[name].memory_plan["weights_bytes"],
                "kv_bytes_per_token": manifests[name].memory_plan["kv_bytes_per_token"],
            }
            for name in SCHEMES
        },
    }
    finish(make_record("quantisation_demo_code", command, seed=0, raw=raw, bars=_bars(bits, matrices)), results)


def _bars(bits: dict[str, float], matrices: dict[str, int]) -> list[Bar]:
    bars = [Bar(what="bfloat16", value=bits["bfloat16"], unit="bits/byte")]
    for name, limit in MAX_LOSS.items():
        loss, smaller = bits[name] - bits["bfloat16"], matrices["bfloat16"] / matrices[name]
        bars.append(Bar(what=f"{name}: loss against bfloat16", value=loss, unit="bits/byte", bar=f"<= {limit}"))
        if smaller > 1:
            bars.append(Bar(what=f"{name}: layer matrices smaller by", value=smaller, unit="times"))
    return bars


def open_runner(root: Path) -> CompiledModelRunner:
    """The artifact's graphs over a cache of one sequence."""
    manifest = read_manifest(root)
    native.load_kernels(root / cpu_kernels(root, manifest).path)
    model = manifest.model
    shape = (1, WINDOW, *model.kv_layer_shape)
    return CompiledModelRunner(
        root,
        manifest,
        map_weights(root / manifest.weights[0].path),
        [torch.zeros(shape, dtype=getattr(torch, model.kv_cache_dtype)) for _ in range(model.num_layers)],
        max_model_len=WINDOW,
        max_num_seqs=1,
        max_num_batched_tokens=CHUNK,
    )


def _text_bits(runner: CompiledModelRunner, tokenizer: Tokenizer, file: SourceFile) -> float:
    """Bits the model needs for the file, from the end-of-text token on; each token is counted once."""
    start = tokenizer.encode(END_OF_TEXT)
    ids = np.array([*start, *tokenizer.encode(file.text)], dtype=np.int32)
    nats, scored = 0.0, 0
    for begin in range(0, max(1, len(ids) - 1), STRIDE):
        window = ids[begin : begin + WINDOW + 1]
        first = scored - begin
        nats += _window_nats(runner, window, first)
        scored = begin + len(window) - 1
        if scored == len(ids) - 1:
            break
    return nats / math.log(2.0)


def _window_nats(runner: CompiledModelRunner, window: Any, first: int) -> float:
    """Of the tokens after window[first], each given all of the window before it; computed in chunks."""
    nats = 0.0
    for at in range(0, len(window) - 1, CHUNK):
        end = min(at + CHUNK, len(window) - 1)
        wanted = np.arange(max(at, first), end, dtype=np.int32)
        positions = np.arange(at, end, dtype=np.int32)
        step = Step(
            token_ids=window[at:end].copy(),
            positions=positions,
            rope_len=np.full(end - at, len(window) - 1, dtype=np.int32),
            seq_start=np.array([0, end - at], dtype=np.int32),
            context_len=np.array([end], dtype=np.int32),
            slot=np.zeros(1, dtype=np.int32),
            logits_at=wanted - at,
        )
        logits = runner.execute(step)
        if len(wanted):
            targets = torch.from_numpy(window[wanted + 1].astype(np.int64))
            nats += torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()
    return nats


def _matrix_bytes(manifest: Manifest) -> int:
    """Bytes of the layers' matrices and their scales: what a decode step reads of them."""
    total = 0
    for program in manifest.programs:
        for spec in program.weights:
            if len(spec.shape) > 1 or spec.quantised:
                total += math.prod(spec.shape) * getattr(torch, spec.dtype).itemsize * len(program.layers)
    return total
