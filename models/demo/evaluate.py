"""Measure a trained demo model on the held-out files and write its ``metrics.json`` and ``README.md``."""

import gzip
import json
import lzma
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from xllm_compile.models.demo.corpus import END_OF_TEXT, SourceFile
from xllm_compile.models.demo.recipes import Recipe

WINDOW = 2048
STRIDE = 1024

SAMPLE_TOKENS = 96
SAMPLE_PROMPT = 'def read_lines(path):\n    """Return the lines of a file."""\n    '
SAMPLE_REQUEST = "Write a Python function named is_empty: Return True if the queue is empty."


def load_model(directory: Path) -> tuple[Any, Any]:
    """The published bfloat16 weights, computed in float32, and their tokenizer."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


@torch.inference_mode()
def text_bits(model: Any, tokenizer: Any, text: str) -> float:
    """Bits the model needs for ``text``, starting from the end-of-text token.

    Windows overlap by half, so every token but the first few has at least ``WINDOW - STRIDE`` tokens of context
    and is counted once.
    """
    start_id = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    ids = torch.tensor([start_id, *tokenizer(text).input_ids])
    nats, scored = 0.0, 0
    for begin in range(0, max(1, len(ids) - 1), STRIDE):
        window = ids[begin : begin + WINDOW + 1]
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
        fresh = begin + len(window) - 1 - scored
        nats += torch.nn.functional.cross_entropy(logits[-fresh:], window[-fresh:], reduction="sum").item()
        scored += fresh
        if scored == len(ids) - 1:
            break
    return nats / math.log(2.0)


def bits_per_byte(model: Any, tokenizer: Any, text: str) -> float:
    """Bits the model needs per UTF-8 byte of ``text``."""
    return text_bits(model, tokenizer, text) / len(text.encode())


def complete(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = SAMPLE_TOKENS) -> str:
    """The greedy continuation of ``prompt``, without the prompt and without special tokens."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        do_sample=False,
        temperature=None,
        top_p=None,
        max_new_tokens=max_new_tokens,
    )
    text: str = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text


def evaluate_model(directory: Path, held_out: tuple[SourceFile, ...], *, console: Console) -> dict[str, Any]:
    """Bits per byte of the model and of two compressors on the same held-out files, and greedy samples."""
    model, tokenizer = load_model(directory)
    contents = [file.text.encode() for file in held_out]
    joined = b"".join(contents)
    bits = sum(
        text_bits(model, tokenizer, file.text)
        for file in track(held_out, f"{directory.name}: held-out files", console=console)
    )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": SAMPLE_REQUEST}], tokenize=False, add_generation_prompt=True
    )
    return {
        "held_out_files": len(held_out),
        "held_out_bytes": len(joined),
        "bits_per_byte": {
            "model_each_file": round(bits / len(joined), 4),
            "gzip_9_each_file": compressed_bits(contents, gzip_bytes),
            "xz_9_each_file": compressed_bits(contents, xz_bytes),
            "gzip_9_concatenated": compressed_bits([joined], gzip_bytes),
            "xz_9_concatenated": compressed_bits([joined], xz_bytes),
        },
        "samples": {
            "completion": {"prompt": SAMPLE_PROMPT, "text": complete(model, tokenizer, SAMPLE_PROMPT)},
            "chat": {"prompt": SAMPLE_REQUEST, "text": complete(model, tokenizer, chat)},
        },
        "weights_bytes": (directory / "model.safetensors").stat().st_size,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def gzip_bytes(data: bytes) -> int:
    return len(gzip.compress(data, 9, mtime=0))


def xz_bytes(data: bytes) -> int:
    return len(lzma.compress(data, preset=9))


def compressed_bits(contents: list[bytes], compressed_size: Callable[[bytes], int]) -> float:
    """Bits per byte when each item of ``contents`` is compressed alone, container overhead included."""
    return round(8.0 * sum(map(compressed_size, contents)) / sum(map(len, contents)), 4)


def merge_metrics(directory: Path, update: dict[str, Any]) -> None:
    """Replace the given top-level entries of ``metrics.json`` and keep the others."""
    path = directory / "metrics.json"
    metrics = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(metrics | update, indent=2) + "\n")


def recorded_runs(directory: Path) -> list[dict[str, Any]]:
    """The training runs behind the weights in ``directory``, oldest first; more than one after a resume."""
    path = directory / "metrics.json"
    metrics = json.loads(path.read_text()) if path.is_file() else {}
    runs: list[dict[str, Any]] = metrics.get("training", {}).get("runs", [])
    return runs


def write_card(directory: Path, recipe: Recipe) -> None:
    """Render ``README.md`` from ``metrics.json``; no number in it is typed by hand."""
    metrics = json.loads((directory / "metrics.json").read_text())
    for part in ("training", "evaluation"):
        if part not in metrics:
            raise ValueError(
                f"{directory / 'metrics.json'} has no {part!r} entry; train the model with this script first"
            )
    training, evaluation = metrics["training"], metrics["evaluation"]
    bits, samples, versions = evaluation["bits_per_byte"], evaluation["samples"], evaluation["versions"]
    runs = training["runs"]
    tokens_seen, steps, seconds = (sum(run[key] for run in runs) for key in ("tokens_seen", "steps", "seconds"))
    notes = "".join(f" Run {i}: {run['note']}" for i, run in enumerate(runs, 1) if "note" in run)
    shape = "\n".join(f"| {name} | {value} |" for name, value in recipe.config.items())
    card = f"""---
license: other
license_name: psf-2.0
language: [en]
tags: [code, python]
---

# {recipe.name}

{recipe.summary}

It is made for demos and tests of an inference runtime: small enough to live in a repository, trained enough
that its output is text. It is not a useful assistant.

| | |
| --- | --- |
| model class | {recipe.model_class} |
| parameters | {training["parameters"]:,} |
| weights | bfloat16, {evaluation["weights_bytes"]:,} bytes |
{shape}

## Quality

Bits per byte, lower is better, on {evaluation["held_out_files"]} files ({evaluation["held_out_bytes"]:,} bytes) of
the standard library kept out of training. The model reads each file alone, from an empty context, with at most
{WINDOW} tokens of context. Its own size is not counted, and unlike the compressors it has seen the rest of the
library.

| | each file alone | all files concatenated |
| --- | --- | --- |
| {recipe.name} | {bits["model_each_file"]:.3f} | - |
| gzip -9 | {bits["gzip_9_each_file"]:.3f} | {bits["gzip_9_concatenated"]:.3f} |
| xz -9 | {bits["xz_9_each_file"]:.3f} | {bits["xz_9_concatenated"]:.3f} |

## Samples

Greedy, at most {SAMPLE_TOKENS} new tokens. A completion (the prompt ends after the docstring's indentation):

```python
{(samples["completion"]["prompt"] + samples["completion"]["text"]).rstrip()}
```

A chat answer to "{samples["chat"]["prompt"]}":

```python
{samples["chat"]["text"].rstrip()}
```

## Training

{tokens_seen:,} tokens in {steps:,} steps and {seconds / 60:.1f} minutes on {runs[-1]["threads"]} CPU threads
({tokens_seen / seconds:,.0f} tokens/s), in {len(runs)} run(s), each with its own learning-rate schedule.{notes}
The final training loss is {runs[-1]["final_loss"]:.3f} nats per token, on a corpus of
{training["corpus_tokens"]:,} tokens: the source of
the Python {versions["python"]} standard library, its own modules twice, half of its tests once, and ChatML
conversations that ask for a documented function of the library and answer with its source. The prompts that
work best look like those: `Write a Python function named NAME: PURPOSE`.

Measured with Python {versions["python"]}, torch {versions["torch"]}, transformers {versions["transformers"]},
tokenizers {versions["tokenizers"]}. To retrain, and to measure again:

```
python models/demo/train.py --model {recipe.name}
python models/demo/train.py --model {recipe.name} --eval
```

## Licence

Trained only on the Python standard library, which is under the PSF licence (version 2); the model can repeat
parts of it, so the weights are shared under the same terms.
"""
    (directory / "README.md").write_text(card)
