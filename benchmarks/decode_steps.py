"""How long decode steps of a full batch take, by the engine's own clock of the device."""

from collections.abc import Sequence
from dataclasses import dataclass

from xllm_compile.benchmarks.engine_process import TokenIds
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSteps:
    step_s: float
    """A step from start to start, in seconds."""
    gap_share: float
    """Share of it in which the device stood still."""


def time_decode(engine: Engine, prompts: Sequence[TokenIds], params: SamplingParams) -> DecodeSteps:
    """Generate for all prompts at once; the steps that count have a token of each: after the last one's first token,
    up to the first one's end."""
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, params)
    before = engine.stats().num_generated_tokens
    while engine.stats().num_generated_tokens < before + len(prompts):
        engine.step()
    begin = engine.stats()
    while engine.num_open == len(prompts):
        engine.step()
    end = engine.stats()
    while engine.has_work:
        engine.step()
    busy_s, gap_s = end.busy_s - begin.busy_s, end.gap_s - begin.gap_s
    seconds = busy_s + gap_s
    return DecodeSteps(step_s=seconds / (end.num_steps - begin.num_steps), gap_share=gap_s / seconds)
