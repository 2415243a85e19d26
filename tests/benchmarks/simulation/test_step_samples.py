import pytest
import torch

from xllm_compile.benchmarks.simulation.step_samples import StepSample, fit_errors, fit_profile, sample_steps
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.runtime.slowed_runner import load_of_step
from xllm_compile.scheduler.cluster.state import StepProfile

TRUTH = StepProfile(
    num_tokens=(1, 8, 32, 128, 512),
    seconds=(0.030, 0.033, 0.040, 0.090, 0.300),
    sequence_s=1e-4,
    key_s=2e-6,
    pair_s=1e-7,
)


def loads():
    for count, length in ((1, 16), (1, 64), (1, 128), (4, 32), (8, 16), (1, 512), (2, 256), (4, 128)):
        load = StepLoad()
        for _ in range(count):
            load = load.plus(0, length)
        yield load
    yield StepLoad().plus(512, 512)
    for count, context in ((1, 16), (4, 64), (8, 300), (16, 64), (32, 200)):
        yield StepLoad(count, count, count * context)


def test_a_profile_is_found_again_from_its_steps():
    samples = [StepSample(load=load, seconds=TRUTH.step_s(load)) for load in loads()]
    found = fit_profile(samples)
    assert max(fit_errors(found, samples)) < 1e-6
    assert found.seconds == pytest.approx(TRUTH.seconds, rel=1e-4)
    assert (found.sequence_s, found.key_s, found.pair_s) == pytest.approx((1e-4, 2e-6, 1e-7), rel=1e-3)


def test_what_costs_nothing_is_never_below_nothing():
    samples = [StepSample(load=load, seconds=0.05 - 1e-7 * load.num_keys) for load in loads()]
    found = fit_profile(samples)
    assert min(found.sequence_s, found.key_s, found.pair_s) >= 0
    assert list(found.seconds) == sorted(found.seconds)


def test_samples_are_of_loads_that_steps_had(demo_artifact, monkeypatch):
    executed = set()

    def noted(step):
        load = load_of_step(step)
        executed.add(load)
        return load

    monkeypatch.setattr("xllm_compile.runtime.slowed_runner.load_of_step", noted)
    num_threads = torch.get_num_threads()
    try:
        # The smallest slow-down that puts a runner between, which asks for the load of each step.
        config = InstanceConfig(max_num_seqs=8, prefix_cache=False, async_scheduling=False, slow_down=1 + 1e-9)
        prompts, decodes = ((1, 16), (3, 20)), ((1, 16), (8, 40), (8, 200))
        samples = sample_steps(demo_artifact, config, repeats=1, seed=0, prompts=prompts, decodes=decodes)
    finally:
        torch.set_num_threads(num_threads)
    assert {sample.load for sample in samples} <= executed
    assert sum(sample.load.num_keys >= 8 * 200 for sample in samples) == 1
