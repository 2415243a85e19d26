"""Greedy tokens of the compiled path against transformers in float32: the reference chains, and the full-size run.

    python -m xllm_compile.benchmarks.parity --record

Random weights of a real shape, every prompt length, all prompts in one batch with chunked prefill. A chain may leave
the reference only at a step where the reference itself is undecided (top-1/top-2 margin below MAX_UNDECIDED).
"""

import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from xllm_compile.benchmarks.record import Bar, make_record

DEMO_MODEL = Path(__file__).resolve().parents[1] / "models" / "demo" / "demo-code"

# Logits of the random models have a standard deviation of about 2.5; float32 sums in another order move them by 1e-5.
MAX_UNDECIDED = 1e-3
PROMPT_LENGTHS = (1, 7, 64, 300, 2000)
QWEN3_0_6B: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """A greedy continuation by the reference. ``margins`` are top-1 minus top-2 logits of each step."""

    prompt: list[int]
    tokens: list[int]
    margins: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Departure:
    """Where a chain left the reference; after it the two have different histories and are not comparable."""

    prompt_tokens: int
    step: int
    expected: int
    found: int
    margin: float

    @property
    def is_undecided(self) -> bool:
        return self.margin < MAX_UNDECIDED


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def save_random_model(
    directory: Path, config: Mapping[str, Any], *, dtype: torch.dtype, max_shard_size: str = "100GB", seed: int = 0
) -> None:
    """A checkpoint of ``config`` whose greedy tokens vary and are seldom near-ties.

    Each layer adds about as much as it is given, logits have a standard deviation near 2.5, norms and biases are
    not the ones and zeros that would hide a mistake.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = dict(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random_values(name, parameter, generator))
    # The end of a text is not what is compared.
    model.generation_config.eos_token_id = None
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)


def _random_values(name: str, parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    values = torch.randn(parameter.shape, generator=generator)
    if "norm" in name:
        return 1 + 0.2 * values
    if name.endswith("bias"):
        return 0.3 * values
    is_vocabulary = "embed_tokens" in name or "lm_head" in name
    return values * ((2.5 if is_vocabulary else 1.5) / math.sqrt(parameter.shape[1]))


def load_reference(model_dir: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model with its plain attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager").eval()


def reference_chain(model: Any, prompt: Sequence[int], num_tokens: int) -> Chain:
    """Greedy decoding by transformers, one prompt at a time."""
    ids = torch.tensor([list(prompt)])
    done = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(done.logits).float().topk(2).values
    return Chain(
        prompt=list(prompt),
        tokens=done.sequences[0, len(prompt) :].tolist(),
        margins=(best[:, 0] - best[:, 1]).tolist(),
    )


def departures(chains: Sequence[Chain], outputs: Sequence[Sequence[int]]) -> list[Departure]:
    """The first difference of each output from its chain. Raises ValueError when an output has another length."""
    found = []
    for chain, output in zip(chains, outputs, strict=True):
        for step, (expected, token) in enumerate(zip(chain.tokens, output, strict=True)):
            if expected != token:
                margin = chain.margins[step]
                found.append(
                    Departure(prompt_tokens=len(chain.prompt), step=step, expected=expected, found=token, margin=margin)
                )
                break
    return found


@click.command()
@click.option("--layers", default=QWEN3_0_6B["num_hidden_layers"], show_default=True)
@click.option("--tokens", default=32, show_default=True, help="Tokens generated for each prompt.")
@click.option("--seed", default=0, show_default=True)
@click.option("--record", is_flag=True, help="Write benchmarks/results/parity_qwen3_0_6b.json.")
def main(layers: int, tokens: int, seed: int, record: bool) -> None:
    """Compile a random Qwen3-0.6B in float32 and compare its greedy tokens with transformers'."""
    raw, bars = measure(layers, tokens, seed)
    for bar in bars:
        click.echo(f"{bar.what}: {bar.value:g} {bar.unit} (bar {bar.bar or 'none'})")
    if record:
        command = ["python", "-m", "xllm_compile.benchmarks.parity", *sys.argv[1:]]
        click.echo(str(make_record("parity_qwen3_0_6b", command, seed=seed, raw=raw, bars=bars).write()))
    sys.exit(any(bar.met is False for bar in bars))


def measure(layers: int, tokens: int, seed: int) -> tuple[dict[str, Any], list[Bar]]:
    config = {**QWEN3_0_6B, "num_hidden_layers": layers}
    prompts = random_prompts(PROMPT_LENGTHS, config["vocab_size"], seed)
    compile_options = ["--dtype", "float32", "--buckets", "1,5", "--max-model-len", "2304"]
    with tempfile.TemporaryDirectory() as folder:
        model_dir, artifact = Path(folder) / "model", Path(folder) / "model.xllm"
        save_random_model(model_dir, config, dtype=torch.float32, seed=seed)
        # Prompts are token ids; any tokenizer opens the artifact.
        shutil.copyfile(DEMO_MODEL / "tokenizer.json", model_dir / "tokenizer.json")
        model = load_reference(model_dir)
        chains = [reference_chain(model, prompt, tokens) for prompt in prompts]
        # Two models of this size need not be in memory together.
        del model
        command = [sys.executable, "-m", "xllm_compile.cli", str(model_dir), "-o", str(artifact), *compile_options]
        subprocess.run(command, check=True)
        runs, graphs = _run_all(artifact, prompts, tokens)
    found = {name: departures(chains, outputs) for name, outputs in runs.items()}
    everything = [departure for listed in found.values() for departure in listed]
    raw = {
        "config": config,
        "compile_options": compile_options,
        "prompt_tokens": PROMPT_LENGTHS,
        "generated_tokens": tokens,
        "num_chains": sum(map(len, runs.values())),
        "smallest_margins": [min(chain.margins) for chain in chains],
        "distinct_tokens": [len(set(chain.tokens)) for chain in chains],
        "departures": {name: [asdict(departure) for departure in listed] for name, listed in found.items()},
        "graph_cache": graphs,
    }
    decided = sum(not departure.is_undecided for departure in everything)
    bars = [
        Bar(what="chains that differ where transformers is decided by 1e-3", value=decided, unit="chains", bar="<= 0"),
        Bar(what="chains that differ at all", value=len(everything), unit="chains"),
    ]
    return raw, bars


def _run_all(artifact: Path, prompts: list[list[int]], tokens: int) -> tuple[dict[str, list[list[int]]], Any]:
    """The prompts in one batch, and one by one."""
    from xllm_compile import LLM, SamplingParams

    llm = LLM(artifact, max_num_seqs=8)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens)
    batch = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    alone = [llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]
    return {"one mixed batch": batch, "one by one": alone}, llm.engine.stats().graph_cache.by_outcome()


if __name__ == "__main__":
    main()
