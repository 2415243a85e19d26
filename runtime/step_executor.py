"""The device's side of a step: patch the tokens it waits for, forward, sample. Steps run in the order of launching.

With async scheduling all of it runs in one thread of its own, the device thread, while the host's thread plans the
next step and tells the callers of the last one. A step is launched before the tokens of the one before are known: the
rows that wait for one hold a placeholder, and the device, which alone knows the tokens, puts them in.

The two threads share Python's lock. Between two steps the device thread needs it, so the host is not woken with the
end of a step but when the next one, launched already, has come to its layers: else the device would stand still while
the host, which never waits once it has the lock, reports and plans.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue

import numpy as np
from torch import Tensor

from xllm_compile.runtime.batch import Batch
from xllm_compile.runtime.mask_worker import MaskWorker
from xllm_compile.runtime.memory.page_ops import Restore, run_copies, run_restores
from xllm_compile.runtime.memory.xtensor import XTensor
from xllm_compile.runtime.pooling import pool_chunk
from xllm_compile.runtime.sampler import (
    SampledToken,
    SamplingFailure,
    TokenLogprobs,
    one_thread,
    token_logprobs,
)
from xllm_compile.runtime.speculative.proposer import NO_DRAFT
from xllm_compile.runtime.speculative.speculator import Speculator
from xllm_compile.runtime.speculative.verify import take_forced, verify
from xllm_compile.runtime.step import Int32Array, ModelRunner
from xllm_compile.runtime.worker_thread import start_worker


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step brought."""

    sampled: list[list[SampledToken | SamplingFailure]]
    """Tokens of each of the batch's sampled sequences: one, after those of a draft that were accepted. A failure is the
    last."""
    num_drafted: list[int]
    """Guessed tokens of the first of them; the others had none."""
    num_forced: list[int]
    """Likewise tokens that their grammars forced."""
    prompt_logprobs: list[list[TokenLogprobs]]
    """For each of the batch's prompt rows."""
    pooled: list[Tensor]
    """[E] float32 for each of the batch's pool rows: what the chunk adds to an embedding."""
    outcome: str
    """How its graphs were found: exact, padded, dynamic or eager."""
    started_s: float
    """Of the monotonic clock."""
    ended_s: float


_RunBatch = Callable[[Batch, Callable[[], None] | None], StepResult]


class _Launched:
    """A batch on its way."""

    __slots__ = ("_batch", "_error", "_result")

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._result: StepResult | None = None
        self._error: BaseException | None = None

    def run(self, function: _RunBatch, on_layers: Callable[[], None] | None) -> None:
        try:
            self._result = function(self._batch, on_layers)
        except BaseException as err:
            self._error = err

    def result(self) -> StepResult:
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result


class StepExecutor:
    """Runs batches one after the other. Between `launch` and the result, the batch's sampling states are its own."""

    def __init__(
        self,
        runner: ModelRunner,
        xtensor: XTensor,
        num_slots: int,
        *,
        is_async: bool,
        speculator: Speculator | None = None,
    ) -> None:
        """xtensor and num_slots are the KV cache's; is_async runs steps in a thread of their own."""
        self._device = _Device(runner, xtensor, num_slots, speculator)
        self._queue: SimpleQueue[_Launched | None] | None = None
        self._done: SimpleQueue[_Launched | None] = SimpleQueue()
        """Batches that have run, in order; None is an interruption. A future's bookkeeping would show between two steps
        of a small model."""
        self._ended: list[_Launched] = []
        """Of _done, what `wait` found."""
        self._is_interrupted = False
        if is_async:
            self._queue = SimpleQueue()
            self._end_thread = start_worker(self, "xllm-device", _serve, self._queue, self._done, self._device.run)

    @property
    def is_async(self) -> bool:
        return self._queue is not None

    def launch(self, batch: Batch) -> Callable[[], StepResult | None]:
        """Start the step; the function waits for its result, and raises what the step raised.

        It returns None where it was interrupted, and is called again then. Steps are waited for in their order.
        """
        if self._queue is None:
            return partial(self._device.run, batch)
        launched = _Launched(batch)
        self._queue.put(launched)
        return partial(self._wait, launched)

    @property
    def has_ended(self) -> bool:
        """Whether `wait` found that the oldest step has ended."""
        return bool(self._ended)

    def wait(self, timeout_s: float) -> None:
        """Until the oldest step has ended, for so long at most, or until it is interrupted."""
        with suppress(Empty):
            ended = self._done.get(timeout=max(0.0, timeout_s))
            if ended is None:
                self._is_interrupted = False
            else:
                self._ended.append(ended)

    def interrupt(self) -> None:
        """Have the engine's thread wait no longer, or not the next time. May be called from any thread."""
        if self._queue is not None and not self._is_interrupted:
            self._is_interrupted = True
            self._done.put(None)

    def _wait(self, launched: _Launched) -> StepResult | None:
        done = self._ended.pop() if self._ended else self._done.get()
        if done is None:
            self._is_interrupted = False
            return None
        assert done is launched, "steps are waited for in their order"
        return launched.result()

    def prepare_memory(self, page_ops: Int32Array, restores: Sequence[Restore]) -> None:
        """Make the copies and restores now, ahead of the next step. Nothing may be launched."""
        self._device.prepare_memory(page_ops, restores)

    def close(self) -> None:
        """Wait for what was launched, and end the thread."""
        if self._queue is not None:
            self._end_thread()
        self._device.close()


def _serve(queue: "SimpleQueue[_Launched | None]", done: "SimpleQueue[_Launched | None]", run: _RunBatch) -> None:
    untold: list[_Launched] = []
    """The step that ended last, while nobody was told."""

    def tell() -> None:
        while untold:
            done.put(untold.pop())

    while True:
        if queue.empty():
            tell()
        launched = queue.get()
        if launched is not None:
            launched.run(run, tell)
        # It may have failed before its layers.
        tell()
        if launched is None:
            return
        untold.append(launched)
        # Or the batch would live until the next one comes.
        del launched


class _Device:
    """What the device's thread owns."""

    def __init__(self, runner: ModelRunner, xtensor: XTensor, num_slots: int, speculator: Speculator | None) -> None:
        self._runner = runner
        self._xtensor = xtensor
        self._speculator = speculator
        self._masks = MaskWorker()
        self._last_tokens = np.zeros(num_slots, dtype=np.int32)
        """[num_slots] the newest token of each slot's sequence, known here one step before the host knows it."""

    def run(self, batch: Batch, on_layers: Callable[[], None] | None = None) -> StepResult:
        started_s = time.monotonic()
        batch.step.token_ids[batch.pending_rows] = self._last_tokens[batch.pending_slots]
        if on_layers and self._speculator and self._speculator.is_costly and any(batch.num_wanted):
            # A model's draft is long as well.
            on_layers()
        step, drafts = batch.step, [NO_DRAFT] * len(batch.sampled)
        if self._speculator is not None:
            step, drafts = self._speculator.draft(batch)
        drafted_s = time.monotonic()
        states = [sequence.sampling for sequence in batch.sampled]
        take_forced(states, drafts)
        self._masks.prepare(state.mask_ahead for state in states)
        self.prepare_memory(step.page_ops, batch.restores)
        logits = self._runner.execute(step, on_layers)
        num_draft_rows = sum(draft.num_logits - 1 for draft in drafts)
        prompt_logprobs = _prompt_logprobs(batch, logits, num_draft_rows)
        sampled = verify(logits, states, drafts)
        self._last_tokens[batch.sampled_slots] = [_token_id(results[-1]) for results in sampled]
        if self._speculator is not None:
            self._speculator.learn(batch, drafts, sampled, time.monotonic() - drafted_s)
        drafted = drafts[: len(batch.drafting)]
        return StepResult(
            sampled=sampled,
            num_drafted=[0 if draft.is_forced else len(draft.token_ids) for draft in drafted],
            num_forced=[len(draft.token_ids) if draft.is_forced else 0 for draft in drafted],
            prompt_logprobs=prompt_logprobs,
            pooled=_pooled(batch, self._runner),
            outcome=self._runner.last_outcome(),
            started_s=started_s,
            ended_s=time.monotonic(),
        )

    def prepare_memory(self, page_ops: Int32Array, restores: Sequence[Restore]) -> None:
        run_copies(page_ops, self._xtensor)
        run_restores(restores, self._xtensor)

    def close(self) -> None:
        self._masks.close()


def _token_id(result: SampledToken | SamplingFailure) -> int:
    # A sequence that failed has no token; the host drops what follows it.
    return result.token_id if isinstance(result, SampledToken) else 0


def _prompt_logprobs(batch: Batch, logits: Tensor, num_draft_rows: int) -> list[list[TokenLogprobs]]:
    if not batch.prompt_rows:
        return []
    with one_thread():
        return [
            [
                token_logprobs(logits[at], token_id, rows.num_top)
                for at, token_id in enumerate(rows.token_ids, start=rows.begin + num_draft_rows)
            ]
            for rows in batch.prompt_rows
        ]


def _pooled(batch: Batch, runner: ModelRunner) -> list[Tensor]:
    if not batch.pool_rows:
        return []
    hidden = runner.pooled()
    return [pool_chunk(hidden[rows.begin : rows.begin + rows.count], rows.params) for rows in batch.pool_rows]
