"""The step-time profile of an instance on this machine: steps of known loads, timed one by one, and a fit to them."""

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.instance import open_instance
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.scheduler.cluster.state import StepProfile

# (prompts, tokens of each), all of one step, or of whole steps where one prompt is longer.
PROMPTS = ((1, 16), (1, 32), (1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (4, 32), (8, 16), (4, 128), (2, 256))
# (sequences, KV tokens of each).
DECODES = ((1, 16), (2, 64), (3, 256), (4, 64), (8, 64), (10, 16), (8, 256), (16, 64), (16, 256), (24, 64), (32, 128))
_DECODE_STEPS = 8
_SIZES = (1, 8, 32, 128, 512)
_TOKEN_IDS = (100, 4000)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSample:
    load: StepLoad
    seconds: float
    """Median of such steps."""


def sample_steps(
    artifact: Path,
    config: InstanceConfig,
    *,
    repeats: int,
    seed: int,
    prompts: Sequence[tuple[int, int]] = PROMPTS,
    decodes: Sequence[tuple[int, int]] = DECODES,
) -> list[StepSample]:
    """Of one instance, on one thread. Raises what opening an instance raises."""
    torch.set_num_threads(1)
    engine = open_instance(artifact, config).engine
    rng = random.Random(seed)
    try:
        found: dict[StepLoad, list[float]] = {}
        for round_number in range(repeats + 1):
            for sample in _steps(engine, rng, prompts, decodes):
                # The first round warms caches and memory up.
                if round_number:
                    found.setdefault(sample.load, []).append(sample.seconds)
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


def _steps(
    engine: Engine, rng: random.Random, prompts: Sequence[tuple[int, int]], decodes: Sequence[tuple[int, int]]
) -> Iterator[StepSample]:
    most = engine.limits.max_num_batched_tokens
    for count, length in prompts:
        _add(engine, rng, count, length, 1)
        for begin in range(0, length, most):
            load = StepLoad()
            for _ in range(count):
                load = load.plus(begin, min(most, length - begin))
            yield StepSample(load=load, seconds=_step_s(engine))
    for count, context in decodes:
        yield _decode_sample(engine, rng, count, context)


def _decode_sample(engine: Engine, rng: random.Random, count: int, context: int) -> StepSample:
    """Of steps in which all sequences decode; those whose prompts were done first have more tokens by then."""
    num_prefills = -(-count * context // engine.limits.max_num_batched_tokens)
    # Beside those that decode already, prompts may take one step more.
    num_outputs = dict.fromkeys(_add(engine, rng, count, context, _DECODE_STEPS + num_prefills + 2), 0)
    while not all(num_outputs.values()):
        _decode(engine, num_outputs)
    samples = []
    for _ in range(_DECODE_STEPS):
        load = StepLoad(count, count, count * context + sum(num_outputs.values()))
        samples.append(StepSample(load=load, seconds=_decode(engine, num_outputs)))
    for name in num_outputs:
        engine.abort(name)
    engine.step()
    return StepSample(
        load=samples[_DECODE_STEPS // 2].load, seconds=statistics.median(sample.seconds for sample in samples)
    )


def _decode(engine: Engine, num_outputs: dict[str, int]) -> float:
    """Device time of the next step, whose tokens are counted."""
    before = engine.stats().busy_s
    for output in engine.step():
        num_outputs[output.request_id] = len(output.outputs[0].token_ids)
    return engine.stats().busy_s - before


def _add(engine: Engine, rng: random.Random, count: int, length: int, num_outputs: int) -> list[str]:
    """Returns the ids of the requests."""
    params = SamplingParams(max_tokens=num_outputs, temperature=0.0, ignore_eos=True)
    names = [f"{rng.getrandbits(64):x}" for _ in range(count)]
    for name in names:
        engine.add_request(name, [rng.randrange(*_TOKEN_IDS) for _ in range(length)], params)
    return names


def _step_s(engine: Engine) -> float:
    """Device time of the next step."""
    before = engine.stats().busy_s
    engine.step()
    return engine.stats().busy_s - before
