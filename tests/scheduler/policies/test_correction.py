import pytest

from tests.scheduler.policies.instances import info
from xllm_compile.scheduler.policies.correction import Correction


def test_what_happens_is_learnt_and_what_happened_forgotten():
    correction, a = Correction(), info("a")
    assert correction.ratio(a) == 1.0
    for _ in range(50):
        correction.observe(a, 0.5, 1.0)
    assert correction.ratio(a) == pytest.approx(2.0, rel=0.02)
    for _ in range(100):
        correction.observe(a, 0.5, 0.5)
    assert correction.ratio(a) == pytest.approx(1.0, rel=0.02)
    assert correction.ratio(info("b")) == 1.0


def test_one_short_surprise_says_little_and_nothing_says_all():
    correction, a = Correction(), info("a")
    correction.observe(a, 0.001, 0.005)
    assert correction.ratio(a) < 1.1
    correction.observe(a, 0.1, 100.0)
    assert correction.ratio(a) == 4.0
    correction.observe(a, 1000.0, 0.0)
    assert correction.ratio(a) == 0.25


def test_how_late_a_request_is_says_nothing_of_the_instance():
    late, in_time, a = Correction(), Correction(), info("a")
    late.observe(a, 0.5, 60.0, ttft_slo_s=1.0)
    in_time.observe(a, 0.5, 1.0, ttft_slo_s=1.0)
    assert late.ratio(a) == in_time.ratio(a) > 1
    # It was not to be in time, and was not.
    late.observe(a, 2.0, 60.0, ttft_slo_s=1.0)
    in_time.observe(a, 2.0, 2.0, ttft_slo_s=1.0)
    assert late.ratio(a) == in_time.ratio(a)


def test_a_restarted_instance_starts_anew():
    correction, a = Correction(), info("a")
    correction.observe(a, 1.0, 3.0)
    assert correction.ratio(info("a", incarnation="2")) == 1.0
    correction.gone(a)
    assert correction.ratio(a) == 1.0
