from xllm_compile.benchmarks.bench_speculation import METHODS, PAYS, PAYS_NOT, Run, _bars


def run(seconds: float) -> Run:
    return Run(seconds_per_token=seconds, num_draft_tokens=0, num_accepted_tokens=0, tokens=[])


def test_bars_are_medians_of_neighbouring_runs() -> None:
    # The machine halves its speed in the last round: both of the pair see it.
    plain, twice = [run(1.0), run(1.0), run(2.0)], [run(0.5), run(0.8), run(1.0)]
    found = {name: {"plain": plain, **dict.fromkeys(METHODS, twice)} for name in (PAYS, PAYS_NOT, "other")}
    bars = _bars(found)
    assert [bar.value for bar in bars] == [2.0] * 9
    assert [bar.bar for bar in bars] == [">= 1.45"] * 3 + [">= 0.97"] * 3 + [""] * 3
