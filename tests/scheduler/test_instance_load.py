"""What an instance reports: means of the last seconds, and its predictor as a table."""

import pytest

from xllm_compile.runtime.outputs import CompletionOutput, RequestMetrics, RequestOutput
from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.runtime.step_predictor import StepPredictor, StepPrior
from xllm_compile.scheduler.instance_load import step_profile
from xllm_compile.scheduler.recent_latency import WINDOW_S, RecentLatency, RecentMean


def output(last_s, *, first_s=2.0, num_streams=1, is_resumed=False):
    return RequestOutput(
        request_id="r",
        prompt=None,
        prompt_token_ids=[1],
        outputs=[CompletionOutput(index=index, text="", token_ids=[]) for index in range(num_streams)],
        finished=False,
        metrics=RequestMetrics(arrival_s=1.5, first_token_s=first_s, last_token_s=last_s, is_resumed=is_resumed),
    )


def test_means_forget():
    mean = RecentMean()
    assert mean.mean(0) is None
    mean.add(100.2, 6.0, 3)
    mean.add(105.0, 4.0)
    assert mean.mean(105) == 2.5
    assert mean.mean(101 + WINDOW_S) == 4.0
    assert mean.mean(200) is None


def test_first_tokens_and_gaps():
    latency = RecentLatency()
    last_s = latency.observe(output(2.0), None, 1)
    assert latency.means(2) == (0.5, None)
    last_s = latency.observe(output(2.3), last_s, 3)
    assert last_s == 2.3
    ttft_s, tpot_s = latency.means(2)
    assert ttft_s == 0.5 and tpot_s == pytest.approx(0.1)


def test_an_output_of_several_tokens_and_one_of_several_streams():
    latency = RecentLatency()
    latency.observe(output(2.4), None, 5)
    ttft_s, tpot_s = latency.means(2)
    assert ttft_s == 0.5 and tpot_s == pytest.approx(0.1)
    latency = RecentLatency()
    last_s = latency.observe(output(2.0, num_streams=2), 1.9, 2)
    ttft_s, tpot_s = latency.means(2)
    assert ttft_s is None and tpot_s == pytest.approx(0.1) and last_s == 2.0


def test_what_began_elsewhere_had_its_first_token_there():
    latency = RecentLatency()
    latency.observe(output(2.1, is_resumed=True), None, 2)
    ttft_s, tpot_s = latency.means(2)
    assert ttft_s is None and tpot_s == pytest.approx(0.1)


def test_the_end_of_a_request_brings_no_time():
    latency = RecentLatency()
    assert latency.observe(output(2.1), 2.1, 0) == 2.1
    assert latency.observe(output(None, first_s=None), None, 0) is None
    assert latency.means(2) == (None, None)


def test_the_profile_predicts_what_the_predictor_does():
    prior = StepPrior(
        by_tokens=lambda count: 1e-3 + 1e-5 * count, token_s=1e-5, sequence_s=2e-5, key_s=3e-8, pair_s=4e-9
    )
    predictor = StepPredictor(prior)
    for count in range(1, 60):
        predictor.observe(StepLoad(num_tokens=count, num_seqs=count, num_keys=900 * count), 2e-3 + 4e-5 * count)
    profile = step_profile(predictor.seconds, 300)
    assert profile.num_tokens == (1, 2, 4, 8, 16, 32, 64, 128, 256, 300)
    for load in (
        StepLoad(num_tokens=1),
        StepLoad(num_tokens=48, num_seqs=5, num_keys=8000, num_pairs=12_000),
        StepLoad(num_tokens=300, num_seqs=9, num_keys=80_000),
    ):
        assert profile.step_s(load) == pytest.approx(predictor.seconds(load), rel=1e-6)
