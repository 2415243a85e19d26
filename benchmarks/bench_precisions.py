"""Prefill and decode at every precision against the machine's limits: bytes that a step reads, products that it makes.

Each precision is an artifact of its own with layers and head rounded; all run in turns, the limits around each, and the
read bandwidth around each call that it bounds. A decode step reads all weights and the KV of its contexts, which is
bfloat16 but where the precision says int8.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from xllm_compile.benchmarks.artifacts import artifact_of_shape
from xllm_compile.benchmarks.bench_latency import Case, LimitedRates, prompts_of, shares
from xllm_compile.benchmarks.checkpoints import Shape
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.engine_process import EngineProcess, Generation
from xllm_compile.benchmarks.limits import measure_limits, with_read_of_now
from xllm_compile.benchmarks.load import ForeignLoad, wait_quiet
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.roofline import linear_parameters, prefill_flops
from xllm_compile.benchmarks.timing import summarise
from xllm_compile.models.config import DecoderConfig
from xllm_compile.runtime.artifact import Manifest

# Ends the name of a precision whose KV cache is int8; what comes before is its scheme of --quantize.
INT8_KV = ", KV int8"
# Share of read bandwidth that decode at batch 1 is to reach.
PRECISIONS = {
    "none": ">= 0.9",
    "int8": ">= 0.85",
    "int4": ">= 0.75",
    "int8-dynamic": "",
    "int4-dynamic": "",
    f"none{INT8_KV}": "",
    f"int4{INT8_KV}": "",
}
DECODE = Case(name="decode batch 1, context 128", num_seqs=1, prompt_tokens=128, num_tokens=48)
LONG = Case(name="decode batch 1, context 2048", num_seqs=1, prompt_tokens=2048, num_tokens=32)
WIDE = Case(name="decode batch 32, context 128", num_seqs=32, prompt_tokens=128, num_tokens=12)
PREFILL = Case(name="prefill 512", num_seqs=1, prompt_tokens=512)
LONG_PREFILL = Case(name="prefill 2048", num_seqs=1, prompt_tokens=LONG.prompt_tokens)
CASES = (DECODE, LONG, WIDE, PREFILL, LONG_PREFILL)
# Of a call of LONG the first part is LONG_PREFILL.
RUN = (DECODE, LONG, WIDE, PREFILL)
READ_BOUND = (DECODE, LONG)


Figures = dict[str, dict[str, LimitedRates]]
"""By precision, then by case."""


def run_precisions(
    shape: Shape, work_dir: Path, results: Path, command: Sequence[str], *, seed: int, rounds: int
) -> None:
    """Measure and write precisions_SHAPE.json."""
    artifacts = {}
    for precision in PRECISIONS:
        say(f"building {shape.name}, {precision}")
        scheme = precision.removesuffix(INT8_KV)
        kv_cache_dtype = "auto" if scheme == precision else "int8"
        artifacts[precision] = artifact_of_shape(
            shape, work_dir, seed=seed, quantize=scheme, kv_cache_dtype=kv_cache_dtype
        )
    figures = _measure(shape, {name: path for name, (path, _) in artifacts.items()}, rounds=rounds, seed=seed)
    manifests = {name: manifest for name, (_, manifest) in artifacts.items()}
    raw = {
        "shape": shape.hf_config(),
        "cases": [asdict(case) for case in CASES],
        "weights_bytes": {name: manifest.memory_plan["weights_bytes"] for name, manifest in manifests.items()},
        "kv_bytes_per_token": {name: each.memory_plan["kv_bytes_per_token"] for name, each in manifests.items()},
        "tokens_per_s": {name: {case: found.to_json() for case, found in of.items()} for name, of in figures.items()},
    }
    _show(shape, figures)
    finish(
        make_record(f"precisions_{shape.record_name}", command, seed=seed, raw=raw, bars=_bars(figures, manifests)),
        results,
    )


def _measure(shape: Shape, artifacts: Mapping[str, Path], *, rounds: int, seed: int) -> Figures:
    """All precisions on all cases in each round, the order turned around in every second."""
    prompts = prompts_of(CASES, shape, seed)
    figures: Figures = {name: {case.name: LimitedRates() for case in CASES} for name in artifacts}
    with ExitStack() as stack:
        engines = [
            stack.enter_context(EngineProcess(name, "engine_xllm", [str(path)])) for name, path in artifacts.items()
        ]
        for engine in engines:
            engine.wait_ready()
            for case in RUN:
                engine.generate(prompts[case.name], 1 if case.is_prefill else 4)
        for index in range(rounds):
            before = measure_limits(artifacts["none"])
            for engine in engines if index % 2 == 0 else reversed(engines):
                wait_quiet()
                found = figures[engine.name]
                for case in RUN:
                    with ForeignLoad() as load:
                        done = engine.generate(prompts[case.name], 1 + case.num_tokens)
                    for name, rate in rates_of(case, done).items():
                        found[name].add(rate, load)
                    if case in READ_BOUND:
                        after = with_read_of_now(before, artifacts["none"])
                        found[case.name].add_limits(before, after)
                        before = after
                after = measure_limits(artifacts["none"])
                for rates in found.values():
                    rates.add_limits(before, after)
                reads = [limits.read_gb_per_s for limits in found[DECODE.name].limits[-1]]
                say(
                    f"round {index + 1} of {rounds}, {engine.name}: decode {found[DECODE.name].tokens_per_s[-1]:.1f}"
                    f" tok/s; read {reads[0]:.0f} then {reads[1]:.0f} GB/s"
                )
                before = after
    return figures


def rates_of(case: Case, done: Generation) -> dict[str, float]:
    """tok/s of one call, by the name of each case that it is a call of."""
    prefill = case.prompt_tokens / done.first_s
    rates = {case.name: prefill if case.is_prefill else done.decode_tokens_per_s}
    return rates | {LONG_PREFILL.name: prefill} if case is LONG else rates


def _bars(figures: Figures, manifests: Mapping[str, Manifest]) -> list[Bar]:
    config = DecoderConfig.from_json(manifests["none"].model_config)
    bars = []
    for name, bar in PRECISIONS.items():
        memory = manifests[name].memory_plan
        for case, limit in ((DECODE, bar), (LONG, ">= 0.92" if name == "none" else "")):
            # The contexts of the tokens that are generated: half of them on average beyond the prompt.
            context = case.prompt_tokens + case.num_tokens // 2
            cost = memory["weights_bytes"] + context * memory["kv_bytes_per_token"]
            bars.append(_share(figures, name, case, cost, "read_gb_per_s", "of read bandwidth", limit))
    for case, limit in ((PREFILL, ">= 0.85"), (LONG_PREFILL, ">= 0.75")):
        flops = prefill_flops(config, case.prompt_tokens) / case.prompt_tokens
        bars.append(_share(figures, "none", case, flops, "bf16_gemm_gflops", "of the bf16 GEMM peak", limit))
    products = 2 * (linear_parameters(config) + config.vocab_size * config.hidden_size)
    of = "of the rate of 32 packed rows"
    bars.append(_share(figures, "none", WIDE, products, "bf16_packed_32_gflops", of, ">= 0.8"))
    for case in CASES:
        for name in list(PRECISIONS)[1:]:
            is_promised = (name, case) == ("int8-dynamic", PREFILL)
            ratio = _median(figures[name][case.name]) / _median(figures["none"][case.name])
            what = f"{_label(name)}, {case.name}: against bfloat16"
            bars.append(Bar(what=what, value=ratio, unit="x", bar=">= 1.6" if is_promised else ""))
    for name in (name for name in PRECISIONS if name.endswith(INT8_KV)):
        base = name.removesuffix(INT8_KV)
        for case, bar in ((LONG, "> 1"), (LONG_PREFILL, "")):
            ratio = _median(figures[name][case.name]) / _median(figures[base][case.name])
            what = f"{_label(name)}, {case.name}: against KV in bfloat16"
            bars.append(Bar(what=what, value=ratio, unit="x", bar=bar))
    return bars


def _share(figures: Figures, name: str, case: Case, cost: float, limit: str, what: str, bar: str) -> Bar:
    """``cost`` in bytes or operations of one token."""
    found = figures[name][case.name]
    value = summarise(shares(found.tokens_per_s, found.limits, cost, limit)).median
    return Bar(what=f"{_label(name)}, {case.name}: {what}", value=value, unit="share", bar=bar)


def _median(found: LimitedRates) -> float:
    return summarise(found.tokens_per_s).median


def _label(precision: str) -> str:
    return precision.replace("none", "bfloat16")


def _show(shape: Shape, figures: Figures) -> None:
    rows = [(case.name, *(f"{_median(figures[name][case.name]):.1f}" for name in PRECISIONS)) for case in CASES]
    show_table(f"{shape.name}, tok/s", ("case", *map(_label, PRECISIONS)), rows)
