"""A device of a given speed, so that several instances on few cores behave as each would on a device of its own.

A step is computed at once and its result kept back until the time that the device would take. What the cores are busy
with does not show, as long as they are done in time: for a step that takes them longer, it is their time that counts.
"""

import time
from collections.abc import Callable

import numpy as np
from torch import Tensor

from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.runtime.step import ModelRunner, RunnerAround, Step


class SlowedRunner(RunnerAround):
    """Its steps last as long as they would on a slower device."""

    def __init__(self, runner: ModelRunner, seconds: Callable[[StepLoad], float]) -> None:
        """seconds: how long a step lasts."""
        super().__init__(runner)
        self._seconds = seconds

    def execute(self, step: Step, on_layers: Callable[[], None] | None = None) -> Tensor:
        """See ModelRunner.execute."""
        due_s = time.monotonic() + self._seconds(load_of_step(step))
        logits = self._runner.execute(step, on_layers)
        time.sleep(max(0.0, due_s - time.monotonic()))
        return logits


def load_of_step(step: Step) -> StepLoad:
    counts = np.diff(step.seq_start).astype(np.int64)
    computed = step.context_len - counts
    pairs = (counts - 1) * computed + counts * (counts - 1) // 2
    return StepLoad(
        num_tokens=len(step.token_ids),
        num_seqs=len(step.slot),
        num_keys=int(step.context_len.sum()),
        num_pairs=int(pairs.sum()),
    )
