"""What each precision does to the logits of a real shape, against float32, through compiled artifacts.

Random weights lose far more by rounding than trained ones, and say nothing of quality (`bench_quantisation.py` does, on
a small trained model): errors are figures without a bar, to compare precisions with each other and with what they were.
That a row is the same alone and in a prompt has one.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from xllm_compile.benchmarks.artifacts import artifact_of_shape, compile_model
from xllm_compile.benchmarks.bench_precisions import INT8_KV, PRECISIONS
from xllm_compile.benchmarks.bench_quantisation import CHUNK, open_runner
from xllm_compile.benchmarks.checkpoints import Shape, checkpoint
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.parity import random_prompts
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.runtime.model_runner import CompiledModelRunner
from xllm_compile.runtime.step import Step

# The last rows of the prompt: the ones that have attended to the most.
NUM_ROWS = 128


def run_logits(shape: Shape, work_dir: Path, results: Path, command: Sequence[str], *, seed: int) -> None:
    """Measure and write logits_SHAPE.json."""
    (prompt,) = random_prompts((CHUNK,), shape.num_words, seed)
    say(f"building {shape.name}, float32")
    reference_root = work_dir / "artifacts" / f"{shape.name}-float32-eager-seed{seed}.xllm"
    # Operator by operator: compiled graphs are what is looked at.
    options = ["--dtype", "float32", "--graph-mode", "eager"]
    compile_model(checkpoint(shape, work_dir, seed=seed), reference_root, options)
    reference, _ = _logits(reference_root, prompt)
    errors, agreed, alone = {}, {}, {}
    for precision in PRECISIONS:
        say(f"building {shape.name}, {precision}")
        scheme = precision.removesuffix(INT8_KV)
        kv_cache_dtype = "auto" if scheme == precision else "int8"
        root, _ = artifact_of_shape(shape, work_dir, seed=seed, quantize=scheme, kv_cache_dtype=kv_cache_dtype)
        logits, alone[precision] = _logits(root, prompt)
        errors[precision] = float((logits - reference).square().mean().sqrt() / reference.square().mean().sqrt())
        agreed[precision] = float((logits.argmax(1) == reference.argmax(1)).float().mean())
    labels = {name: name.replace("none", "bfloat16") for name in PRECISIONS}
    rows = [(labels[name], f"{errors[name]:.4f}", f"{agreed[name]:.2f}") for name in PRECISIONS]
    show_table(f"{shape.name}, against float32", ("precision", "error of logits", "same largest"), rows)
    raw = {
        "shape": shape.hf_config(),
        "prompt_tokens": len(prompt),
        "rows": NUM_ROWS,
        "relative_rms_error": errors,
        "share_of_same_largest": agreed,
        "largest_difference_of_a_row_alone": alone,
    }
    bars = [
        Bar(what=f"{labels[name]}: error of logits", value=errors[name], unit="of their rms") for name in PRECISIONS
    ]
    bars += [
        Bar(what=f"{labels[name]}: a row alone against in a prompt", value=value, unit="", bar="<= 0")
        for name, value in alone.items()
    ]
    finish(make_record(f"logits_{shape.record_name}", command, seed=seed, raw=raw, bars=bars), results)


def _logits(root: Path, prompt: Sequence[int]) -> tuple[Tensor, float]:
    """[NUM_ROWS, vocabulary] float32, of the last tokens of the prompt in one step; and how far the last row is, at
    most, from what a step of its own gives, as in decoding."""
    runner = open_runner(root)
    many = _step(runner, prompt, 0, NUM_ROWS)
    alone = _step(runner, prompt, len(prompt) - 1, 1)
    return many, float((many[-1:] - alone).abs().max())


def _step(runner: CompiledModelRunner, prompt: Sequence[int], begin: int, num_rows: int) -> Tensor:
    count = len(prompt) - begin
    return (
        runner.execute(
            Step(
                token_ids=np.array(prompt[begin:], dtype=np.int32),
                positions=np.arange(begin, len(prompt), dtype=np.int32),
                rope_len=np.full(count, len(prompt), dtype=np.int32),
                seq_start=np.array([0, count], dtype=np.int32),
                context_len=np.array([len(prompt)], dtype=np.int32),
                slot=np.zeros(1, dtype=np.int32),
                logits_at=np.arange(count - num_rows, count, dtype=np.int32),
            )
        )
        .float()
        .clone()
    )
