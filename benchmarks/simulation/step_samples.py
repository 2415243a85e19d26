"""The step-time profile of an instance on this machine: steps of known loads, timed one by one, and a fit to them."""

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.instance import InstanceConfig, open_instance
from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.scheduler.cluster.state import StepProfile

# (prompts, tokens of each), all of one step, or of whole steps where one prompt is longer.
_PROMPTS = ((1, 16), (1, 32), (1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (4, 32), (8, 16), (4, 128), (2, 256))
# (sequences, KV tokens of each).
_DECODES = ((1, 16), (2, 64), (3, 256), (4, 64), (8, 64), (10, 16), (8, 256), (16, 64), (16, 256), (24, 64), (32, 128))
_DECODE_STEPS = 8
_SIZES = (1, 8, 32, 128, 512)
_TOKEN_IDS = (100, 4000)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSample:
    load: StepLoad
    seconds: float
    """Median of the repetitions."""


def sample_steps(artifact: Path, config: InstanceConfig, *, repeats: int, seed: int) -> list[StepSample]:
    """Of one instance, on one thread. Raises what opening an instance raises."""
    torch.set_num_threads(1)
    engine = open_instance(artifact, config).engine
    rng = random.Random(seed)
    try:
        found: dict[StepLoad, list[float]] = {}
        for round_number in range(repeats + 1):
            for load, seconds in _steps(engine, rng):
                # The first round warms caches and memory up.
                if round_number:
                    found.setdefault(load, []).append(seconds)
    finally:
        engine.close()
    return [StepSample(load=load, seconds=statistics.median(each)) for load, each in found.items()]


def fit_profile(samples: Sequence[StepSample]) -> StepProfile:
    """Least squares of relative errors: times at a few sizes, linear between them, and three slopes of at least 0."""
    rows = []
    for sample in samples:
        load = sample.load
        terms = (*_hats(load.num_tokens), load.num_seqs, load.num_keys, load.num_pairs)
        rows.append([value / sample.seconds for value in terms])
    matrix, ones = np.array(rows), np.ones(len(rows))
    # Columns of like size keep the solution exact; slopes below 0 are left out one after the other.
    scale = np.abs(matrix).max(axis=0)
    kept = list(range(matrix.shape[1]))
    while True:
        solution = np.linalg.lstsq(matrix[:, kept] / scale[kept], ones, rcond=None)[0] / scale[kept]
        below = [column for column, value in zip(kept, solution, strict=True) if column >= len(_SIZES) and value < 0]
        if not below:
            break
        kept.remove(below[0])
    values = dict(zip(kept, solution.tolist(), strict=True))
    seconds = np.maximum.accumulate([values[at] for at in range(len(_SIZES))])
    sequence_s, key_s, pair_s = (values.get(len(_SIZES) + at, 0.0) for at in range(3))
    return StepProfile(
        num_tokens=_SIZES,
        seconds=tuple(seconds.tolist()),
        sequence_s=sequence_s,
        key_s=key_s,
        pair_s=pair_s,
    )


def _hats(num_tokens: int) -> list[float]:
    """What the time at each of the sizes counts for a step of so many tokens."""
    return [float(np.interp(num_tokens, _SIZES, np.eye(len(_SIZES))[at])) for at in range(len(_SIZES))]


def fit_errors(profile: StepProfile, samples: Sequence[StepSample]) -> list[float]:
    """By how much of the measured time the profile is off, of each sample."""
    return [abs(profile.step_s(sample.load) / sample.seconds - 1) for sample in samples]


def _steps(engine: Engine, rng: random.Random) -> Iterator[tuple[StepLoad, float]]:
    most = engine.limits.max_num_batched_tokens
    for count, length in _PROMPTS:
        _add(engine, rng, count, length, 1)
        for begin in range(0, length, most):
            load = StepLoad()
            for _ in range(count):
                load = load.plus(begin, min(most, length - begin))
            yield load, _step_s(engine)
    for count, context in _DECODES:
        _add(engine, rng, count, context, _DECODE_STEPS + 1)
        for _ in range(-(-count * context // most)):
            _step_s(engine)
        seconds = []
        while engine.has_work:
            seconds.append(_step_s(engine))
        middle = context + _DECODE_STEPS // 2
        yield StepLoad(count, count, count * middle), statistics.median(seconds)


def _add(engine: Engine, rng: random.Random, count: int, length: int, num_outputs: int) -> None:
    params = SamplingParams(max_tokens=num_outputs, temperature=0.0, ignore_eos=True)
    for _ in range(count):
        prompt = [rng.randrange(*_TOKEN_IDS) for _ in range(length)]
        engine.add_request(f"{rng.getrandbits(64):x}", prompt, params)


def _step_s(engine: Engine) -> float:
    """Device time of the next step."""
    before = engine.stats().busy_s
    engine.step()
    return engine.stats().busy_s - before
