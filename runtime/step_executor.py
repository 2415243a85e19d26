"""The device's side of a step: patch the tokens it waits for, forward, sample. Steps run in the order of launching.

With async scheduling all of it runs in one thread of its own, the device thread, while the host's thread plans the
next step and tells the callers of the last one. A step is launched before the tokens of the one before are known: the
rows that wait for one hold a placeholder, and the device, which alone knows the tokens, puts them in.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from xllm_compile.runtime.batch import Batch
from xllm_compile.runtime.sampler import (
    SampledToken,
    SamplingFailure,
    TokenLogprobs,
    one_thread,
    sample,
    token_logprobs,
)
from xllm_compile.runtime.step import ModelRunner


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step brought."""

    sampled: list[SampledToken | SamplingFailure]
    """For each of the batch's sampled sequences."""
    prompt_logprobs: list[list[TokenLogprobs]]
    """For each of the batch's prompt rows."""
    started_s: float
    """Of the monotonic clock."""
    ended_s: float


class StepExecutor:
    """Runs batches one after the other. Between `launch` and the result, the batch's sampling states are its own."""

    def __init__(self, runner: ModelRunner, num_slots: int, *, is_async: bool) -> None:
        """num_slots is of the KV cache; is_async runs steps in a thread of their own."""
        self._runner = runner
        self._last_tokens = np.zeros(num_slots, dtype=np.int32)
        """[num_slots] the newest token of each slot's sequence, known here one step before the host knows it."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="xllm-device") if is_async else None

    @property
    def is_async(self) -> bool:
        return self._thread is not None

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        """Start the step; the function waits for its result, and raises what the step raised."""
        if self._thread is None:
            return lambda: self._run(batch)
        return self._thread.submit(self._run, batch).result

    def close(self) -> None:
        """Wait for what was launched, and end the thread."""
        if self._thread is not None:
            self._thread.shutdown()

    def _run(self, batch: Batch) -> StepResult:
        started_s = time.monotonic()
        batch.step.token_ids[batch.pending_rows] = self._last_tokens[batch.pending_slots]
        logits = self._runner.execute(batch.step)
        prompt_logprobs = _prompt_logprobs(batch, logits)
        states = [sequence.sampling for sequence in batch.sampled]
        sampled = sample(logits[: len(states)], states)
        # A sequence that failed has no token; the host drops what follows it.
        tokens = [result.token_id if isinstance(result, SampledToken) else 0 for result in sampled]
        self._last_tokens[batch.sampled_slots] = tokens
        for state, token_id in zip(states, tokens, strict=True):
            state.record(token_id)
        return StepResult(
            sampled=sampled, prompt_logprobs=prompt_logprobs, started_s=started_s, ended_s=time.monotonic()
        )


def _prompt_logprobs(batch: Batch, logits: Tensor) -> list[list[TokenLogprobs]]:
    if not batch.prompt_rows:
        return []
    with one_thread():
        return [
            [token_logprobs(logits[at], id_, rows.num_top) for at, id_ in enumerate(rows.token_ids, start=rows.begin)]
            for rows in batch.prompt_rows
        ]
