"""How the live benches search, compare and report; the live service itself is tested in tests/integration."""

import pytest

from xllm_compile.benchmarks.bench_live_roles import CASES, OURS, Search, _bars
from xllm_compile.benchmarks.bench_validate import LiveSetting, Served, figures_of_live, together, window
from xllm_compile.benchmarks.live_cluster import Replay
from xllm_compile.benchmarks.openai_client import StreamResult
from xllm_compile.request_trace import TraceRequest

SETTING = LiveSetting(slow_down=32, shrink=4, ttft_slo_s=1.0, tpot_slo_s=0.1, repeats=1, seed=0)


def test_a_little_less_counts_as_equal_only_where_stretches_differ_as_much():
    def search(*shares):
        return Search(expected=4.0, stretches=[{4.0: before, 5.0: after} for before, after in shares])

    same = {case: search((0.9, 0.5), (0.9, 0.5)) for case in CASES}
    assert {bar.bar for bar in _bars("trace", same)} == {">= 1"}
    apart = same | {OURS: search((0.9, 0.5), (0.94, 0.84))}
    assert {bar.bar for bar in _bars("trace", apart)} == {">= 0.97"}


def test_a_stretch_begins_at_once_and_has_the_rate_that_was_asked_for():
    trace = [TraceRequest(100.0 + at, 8, 4) for at in range(40)]
    arrivals = window(trace[10:30], 5.0, 4.0, SETTING)
    assert len(arrivals) == 20 and arrivals[0].arrival_s == 0.0
    assert arrivals[-1].arrival_s == pytest.approx(19 / 5)
    assert all(one.max_output_tokens == one.num_output_tokens == 4 for one in arrivals)


def test_answers_count_from_when_they_were_to_be_sent():
    arrivals = window([TraceRequest(0.0, 8, 3), TraceRequest(1.0, 8, 1), TraceRequest(2.0, 8, 2)], 1.0, 3.0, SETTING)
    good = StreamResult(sent=10.1, token_times=[10.5, 10.6, 10.7], num_output_tokens=3)
    late = StreamResult(sent=11.0, token_times=[13.0], num_output_tokens=1)
    lost = StreamResult(sent=12.0, error="HTTP/1.1 429")
    found = figures_of_live(arrivals, Replay(results=[good, late, lost], began_s=10.0, ended_s=14.0))
    assert found.ttft_s == pytest.approx([0.5, 2.0])
    assert found.tpot_s == pytest.approx([0.1])
    assert (found.num_failed, found.tokens_per_s) == (1, 1.0)
    assert found.attainment == pytest.approx(1 / 3)


def test_runs_on_the_same_arrivals_are_taken_together():
    runs = [
        Served(ttft_s=[0.1, 0.4], tpot_s=[0.03], tokens_per_s=8.0, num_failed=1, attainment=0.5),
        Served(ttft_s=[0.2, 0.3, 0.5], tpot_s=[], tokens_per_s=10.0, num_failed=0, attainment=1.0),
    ]
    found = together(runs)
    assert (found.ttft_s, found.tpot_s) == ([0.1, 0.2, 0.3, 0.4, 0.5], [0.03])
    assert (found.tokens_per_s, found.num_failed, found.attainment) == (9.0, 1, 0.75)
