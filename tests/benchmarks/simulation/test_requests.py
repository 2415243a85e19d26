import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_compile.benchmarks.simulation.requests import offline, online, read_requests, scaled, tidal
from xllm_compile.request_trace import TraceError, TraceRequest

TRACE = [TraceRequest(float(second), 100 + second, 10) for second in range(1000)]


def test_a_scaled_trace_has_the_rate_and_begins_where_the_seed_says():
    plain, turned = scaled(TRACE, 50.0, 0), scaled(TRACE, 50.0, 3)
    for requests in (plain, turned):
        arrivals = [one.arrival_s or 0.0 for one in requests]
        assert arrivals[0] == 0.0 and arrivals == sorted(arrivals)
        assert len(requests) / (arrivals[-1] + 1 / 50) == pytest.approx(50.0)
    assert [one.prompt_tokens for one in plain] == [one.prompt_tokens for one in TRACE]
    assert sorted(one.prompt_tokens for one in turned) == [one.prompt_tokens for one in TRACE]
    assert turned[0].prompt_tokens != plain[0].prompt_tokens
    assert scaled(TRACE, 50.0, 3) == turned


def test_a_tide_moves_arrivals_and_nothing_else():
    tide = tidal(TRACE, [3.0, 0.0, 1.0, 4.0])
    assert [one.prompt_tokens for one in tide] == [one.prompt_tokens for one in TRACE]
    arrivals = [one.arrival_s or 0.0 for one in tide]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == pytest.approx(0.0) and arrivals[-1] == pytest.approx(999.0)
    counts = [sum(begin <= at < begin + 249.75 for at in arrivals) for begin in (0.0, 249.75, 499.5, 749.25)]
    assert counts == pytest.approx([375, 0, 125, 500], abs=2)
    # Within a part they keep their distances.
    assert arrivals[1] - arrivals[0] == pytest.approx(arrivals[300] - arrivals[299])


@given(rates=st.lists(st.floats(0, 1e6), min_size=1).filter(any))
def test_under_any_tide_requests_keep_their_order_and_time(rates):
    arrivals = [one.arrival_s or 0.0 for one in tidal(TRACE[:50], rates)]
    assert arrivals == sorted(arrivals) and arrivals[0] >= 0.0 and arrivals[-1] <= 49.0 * (1 + 1e-12)


def test_a_steady_tide_moves_nothing():
    assert [one.arrival_s for one in tidal(TRACE, [5.0] * 7)] == pytest.approx([one.arrival_s for one in TRACE])


def test_offline_requests_come_steadily_and_want_nothing():
    found = offline(TRACE, 5.0, 200.0, 1, first_number=7, gives_way=True)
    assert len(found) == pytest.approx(1000, rel=0.1)
    assert [one.number for one in found] == list(range(7, 7 + len(found)))
    assert all(one.is_offline and one.ttft_slo_s is None and one.arrival_s < 200 for one in found)
    assert offline(TRACE, 0.0, 200.0, 1, first_number=0, gives_way=True) == []


def test_targets_are_met_or_not():
    (one,) = online([TraceRequest(5.0, 10, 11)], ttft_slo_s=1.0, tpot_slo_s=0.1)
    assert not one.is_met, "never served"
    one.first_token_s, one.finished_s = 6.0, 7.0
    assert (one.ttft_s, one.tpot_s, one.is_met) == (1.0, 0.1, True)
    one.finished_s = 7.1
    assert not one.is_met
    one.first_token_s, one.finished_s = 6.1, 7.0
    assert not one.is_met


def test_a_trace_without_times_is_refused(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("ContextTokens,GeneratedTokens\n10,1\n20,2\n")
    with pytest.raises(TraceError, match="has no arrival times"):
        read_requests(path)
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,10,0\n2023-11-16 18:17:05.97,20,2\n"
    )
    assert read_requests(path) == [TraceRequest(0.0, 10, 1), TraceRequest(2.0, 20, 2)]
