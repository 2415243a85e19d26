"""Every fast path has its accuracy beside it: what may be asked for is scored on text and logits."""

from typing import Any

import pytest

from xllm_compile.benchmarks import bench_quantisation
from xllm_compile.benchmarks.bench_precisions import PRECISIONS
from xllm_compile.graph_passes.quantisation import GROUP_SIZES, SCHEMES


def test_every_scheme_is_scored_on_text() -> None:
    options = list(bench_quantisation.SCHEMES.values())
    assert {given[given.index("--quantize") + 1] for given in options if "--quantize" in given} == set(SCHEMES)
    assert any("--quantize-head" in given for given in options)
    assert any(given == ("--kv-cache-dtype", "int8") for given in options)
    groups = {given[given.index("--quantize-group") + 1] for given in options if "--quantize-group" in given}
    assert groups == {str(size) for size in GROUP_SIZES if size != 32}
    assert set(bench_quantisation.MAX_LOSS) == set(bench_quantisation.SCHEMES) - {"bfloat16"}


def test_every_scheme_has_its_speed_and_its_logits() -> None:
    assert {name.partition(",")[0] for name in PRECISIONS} - {"none"} == set(SCHEMES)


@pytest.mark.parametrize(("loss", "is_met"), [(0.001, True), (0.5, False)])
def test_a_scheme_that_loses_too_much_does_not_pass(loss: float, is_met: bool) -> None:
    bits: dict[str, Any] = {name: 1.0 + (loss if name != "bfloat16" else 0) for name in bench_quantisation.SCHEMES}
    bars = bench_quantisation._bars(bits, dict.fromkeys(bits, 100))
    assert {bar.met for bar in bars if bar.bar} == {is_met}
    assert sum(bool(bar.bar) for bar in bars) == len(bits) - 1
