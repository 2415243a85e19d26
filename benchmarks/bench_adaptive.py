"""The adaptive graph against two things that are both called eager: our kernels without graphs, and no compiler at all.

Five ways to run one model definition take turns: full graphs; partial graphs (attention outside); the same programs and
kernels launched one by one; these without the passes that a target can do without; and the definition as it is written,
in stock torch operators launched one by one, with neither capture nor passes nor kernels of ours (engine_stock.py, in a
process of its own, which is idle while others run).
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from xllm_compile.benchmarks.artifacts import compile_model
from xllm_compile.benchmarks.checkpoints import Shape, checkpoint
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.engine_process import Adapter, EngineProcess, Generation, TokenIds
from xllm_compile.benchmarks.engine_xllm import XllmAdapter
from xllm_compile.benchmarks.load import ForeignLoad, wait_quiet
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.timing import Summary, measure_in_turns, summarise
from xllm_compile.graph_passes.pipeline import cpu_pipeline

FULL, PARTIAL = "full graph", "partial graph"
OWN_EAGER, OWN_UNFUSED = "our kernels, eager", "our kernels, eager, fewer fusions"
STOCK_EAGER = "stock torch operators, eager"
WAYS = {
    FULL: "compiled graphs; the layers are one native call",
    PARTIAL: "compiled graphs cut at the attention, which is launched by itself",
    OWN_EAGER: "the same fused programs and packed kernels, each launched from Python: what graphs alone bring",
    OWN_UNFUSED: "as before, without the passes that can be left out: what these passes bring, too",
    STOCK_EAGER: "the model definition in torch's own operators: what the whole compiler brings",
}
_BARS = (
    "+27.4% throughput and -22.0% TPOT are what xLLM reports for Qwen3-1.7B with its adaptive graph on and off"
    " (arXiv 2510.14686, table 8), on an NPU where a launch costs 5 to 50 us. Here it is the bar between the compiler"
    " on and off, so against stock operators. Against our own kernels launched eagerly there is none: a launch on a CPU"
    " costs a microsecond or few, and the kernels on either side are the same."
)
_NOISE = (
    "A bar is the median over rounds of ratios of neighbouring runs, so that drift of the machine meets both sides;"
    " ratios has all of them. A difference smaller than their spread is noise."
)
_BATCHES = (1, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Of one shape and batch: seconds a token of each way, in rounds."""

    tpot_s: dict[str, Summary]
    equal_share: float
    """Of the tokens, those before full graph and eager part: their cos and sin may differ in the last bit, and with
    random weights two tokens are often as good as each other."""

    def ratios(self, other: str) -> Summary:
        """Seconds a token with the full graph over the other way's, of neighbouring runs."""
        pairs = zip(self.tpot_s[FULL].values, self.tpot_s[other].values, strict=True)
        return summarise([full / slow for full, slow in pairs])


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
        with _open(shape, work_dir, seed) as adapters:
            wait_quiet()
            with ForeignLoad() as load:
                found[shape.name] = {
                    batch: _measure(adapters, shape, batch, prompt_tokens, output_tokens, seed=seed, rounds=rounds)
                    for batch in _BATCHES
                }
        foreign[shape.name] = load.cores
    for name, by_batch in found.items():
        rows = [
            (str(batch), way, f"{summary.median * 1e3:.2f}", f"{batch / summary.median:.1f}", _spread(each.ratios(way)))
            for batch, each in by_batch.items()
            for way, summary in each.tpot_s.items()
        ]
        show_table(f"decode, {name}", ("batch", "way", "TPOT ms", "tok/s", "full graph's TPOT / this"), rows)
    raw = {
        "ways": WAYS,
        "notes": {"bars": _BARS, "noise": _NOISE},
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
        "ratios": {
            name: {
                str(batch): {way: each.ratios(way).to_json() for way in WAYS if way != FULL}
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
        for other in WAYS:
            if other == FULL:
                continue
            ratio, what = found.ratios(other).median, f"{name}, batch {batch}: full graph against {other}"
            is_limited = has_limits and other == STOCK_EAGER
            bars += [
                Bar(
                    what=f"{what}, throughput", value=(1 / ratio - 1) * 100, unit="%", bar=">= 27" if is_limited else ""
                ),
                Bar(what=f"{what}, TPOT", value=(ratio - 1) * 100, unit="%", bar="<= -22" if is_limited else ""),
            ]
        what = f"{name}, batch {batch}: full graph and {OWN_EAGER}, tokens before the first other one"
        bars.append(Bar(what=what, value=found.equal_share, unit="share"))
    return bars


def _spread(ratios: Summary) -> str:
    return f"{ratios.median:.3f} ({ratios.min:.3f} to {ratios.max:.3f})"


@contextmanager
def _open(shape: Shape, work_dir: Path, seed: int) -> Iterator[dict[str, Adapter]]:
    """Every way on artifacts of its own, with buckets for the batches measured."""
    optional = [word for step in cpu_pipeline() if step.required_in is None for word in ("--disable-pass", step.name)]
    options = {
        FULL: ["--graph-mode", "full"],
        PARTIAL: ["--graph-mode", "partial"],
        OWN_UNFUSED: ["--graph-mode", "eager", *optional],
    }
    buckets = ["--buckets", ",".join(map(str, (*_BATCHES, 128))), "--max-num-batched-tokens", "128"]
    model_dir, artifacts = checkpoint(shape, work_dir, seed=seed), {}
    for way, given in options.items():
        say(f"compiling {shape.name}: {way}")
        name = "".join(char if char.isalnum() else "-" for char in f"{shape.name}-adaptive-{way}")
        artifacts[way] = work_dir / "artifacts" / f"{name}.xllm"
        compile_model(model_dir, artifacts[way], [*buckets, *given])
    with EngineProcess(STOCK_EAGER, "engine_stock", [str(model_dir)]) as stock:
        stock.wait_ready()
        yield {
            FULL: XllmAdapter(artifacts[FULL]),
            PARTIAL: XllmAdapter(artifacts[PARTIAL]),
            OWN_EAGER: XllmAdapter(artifacts[FULL], enforce_eager=True),
            OWN_UNFUSED: XllmAdapter(artifacts[OWN_UNFUSED]),
            STOCK_EAGER: stock,
        }


def _measure(
    adapters: Mapping[str, Adapter],
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
        for pair in zip(done[FULL][-1].token_ids, done[OWN_EAGER][-1].token_ids, strict=True)
    ]
    return Found(tpot_s=tpot_s, equal_share=sum(shares) / len(shares))
