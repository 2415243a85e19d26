"""Launched steps that are not completed, oldest first, and the slots that must outlive them."""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from xllm_compile.runtime.batch import Batch
from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.runtime.policies.planning_lead import PlanningLead
from xllm_compile.runtime.sequence import Request, Sequence
from xllm_compile.runtime.step_executor import StepExecutor, StepResult


@dataclass(kw_only=True, slots=True)
class LaunchedStep:
    batch: Batch
    requests: list[Request]
    """Those with tokens in it, each once."""
    load: StepLoad
    predicted_s: float
    launched_s: float
    """Of the monotonic clock."""
    computed: list[tuple[Sequence, int]]
    """Sequences that are being handed over, with the tokens from their start whose KV is there afterwards."""
    wait: Callable[[], StepResult | None]
    ended: list[int] = field(default_factory=list)
    """Slots of sequences that ended after the launch: theirs until the step has run."""


class StepsInFlight:
    """Two at most. Belongs to the engine's thread."""

    def __init__(self, executor: StepExecutor, kv_cache: KVCache) -> None:
        self._executor = executor
        self._kv_cache = kv_cache
        self._steps: deque[LaunchedStep] = deque()
        self._lead = PlanningLead()
        self._last_ended_s: float | None = None
        """When the device ended its last step; None where it had nothing to do after."""
        self.num_completed = 0
        self.busy_s = 0.0
        """Of the device,"""
        self.gap_s = 0.0
        """and what it stood still between two steps."""

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def num_ended_slots(self) -> int:
        """Slots whose sequences ended, and that are not free yet."""
        return sum(len(step.ended) for step in self._steps)

    @property
    def is_early(self) -> bool:
        """Whether a step runs, and it is not time yet to plan the one behind it: see policies/planning_lead.py."""
        return len(self._steps) == 1 and self._early_s() > 0

    def wait_to_plan(self) -> None:
        """Until it is time, the step that runs has ended, or the wait is interrupted."""
        self._executor.wait(self._early_s())

    def left_s(self) -> float:
        """Of the step that runs, as predicted: until the one behind it begins."""
        if len(self._steps) != 1 or self._executor.has_ended:
            return 0.0
        step = self._steps[0]
        began_s = max(step.launched_s, self._last_ended_s or 0.0)
        return max(0.0, began_s + step.predicted_s - time.monotonic())

    def launch(
        self,
        batch: Batch,
        *,
        requests: list[Request],
        load: StepLoad,
        predicted_s: float,
        computed: list[tuple[Sequence, int]],
    ) -> None:
        """Hand a step to the device, behind those that it has."""
        launched_s = time.monotonic()
        self._steps.append(
            LaunchedStep(
                batch=batch,
                requests=requests,
                load=load,
                predicted_s=predicted_s,
                launched_s=launched_s,
                computed=computed,
                wait=self._executor.launch(batch),
            )
        )

    def complete(self) -> tuple[LaunchedStep, StepResult] | None:
        """Wait for the oldest step; None where the wait was interrupted.

        Raises what it raised: then nothing counts of those behind it, which computed on what it should have brought.
        """
        try:
            result = self._steps[0].wait()
        except BaseException:
            self._drop()
            raise
        if result is None:
            return None
        step = self._steps.popleft()
        self.num_completed += 1
        self.busy_s += result.ended_s - result.started_s
        if self._last_ended_s is not None:
            self.gap_s += result.started_s - self._last_ended_s
        self._last_ended_s = result.ended_s
        if self._steps:
            self._lead.learn(was_late=self._steps[0].launched_s > result.ended_s)
        self._free(step)
        return step, result

    def give_back(self, slot: int) -> None:
        """Free the slot when no launched step has it any more."""
        if self._steps:
            self._steps[-1].ended.append(slot)
        else:
            self._kv_cache.free(slot)

    def rest(self) -> None:
        """There is nothing to launch: what comes before the next step is no gap."""
        self._last_ended_s = None

    def _early_s(self) -> float:
        """Until the step behind the one that runs is to be planned."""
        return self.left_s() - self._lead.seconds(self._steps[0].predicted_s)

    def _drop(self) -> None:
        steps, self._steps = self._steps, deque()
        for index, step in enumerate(steps):
            # The first is the one that was waited for.
            with suppress(Exception):
                while index > 0 and step.wait() is None:
                    pass
            self._free(step)
        self._kv_cache.forget()

    def _free(self, step: LaunchedStep) -> None:
        for slot in step.ended:
            self._kv_cache.free(slot)
