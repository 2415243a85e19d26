"""The adaptive graph against eager: the same programs, kernels and weights, compiled or run operator by operator.

Four ways to run a model take turns in one process: full graphs, partial graphs (attention outside), eager, and eager
without the passes that a target can do without, which is nearer to what a framework's eager mode runs.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from xllm_compile.benchmarks.artifacts import compile_model
from xllm_compile.benchmarks.checkpoints import Shape, checkpoint
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.engine_process import Generation, TokenIds
from xllm_compile.benchmarks.engine_xllm import XllmAdapter
from xllm_compile.benchmarks.load import ForeignLoad, wait_quiet
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.timing import Summary, measure_in_turns, summarise
from xllm_compile.graph_passes.pipeline import cpu_pipeline

FULL, PARTIAL, EAGER, UNFUSED = "full graph", "partial graph", "eager", "eager, unfused"
_BATCHES = (1, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Of one shape and batch: seconds a token of each way, in rounds."""

    tpot_s: dict[str, Summary]
    equal_share: float
    """Of the tokens, those before full graph and eager part: their cos and sin may differ in the last bit, and with
    random weights two tokens are often as good as each other."""

    def ratio(self, other: str) -> float:
        """Seconds a token with the full graph over the other way's, the median of neighbouring runs."""
        pairs = zip(self.tpot_s[FULL].values, self.tpot_s[other].values, strict=True)
        return summarise([full / slow for full, slow in pairs]).median


def run_adaptive(
    shapes: Sequence[Shape],
    work_dir: Path,
    results: Path,
    command: Sequence[str],
    *,
    seed: int,
    rounds: int,
    prompt_tokens: int,
    output_tokens: int,
) -> None:
    """Measure and write adaptive_graph.json. The bars are on the last shape."""
    found: dict[str, dict[int, Found]] = {}
    foreign = {}
    for shape in shapes:
        adapters = _open(shape, work_dir, seed)
        wait_quiet()
        with ForeignLoad() as load:
            found[shape.name] = {
                batch: _measure(adapters, shape, batch, prompt_tokens, output_tokens, seed=seed, rounds=rounds)
                for batch in _BATCHES
            }
        foreign[shape.name] = load.cores
    for name, by_batch in found.items():
        rows = [
            (str(batch), way, f"{summary.median * 1e3:.2f}", f"{batch / summary.median:.1f}")
            for batch, each in by_batch.items()
            for way, summary in each.tpot_s.items()
        ]
        show_table(f"decode, {name}", ("batch", "way", "TPOT ms", "tok/s"), rows)
    raw = {
        "shapes": {shape.name: shape.hf_config() for shape in shapes},
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "foreign_cores": foreign,
        "tpot_s": {
            name: {
                str(batch): {way: summary.to_json() for way, summary in each.tpot_s.items()}
                for batch, each in by_batch.items()
            }
            for name, by_batch in found.items()
        },
    }
    bars = [bar for shape in shapes for bar in _bars(shape.name, found[shape.name], has_limits=shape is shapes[-1])]
    finish(make_record("adaptive_graph", command, seed=seed, raw=raw, bars=bars), results)


def _bars(name: str, by_batch: Mapping[int, Found], *, has_limits: bool) -> list[Bar]:
    bars = []
    for batch, found in by_batch.items():
        ratio = found.ratio(EAGER)
        what = f"{name}, batch {batch}: full graph against eager"
        bars += [
            Bar(
                what=f"{what}, throughput",
                value=(1 / ratio - 1) * 100,
                unit="%",
                bar=">= 27" if has_limits else "",
            ),
            Bar(what=f"{what}, TPOT", value=(ratio - 1) * 100, unit="%", bar="<= -22" if has_limits else ""),
            Bar(what=f"{what}, tokens before the first other one", value=found.equal_share, unit="share"),
        ]
        bars += [
            Bar(
                what=f"{name}, batch {batch}: full graph against {other}, throughput",
                value=(1 / found.ratio(other) - 1) * 100,
                unit="%",
            )
            for other in (PARTIAL, UNFUSED)
        ]
    return bars


def _open(shape: Shape, work_dir: Path, seed: int) -> dict[str, XllmAdapter]:
    """Every way on artifacts of its own, with buckets for the batches measured."""
    optional = [word for step in cpu_pipeline() if step.required_in is None for word in ("--disable-pass", step.name)]
    options = {
        FULL: ["--graph-mode", "full"],
        PARTIAL: ["--graph-mode", "partial"],
        UNFUSED: ["--graph-mode", "eager", *optional],
    }
    buckets = ["--buckets", ",".join(map(str, (*_BATCHES, 128))), "--max-num-batched-tokens", "128"]
    artifacts = {}
    for way, given in options.items():
        say(f"compiling {shape.name}: {way}")
        name = "".join(char if char.isalnum() else "-" for char in f"{shape.name}-adaptive-{way}")
        artifacts[way] = work_dir / "artifacts" / f"{name}.xllm"
        compile_model(checkpoint(shape, work_dir, seed=seed), artifacts[way], [*buckets, *given])
    return {
        FULL: XllmAdapter(artifacts[FULL]),
        PARTIAL: XllmAdapter(artifacts[PARTIAL]),
        EAGER: XllmAdapter(artifacts[FULL], enforce_eager=True),
        UNFUSED: XllmAdapter(artifacts[UNFUSED]),
    }


def _measure(
    adapters: Mapping[str, XllmAdapter],
    shape: Shape,
    batch: int,
    prompt_tokens: int,
    output_tokens: int,
    *,
    seed: int,
    rounds: int,
) -> Found:
    rng = random.Random(seed)
    prompts: list[TokenIds] = [[rng.randrange(shape.num_words) for _ in range(prompt_tokens)] for _ in range(batch)]
    done: dict[str, list[Generation]] = {way: [] for way in adapters}

    def generate(way: str) -> None:
        done[way].append(adapters[way].generate(prompts, 1 + output_tokens))

    measure_in_turns({way: partial(generate, way) for way in adapters}, warmup=1, repeats=rounds)
    # The first run of each is the warm-up. Every token of a batch takes a step.
    tpot_s = {way: summarise([batch / run.decode_tokens_per_s for run in runs[1:]]) for way, runs in done.items()}
    shares = [
        next((at for at, (full, eager) in enumerate(zip(*pair, strict=True)) if full != eager), len(pair[0]))
        / len(pair[0])
        for pair in zip(done[FULL][-1].token_ids, done[EAGER][-1].token_ids, strict=True)
    ]
    return Found(tpot_s=tpot_s, equal_share=sum(shares) / len(shares))
