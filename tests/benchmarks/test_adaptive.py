from collections.abc import Callable
from pathlib import Path

import pytest

from xllm_compile.benchmarks.bench_adaptive import FULL, STOCK_EAGER, WAYS, Found, _bars
from xllm_compile.benchmarks.engine_process import EngineProcess
from xllm_compile.benchmarks.parity import load_reference, random_prompts, reference_chain
from xllm_compile.benchmarks.timing import summarise

NUM_TOKENS = 12


def test_the_bars_are_against_stock_operators_and_medians_of_neighbouring_runs() -> None:
    # The machine halves its speed in the last round: both of the pair see it.
    tpot_s = {way: summarise([1.0, 1.0, 2.0] if way == FULL else [2.0, 1.5, 4.0]) for way in WAYS}
    bars = _bars("model", {8: Found(tpot_s=tpot_s, equal_share=1.0)}, has_limits=True)
    limited = {bar.what: bar for bar in bars if bar.bar}
    prefix = f"model, batch 8: full graph against {STOCK_EAGER}"
    assert set(limited) == {f"{prefix}, throughput", f"{prefix}, TPOT"}
    assert limited[f"{prefix}, throughput"].value == 100
    assert limited[f"{prefix}, TPOT"].value == -50
    # Every other way is there as a figure.
    assert len(bars) == 2 * (len(WAYS) - 1) + 1


@pytest.mark.numerics
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_stock_operators_give_the_tokens_of_transformers(family: str, tiny_model_dir: Callable[..., Path]) -> None:
    windowless = {"use_sliding_window": False} if family == "qwen2" else {}
    model_dir = tiny_model_dir(family, **windowless)
    model = load_reference(model_dir)
    prompts = random_prompts((7, 7, 7), model.config.vocab_size)
    expected = [reference_chain(model, prompt, NUM_TOKENS).tokens for prompt in prompts]
    with EngineProcess("stock", "engine_stock", [str(model_dir)]) as stock:
        stock.wait_ready()
        assert stock.generate(prompts, NUM_TOKENS).token_ids == expected
        assert stock.generate(prompts[:1], NUM_TOKENS).token_ids == expected[:1]
