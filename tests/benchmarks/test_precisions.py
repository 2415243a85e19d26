from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks.test_roofline import CONFIG, LIMITS
from xllm_compile.benchmarks.bench_latency import LimitedRates
from xllm_compile.benchmarks.bench_precisions import CASES, INT8_KV, PRECISIONS, _bars

WEIGHTS = {"none": 1_000_000_000, "int8": 500_000_000, "int4": 250_000_000}
WEIGHTS |= {f"{name}-dynamic": WEIGHTS[name] for name in ("int8", "int4")}
MANIFESTS: dict[str, Any] = {
    name: SimpleNamespace(
        memory_plan={
            "weights_bytes": WEIGHTS[name.removesuffix(INT8_KV)],
            "kv_bytes_per_token": 50_000 if name.endswith(INT8_KV) else 100_000,
        },
        model_config=asdict(CONFIG),
    )
    for name in PRECISIONS
}


def bars_of(rates):
    """Every case of a precision at one rate in tok/s; with KV in int8 it is 1.1 times that."""
    rates = {name: rates[name.removesuffix(INT8_KV)] * (1.1 if name.endswith(INT8_KV) else 1) for name in PRECISIONS}
    figures = {
        name: {
            case.name: LimitedRates(
                tokens_per_s=[rates[name]] * 3, limits=[(LIMITS, LIMITS)] * 3, foreign_cores=[0.0] * 3
            )
            for case in CASES
        }
        for name in PRECISIONS
    }
    return {bar.what: bar for bar in _bars(figures, MANIFESTS)}


def test_a_decode_step_reads_weights_and_the_kv_of_its_context():
    bars = bars_of({"none": 38.0, "int8": 70.0, "int4": 100.0, "int8-dynamic": 60.0, "int4-dynamic": 90.0})
    short = bars["bfloat16, decode batch 1, context 128: of read bandwidth"]
    # 128 tokens and half of the 48 that follow.
    assert short.value == pytest.approx(38 * (1e9 + 152 * 1e5) / 40e9) and short.met
    long = bars["bfloat16, decode batch 1, context 2048: of read bandwidth"]
    assert long.value == pytest.approx(38 * (1e9 + 2064 * 1e5) / 40e9)
    small = bars["bfloat16, KV int8, decode batch 1, context 2048: of read bandwidth"]
    assert small.value == pytest.approx(1.1 * 38 * (1e9 + 2064 * 5e4) / 40e9)
    gain = bars["int4, KV int8, decode batch 1, context 2048: against KV in bfloat16"]
    assert gain.value == pytest.approx(1.1) and gain.met
    assert bars["int4, decode batch 1, context 128: of read bandwidth"].met is False
    assert bars["int8, decode batch 1, context 128: of read bandwidth"].met is True


def test_only_what_was_promised_has_a_bar():
    bars = bars_of({"none": 100.0, "int8": 100.0, "int4": 100.0, "int8-dynamic": 165.0, "int4-dynamic": 170.0})
    against = {what: bar.met for what, bar in bars.items() if what.endswith("against bfloat16")}
    assert {what for what, met in against.items() if met is not None} == {"int8-dynamic, prefill 512: against bfloat16"}
    assert against["int8-dynamic, prefill 512: against bfloat16"]
    assert bars["bfloat16, decode batch 32, context 128: of the rate of 32 packed rows"].bar == ">= 0.8"
