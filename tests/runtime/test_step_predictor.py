import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_compile.graph_passes.step_cost import StepTimes
from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.runtime.step_predictor import StepPredictor, default_prior, prior_of

TIMES = {"T": StepTimes(sizes=(1, 512), seconds=(0.020, 0.200), dynamic_overhead=1.1)}
PRIOR = prior_of(TIMES, kv_bytes_per_token=114_688, weights_bytes=1_200_000_000, max_num_batched_tokens=512)


def random_load(rng: random.Random) -> StepLoad:
    load = StepLoad()
    for _ in range(rng.randint(1, 32)):
        load = load.plus(rng.randint(10, 2000), 1)
    if rng.random() < 0.4:
        load = load.plus(rng.choice([0, 512]), rng.randint(16, 512))
    return load


def true_s(load: StepLoad) -> float:
    """Another machine than the prior believes in."""
    tokens, seqs, keys, pairs = load
    return 4e-3 + 6e-5 * tokens + 5e-5 * seqs + 2e-7 * keys + 3e-9 * pairs


def mean_error(predictor: StepPredictor, rng: random.Random) -> float:
    loads = [random_load(rng) for _ in range(200)]
    return sum(abs(predictor.seconds(load) / true_s(load) - 1) for load in loads) / len(loads)


def test_before_it_has_seen_a_step_it_says_what_the_build_says() -> None:
    predictor = StepPredictor(PRIOR)
    # 2,000 keys weigh 229 MB, beside the weights of a step of one token.
    assert predictor.seconds(StepLoad().plus(1999, 1)) == pytest.approx(0.020 * (1 + 2000 * 114_688 / 1.2e9))
    assert predictor.seconds(StepLoad().plus(0, 512)) == pytest.approx(0.200, rel=0.3)


@pytest.mark.parametrize("prior", [PRIOR, default_prior()], ids=["build", "none"])
def test_it_learns_a_machine_whatever_it_believed(prior) -> None:
    rng = random.Random(0)
    predictor = StepPredictor(prior)
    for count, error in ((50, 0.12), (450, 0.04)):
        for _ in range(count):
            load = random_load(rng)
            predictor.observe(load, true_s(load) * rng.gauss(1, 0.03))
        assert mean_error(predictor, rng) < error
    assert predictor.error_ratio < 0.06


def test_a_page_fault_is_no_news() -> None:
    rng = random.Random(1)
    predictor = StepPredictor(PRIOR)
    for _ in range(500):
        load = random_load(rng)
        predictor.observe(load, true_s(load) * rng.gauss(1, 0.03) * (20 if rng.random() < 0.02 else 1))
    assert mean_error(predictor, rng) < 0.05
    load = StepLoad().plus(100, 1)
    before = predictor.seconds(load)
    predictor.observe(load, 10.0)
    assert predictor.seconds(load) == pytest.approx(before, rel=0.2)


def test_a_slower_machine_is_noticed() -> None:
    rng = random.Random(2)
    predictor = StepPredictor(PRIOR)
    for factor in (1, 3):
        for _ in range(1000):
            load = random_load(rng)
            predictor.observe(load, true_s(load) * factor)
    load = StepLoad().plus(500, 1)
    assert predictor.seconds(load) == pytest.approx(3 * true_s(load), rel=0.15)


@given(
    st.lists(
        st.tuples(st.integers(0, 5000), st.integers(1, 512), st.floats(-1, 100) | st.sampled_from([0.0, 1e-9])),
        max_size=40,
    )
)
def test_predictions_are_positive_and_grow_with_the_load(steps: list[tuple[int, int, float]]) -> None:
    predictor = StepPredictor(PRIOR)
    for computed, count, seconds in steps:
        predictor.observe(StepLoad().plus(computed, count), seconds)
    small, large = StepLoad().plus(10, 1), StepLoad().plus(10, 1).plus(300, 64)
    assert 0 < predictor.seconds(small) <= predictor.seconds(large)


def test_a_step_that_took_no_time_is_not_counted() -> None:
    predictor = StepPredictor(PRIOR)
    predictor.observe(StepLoad(1, 1, 1), 0.0)
    assert predictor.num_observed == 0


# Qwen3-0.6B in bfloat16 on two cores (benchmarks/results/cost_model_cpu.json): sequences as (how many, new tokens,
# context), and the median seconds of the step.
RECORDED = [
    ([(1, 1, 64)], 0.0447),
    ([(1, 1, 500)], 0.0474),
    ([(1, 1, 2000)], 0.0588),
    ([(2, 1, 300)], 0.0509),
    ([(4, 1, 1000)], 0.0735),
    ([(8, 1, 128)], 0.0577),
    ([(8, 1, 1500)], 0.1326),
    ([(16, 1, 200)], 0.0812),
    ([(24, 1, 400)], 0.1246),
    ([(32, 1, 100)], 0.1225),
    ([(1, 24, 24)], 0.0592),
    ([(1, 96, 96)], 0.1079),
    ([(1, 200, 200)], 0.1493),
    ([(1, 384, 384)], 0.2497),
    ([(1, 512, 512)], 0.3313),
    ([(1, 256, 1280)], 0.2511),
    ([(1, 512, 2048)], 0.5729),
    ([(1, 120, 120), (8, 1, 500)], 0.146),
    ([(1, 500, 500), (4, 1, 1200)], 0.3695),
    ([(1, 240, 1000), (16, 1, 256)], 0.2628),
]
BUILD_TIMES = StepTimes(
    sizes=(1, 24, 96, 200, 384, 512), seconds=(0.0457, 0.0539, 0.0856, 0.143, 0.245, 0.3252), dynamic_overhead=1.1
)


def test_recorded_steps_are_predicted_better_than_the_build_does() -> None:
    prior = prior_of(
        {"T": BUILD_TIMES}, kv_bytes_per_token=114_688, weights_bytes=1_192_000_000, max_num_batched_tokens=512
    )
    steps = []
    for groups, seconds in RECORDED:
        load = StepLoad()
        for count, new, context in groups:
            for _ in range(count):
                load = load.plus(context - new, new)
        steps.append((load, seconds))
    predictor, rng = StepPredictor(prior), random.Random(0)

    def error() -> float:
        return sum(abs(predictor.seconds(load) / seconds - 1) for load, seconds in steps) / len(steps)

    assert error() == pytest.approx(0.14, abs=0.01)
    for load, seconds in rng.choices(steps, k=100):
        predictor.observe(load, seconds)
    assert error() < 0.07
