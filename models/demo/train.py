"""Train the demo models: ``python models/demo/train.py`` writes every model directory beside this file.

Training is wall-clock bound: the learning rate follows the share of ``--minutes`` (or ``--steps``) already
spent, so a slower machine sees fewer tokens but always ends at learning rate zero. On a machine shared with
other work, set ``OMP_WAIT_POLICY=passive``: threads that spin at a barrier take the core the late thread needs.
"""

import copy
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from xllm_compile.models.demo.corpus import END_OF_TEXT, Corpus, build_corpus
from xllm_compile.models.demo.evaluate import evaluate_model, merge_metrics, recorded_runs, write_card
from xllm_compile.models.demo.recipes import EOS_TOKEN_IDS, PAD_TOKEN_ID, RECIPES, Recipe, Training
from xllm_compile.models.demo.tokenizer import save_tokenizer, train_tokenizer

CHECKPOINT_SECONDS = 300.0
LOSS_SMOOTHING = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """When a run ends: after ``steps`` if given, otherwise after ``minutes`` of wall clock."""

    minutes: float
    steps: int | None

    def progress(self, *, step: int, seconds: float) -> float:
        """The share already spent, in 0..1."""
        spent = step / self.steps if self.steps is not None else seconds / (60.0 * self.minutes)
        return min(1.0, spent)


def encode_documents(tokenizer: Tokenizer, documents: tuple[str, ...]) -> torch.Tensor:
    """One long row of token ids with the end-of-text token before each document."""
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [torch.tensor([end_of_text, *encoding.ids]) for encoding in tokenizer.encode_batch(list(documents))]
    return torch.cat([*pieces, torch.tensor([end_of_text])])


def windows(tokens: torch.Tensor, length: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Windows of ``length`` + 1 tokens in random order, forever; each pass cuts at a new random offset."""
    if tokens.numel() < 2 * length + 2:
        raise ValueError(
            f"the corpus has {tokens.numel()} tokens but one training window needs {2 * length + 2}; "
            "shorten the sequence length of the recipe"
        )
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        count = (tokens.numel() - offset - 1) // length
        for index in torch.randperm(count, generator=generator).tolist():
            start = offset + index * length
            yield tokens[start : start + length + 1]


def build_optimizers(model: PreTrainedModel, training: Training) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    embedding = model.get_input_embeddings().weight
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim == 2 and parameter is not embedding]
    others = [parameter for parameter in parameters if parameter.ndim != 2 or parameter is embedding]
    return [
        torch.optim.Muon(
            matrices,
            lr=training.matrix_lr,
            weight_decay=training.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=training.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def learning_rate_scale(progress: float, warmup_share: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    if progress < warmup_share:
        return max(progress, 1e-3) / warmup_share
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup_share) / (1.0 - warmup_share)))


def save_checkpoint(model: PreTrainedModel, directory: Path) -> None:
    """Write bfloat16 weights and configs; each file is replaced atomically, so a reader never sees half of one."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
        saved: Any = copy.deepcopy(model)
        saved.to(torch.bfloat16)
        saved.generation_config = GenerationConfig(
            eos_token_id=EOS_TOKEN_IDS,
            pad_token_id=PAD_TOKEN_ID,
            do_sample=True,
            temperature=0.7,
            top_p=0.95,
        )
        saved.save_pretrained(scratch)
        for file in Path(scratch).iterdir():
            file.chmod(0o644)
            os.replace(file, directory / file.name)


def initial_model(recipe: Recipe, directory: Path, *, resume: bool) -> PreTrainedModel:
    """Random weights in float32, or with ``resume`` the ones an earlier run left in ``directory``."""
    model = recipe.build_model()
    if resume:
        model.load_state_dict(type(model).from_pretrained(directory, dtype=torch.float32).state_dict())
    return model


def train(
    recipe: Recipe,
    tokens: torch.Tensor,
    directory: Path,
    budget: Budget,
    *,
    seed: int,
    resume: bool,
    console: Console,
) -> None:
    """Train one model into ``directory``; every checkpoint also records the facts of the run so far."""
    training = recipe.training
    earlier = recorded_runs(directory) if resume else []
    # Another run must draw other windows, or it would start by repeating those of the run it continues.
    torch.manual_seed(seed + len(earlier))
    generator = torch.Generator().manual_seed(seed + len(earlier))
    model = initial_model(recipe, directory, resume=resume).train()
    optimizers = build_optimizers(model, training)
    peak_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    if not resume:
        save_checkpoint(model, directory)

    def checkpoint() -> None:
        seconds = time.monotonic() - start
        save_checkpoint(model, directory)
        run = {
            "seed": seed,
            "threads": torch.get_num_threads(),
            "steps": step,
            "tokens_seen": tokens_seen,
            "seconds": round(seconds, 1),
            "final_loss": round(smooth_loss, 4),
        }
        facts = {"parameters": model.num_parameters(), "corpus_tokens": tokens.numel(), "runs": [*earlier, run]}
        merge_metrics(directory, {"model": recipe.name, "training": facts})

    step, tokens_seen, smooth_loss, length = 0, 0, math.nan, 0
    batches: Iterator[torch.Tensor] = iter(())
    start = last_save = time.monotonic()
    columns = (
        TextColumn(recipe.name),
        BarColumn(),
        TextColumn("{task.percentage:5.1f}%  {task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=1) as bar:
        task = bar.add_task("", total=1.0)
        while (progress := budget.progress(step=step, seconds=time.monotonic() - start)) < 1.0:
            if training.sequence_length(progress) != length:
                length = training.sequence_length(progress)
                batches = windows(tokens, length, generator)
            rows = training.tokens_per_batch // length
            batch = torch.stack([next(batches) for _ in range(rows)])
            scale = learning_rate_scale(progress, training.warmup_share)
            for optimizer, peak in zip(optimizers, peak_rates, strict=True):
                optimizer.param_groups[0]["lr"] = peak * scale

            # float32 master weights with bfloat16 products: updates are not rounded away, and on a CPU with
            # bfloat16 instructions it is nearly as fast as training in bfloat16 throughout.
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=batch[:, :-1], use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

            step += 1
            tokens_seen += rows * length
            value = loss.item()
            smooth_loss = value if step == 1 else LOSS_SMOOTHING * smooth_loss + (1 - LOSS_SMOOTHING) * value
            now = time.monotonic()
            rate = tokens_seen / (now - start)
            spent = budget.progress(step=step, seconds=now - start)
            minutes_left = (now - start) * (1.0 / spent - 1.0) / 60.0
            status = f"step {step}  loss {smooth_loss:.3f}  {rate:,.0f} tok/s  seq {length}  ETA {minutes_left:.1f} min"
            bar.update(task, completed=spent, description=status)
            if not console.is_terminal and step % 20 == 0:
                console.print(f"{recipe.name}  {status}", highlight=False)
            if now - last_save > CHECKPOINT_SECONDS:
                checkpoint()
                last_save = time.monotonic()

    checkpoint()


def prepare_and_train(
    recipe: Recipe, corpus: Corpus, out: Path, budget: Budget, *, seed: int, resume: bool, console: Console
) -> None:
    """Tokenizer first, so the directory is usable within a minute; then the weights."""
    directory = out / recipe.name
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus.training_documents)
    save_tokenizer(tokenizer, directory, max_length=recipe.config["max_position_embeddings"])
    tokens = encode_documents(tokenizer, corpus.training_documents)
    console.print(f"{recipe.name}: {tokens.numel():,} training tokens", highlight=False)
    train(recipe, tokens, directory, budget, seed=seed, resume=resume, console=console)


@click.command(context_settings={"show_default": True})
@click.option("--model", type=click.Choice([*RECIPES, "all"]), default="all", help="Which model to make.")
@click.option("--minutes", type=click.FloatRange(min=0.01), help="Wall clock per model; else the recipe's.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps per model, in place of minutes.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(__file__).resolve().parent,
    show_default="the directory of this script",
    help="Where the model directories are written.",
)
@click.option("--seed", type=int, default=0, help="Seed of the document order and the initial weights.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads for torch; else torch's own choice.")
@click.option("--resume", is_flag=True, help="Start from the weights in --out, with a new schedule.")
@click.option("--eval", "eval_only", is_flag=True, help="Only measure: rewrite metrics.json and README.md.")
def main(
    model: str,
    minutes: float | None,
    steps: int | None,
    out: Path,
    seed: int,
    threads: int | None,
    resume: bool,
    eval_only: bool,
) -> None:
    """Train the demo models on the standard library's source, measure them and write their cards."""
    if minutes is not None and steps is not None:
        raise click.UsageError("--minutes and --steps both set the length of the run; give one of them")
    if threads is not None:
        torch.set_num_threads(threads)
    # The writer's bar for a single small shard would break up the training bar.
    disable_progress_bar()
    console = Console()
    corpus = build_corpus(seed=seed)
    for recipe in RECIPES.values() if model == "all" else [RECIPES[model]]:
        directory = out / recipe.name
        if (eval_only or resume) and not (directory / "model.safetensors").is_file():
            raise click.UsageError(f"{directory} has no model.safetensors; train it without --eval and --resume first")
        if not eval_only:
            budget = Budget(minutes=minutes or recipe.training.minutes, steps=steps)
            prepare_and_train(recipe, corpus, out, budget, seed=seed, resume=resume, console=console)
        evaluation = evaluate_model(directory, corpus.held_out, console=console)
        merge_metrics(directory, {"evaluation": evaluation})
        write_card(directory, recipe)
        console.print_json(json.dumps(evaluation))


if __name__ == "__main__":
    main()
