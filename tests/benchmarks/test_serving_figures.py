"""What a serving run is summed up to, from made-up streams."""

import pytest

from xllm_compile.benchmarks.bench_serve import ServeOptions, _endpoint, summarise_run
from xllm_compile.benchmarks.openai_client import StreamResult

OPTIONS = ServeOptions(concurrency=8, vocab_size=100, seed=0, slo_ttft_s=1.0, slo_tpot_s=0.1)


def stream(*times: float, error: str | None = None) -> StreamResult:
    return StreamResult(sent=10.0, token_times=[10.0 + at for at in times], num_output_tokens=len(times), error=error)


def test_times_of_one_stream():
    result = stream(0.5, 0.6, 0.9)
    assert result.ttft_s == pytest.approx(0.5)
    assert result.tpot_s == pytest.approx(0.2)
    assert result.itl_s == pytest.approx([0.1, 0.3])
    assert result.e2e_s == pytest.approx(0.9)
    assert stream(0.5).tpot_s is None


def test_goodput_counts_what_meets_both_limits():
    done = [stream(0.5, 0.6), stream(1.5, 1.6), stream(0.5, 0.9), stream(0.2), stream(error="refused")]
    found = summarise_run(done, 2.0, OPTIONS)
    assert found["goodput_rps"] == pytest.approx(2 / 2.0)
    assert found["output_tokens_per_s"] == pytest.approx(7 / 2.0)
    assert (found["num_requests"], found["num_failed"], found["errors"]) == (5, 1, ["refused"])
    assert found["latency_s"]["ttft_s"]["p50"] == pytest.approx(0.5)


def test_runs_of_single_tokens_have_no_gaps():
    assert set(summarise_run([stream(0.5)], 1.0, OPTIONS)["latency_s"]) == {"ttft_s", "e2e_s"}


def test_a_run_without_success_says_why():
    with pytest.raises(RuntimeError, match="all 1 requests failed; the first with: refused"):
        summarise_run([stream(error="refused")], 1.0, OPTIONS)


def test_endpoints():
    assert _endpoint("http://localhost:8000/v1") == ("localhost", 8000)
    assert _endpoint("https://localhost") == ("localhost", 443)
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        _endpoint("http://localhost:8000/v2")
