"""Prefill and decode of one request: against the machine's limits, and against transformers, in turns."""

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.artifacts import artifact_of_shape
from xllm_compile.benchmarks.checkpoints import Shape, checkpoint
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.engine_process import EngineProcess, TokenIds
from xllm_compile.benchmarks.limits import Limits, measure_limits
from xllm_compile.benchmarks.load import ForeignLoad, wait_quiet
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.roofline import prefill_flops
from xllm_compile.benchmarks.timing import summarise
from xllm_compile.models.config import DecoderConfig
from xllm_compile.runtime.artifact import Manifest

OURS, EAGER, COMPILED = "xllm-compile", "transformers eager", "transformers compiled"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One workload. A prefill case makes one token, a decode case ``num_tokens`` after the first."""

    name: str
    num_seqs: int
    prompt_tokens: int
    num_tokens: int = 0
    engines: tuple[str, ...] = (OURS, EAGER)
    """transformers compiles every shape anew, for minutes: only the shapes with a bar are asked of it."""
    calls_per_round: int = 1

    @property
    def is_prefill(self) -> bool:
        return self.num_tokens == 0


PREFILL = Case(name="prefill 512", num_seqs=1, prompt_tokens=512, engines=(OURS, EAGER, COMPILED), calls_per_round=3)
DECODE = Case(
    name="decode batch 1, context 128",
    num_seqs=1,
    prompt_tokens=128,
    num_tokens=48,
    engines=(OURS, EAGER, COMPILED),
    calls_per_round=3,
)
CASES = (
    PREFILL,
    DECODE,
    Case(name="decode batch 1, context 2048", num_seqs=1, prompt_tokens=2048, num_tokens=24),
    Case(name="decode batch 8, context 128", num_seqs=8, prompt_tokens=128, num_tokens=24),
    Case(name="decode batch 32, context 128", num_seqs=32, prompt_tokens=128, num_tokens=12),
)


@dataclass(kw_only=True, slots=True)
class LimitedRates:
    """tok/s of one engine on one case, and the limits measured around each of them."""

    tokens_per_s: list[float] = field(default_factory=list)
    limits: list[tuple[Limits, Limits]] = field(default_factory=list)
    foreign_cores: list[float] = field(default_factory=list)

    def add(self, rate: float, load: ForeignLoad) -> None:
        """Of one call; add_limits() is to follow."""
        self.tokens_per_s.append(rate)
        self.foreign_cores.append(load.cores)

    def add_limits(self, before: Limits, after: Limits) -> None:
        """Measured around all rates that have none yet."""
        self.limits += [(before, after)] * (len(self.tokens_per_s) - len(self.limits))

    def to_json(self) -> dict[str, Any]:
        return {
            **summarise(self.tokens_per_s).to_json(),
            # Of each value in turn.
            "limits_before_and_after": [[asdict(before), asdict(after)] for before, after in self.limits],
            "foreign_cores": self.foreign_cores,
        }


Figures = dict[str, dict[str, LimitedRates]]


def run_latency(
    shape: Shape, work_dir: Path, results: Path, command: Sequence[str], *, seed: int, rounds: int, num_checked: int
) -> None:
    """Measure and write latency_SHAPE.json."""
    artifact, manifest = artifact_of_shape(shape, work_dir, seed=seed)
    model_dir = checkpoint(shape, work_dir, seed=seed)
    say("comparing first tokens in float32")
    agreement = check_first_tokens(shape, work_dir, seed=seed, num_prompts=num_checked)
    figures = _measure(artifact, model_dir, prompts_of(CASES, shape, seed), rounds)
    name = f"latency_{shape.record_name}"
    bars = [*_limit_bars(figures, manifest), *_ratio_bars(figures)]
    bars.append(Bar(what="float32 first tokens equal to transformers'", value=agreement, unit="share", bar=">= 1"))
    raw = {
        "shape": shape.hf_config(),
        "cases": [asdict(case) for case in CASES],
        "weights_bytes": manifest.memory_plan["weights_bytes"],
        "prefill_flops": prefill_flops(DecoderConfig.from_json(manifest.model_config), PREFILL.prompt_tokens),
        "tokens_per_s": {
            case: {name: found.to_json() for name, found in engines.items()} for case, engines in figures.items()
        },
        "num_first_tokens_checked": num_checked,
    }
    _show(shape, figures)
    finish(make_record(name, command, seed=seed, raw=raw, bars=bars), results)


def check_first_tokens(shape: Shape, work_dir: Path, *, seed: int, num_prompts: int) -> float:
    """Share of random prompts whose first greedy token is transformers', both in float32."""
    artifact, _ = artifact_of_shape(shape, work_dir, seed=seed, dtype="float32")
    rng = random.Random(seed)
    prompts = [[rng.randrange(shape.num_words) for _ in range(rng.randrange(8, 65))] for _ in range(num_prompts)]
    first: list[list[int]] = []
    arguments = [str(checkpoint(shape, work_dir, seed=seed)), "eager", "--dtype", "float32"]
    for module, given in (("engine_xllm", [str(artifact)]), ("engine_transformers", arguments)):
        with EngineProcess(module, module, given) as engine:
            engine.wait_ready()
            first.append([engine.generate([prompt], 1).token_ids[0][0] for prompt in prompts])
    num_equal = [ours == theirs for ours, theirs in zip(*first, strict=True)].count(True)
    return num_equal / num_prompts


def prompts_of(cases: Sequence[Case], shape: Shape, seed: int) -> dict[str, list[TokenIds]]:
    """Random tokens for each case."""
    rng = random.Random(seed)
    return {
        case.name: [[rng.randrange(shape.num_words) for _ in range(case.prompt_tokens)] for _ in range(case.num_seqs)]
        for case in cases
    }


def _measure(artifact: Path, model_dir: Path, prompts: Mapping[str, list[TokenIds]], rounds: int) -> Figures:
    """Every engine on every case, one after the other in each round, the order turned around in every second."""
    figures: Figures = {case.name: {engine: LimitedRates() for engine in case.engines} for case in CASES}
    with ExitStack() as stack:
        arguments = {
            OURS: ("engine_xllm", [str(artifact)]),
            EAGER: ("engine_transformers", [str(model_dir), "eager"]),
            COMPILED: ("engine_transformers", [str(model_dir), "compile"]),
        }
        wanted = {engine for case in CASES for engine in case.engines}
        engines = [
            stack.enter_context(EngineProcess(name, module, given))
            for name, (module, given) in arguments.items()
            if name in wanted
        ]
        for engine in engines:
            engine.wait_ready()
        for engine in engines:
            say(f"warming up {engine.name}")
            _warm_up(engine, prompts)
        for index in range(rounds):
            before = measure_limits(artifact)
            for engine in engines if index % 2 == 0 else reversed(engines):
                quiet = wait_quiet()
                for case in (case for case in CASES if engine.name in case.engines):
                    with ForeignLoad() as load:
                        values = [_tokens_per_s(engine, case, prompts[case.name]) for _ in range(case.calls_per_round)]
                    found = figures[case.name][engine.name]
                    found.tokens_per_s += values
                    found.foreign_cores.append(load.cores)
                after = measure_limits(artifact)
                for case in (case for case in CASES if engine.name in case.engines):
                    figures[case.name][engine.name].add_limits(before, after)
                decode = figures[DECODE.name][engine.name].tokens_per_s[-1]
                say(
                    f"round {index + 1} of {rounds}, {engine.name}: decode {decode:.1f} tok/s; read"
                    f" {before.read_gb_per_s:.0f} then {after.read_gb_per_s:.0f} GB/s; others used {quiet:.2f} cores"
                )
                before = after
    return figures


def _warm_up(engine: EngineProcess, prompts: Mapping[str, list[TokenIds]]) -> None:
    """Three calls of each case: transformers compiles on the first, and once more when its cache is reused."""
    for case in (case for case in CASES if engine.name in case.engines):
        for _ in range(3 if engine.name == COMPILED else 1):
            engine.generate(prompts[case.name], 1 if case.is_prefill else 4)


def _tokens_per_s(engine: EngineProcess, case: Case, prompts: list[TokenIds]) -> float:
    done = engine.generate(prompts, 1 + case.num_tokens)
    return case.prompt_tokens / done.first_s if case.is_prefill else done.decode_tokens_per_s


def shares(
    rates: Sequence[float], limits: Sequence[tuple[Limits, Limits]], cost: float, field_name: str
) -> list[float]:
    """What share of its limit each rate (steps/s) used; a step costs ``cost``, the limit is the mean of the two around
    the rate, in thousand millions per second."""
    return [
        rate * cost / ((getattr(before, field_name) + getattr(after, field_name)) / 2 * 1e9)
        for rate, (before, after) in zip(rates, limits, strict=True)
    ]


def _limit_bars(figures: Figures, manifest: Manifest) -> list[Bar]:
    decode, prefill = figures[DECODE.name][OURS], figures[PREFILL.name][OURS]
    weights = manifest.memory_plan["weights_bytes"]
    flops = prefill_flops(DecoderConfig.from_json(manifest.model_config), PREFILL.prompt_tokens)
    prompts_per_s = [rate / PREFILL.prompt_tokens for rate in prefill.tokens_per_s]
    of_read = shares(decode.tokens_per_s, decode.limits, weights, "read_gb_per_s")
    of_gemm = shares(prompts_per_s, prefill.limits, flops, "bf16_gemm_gflops")
    of_registers = shares(prompts_per_s, prefill.limits, flops, "bf16_register_gflops")
    return [
        Bar(what=DECODE.name, value=summarise(decode.tokens_per_s).median, unit="tok/s"),
        Bar(what=f"{DECODE.name}: of read bandwidth", value=summarise(of_read).median, unit="share", bar=">= 0.5"),
        Bar(what=PREFILL.name, value=summarise(prefill.tokens_per_s).median, unit="tok/s"),
        Bar(what=f"{PREFILL.name}: of the bf16 GEMM peak", value=summarise(of_gemm).median, unit="share", bar=">= 0.6"),
        Bar(what=f"{PREFILL.name}: of the bf16 register peak", value=summarise(of_registers).median, unit="share"),
    ]


def _ratio_bars(figures: Figures) -> list[Bar]:
    bars = []
    for case in CASES:
        ours = summarise(figures[case.name][OURS].tokens_per_s).median
        for engine in case.engines[1:]:
            ratio = ours / summarise(figures[case.name][engine].tokens_per_s).median
            bar = "> 1" if case in (PREFILL, DECODE) else ""
            bars.append(Bar(what=f"{case.name}: against {engine}", value=ratio, unit="x", bar=bar))
    return bars


def _show(shape: Shape, figures: Figures) -> None:
    rows = []
    for case in CASES:
        for engine, found in figures[case.name].items():
            summary = summarise(found.tokens_per_s)
            rows.append((case.name, engine, *(f"{x:.1f}" for x in (summary.median, summary.min, summary.max))))
    show_table(f"{shape.name}, bfloat16, tok/s", ("case", "engine", "median", "min", "max"), rows)
