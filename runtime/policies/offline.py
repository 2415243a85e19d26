"""What offline sequences may take of a step: the time that its online ones leave.

Source: OOCO, arXiv:2511.21862; xLLM 3.1, arXiv:2510.14686. Two of its choices are made otherwise here: sequences that
have to give way wait instead of being computed again, and a chunk is where prefill is interrupted instead of a layer.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Self

from xllm_compile.runtime.policies.chunk import StepLoad, StepSeconds


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineRules:
    """What of it is chosen once."""

    tpot_share: float = 0.98
    """Share of online sequences' TPOT targets that a step may take with offline ones."""
    prefill_share: float = 0.1
    """Share by which offline sequences may lengthen a step that computes online prompts."""
    step_s: float = 0.1
    """Longest step that offline prompts fill up: so long an online one waits for them, as the next step is planned."""

    def __post_init__(self) -> None:
        if not 0 < self.tpot_share <= 1 or self.prefill_share < 0 or self.step_s <= 0:
            raise ValueError(
                f"tpot_share={self.tpot_share} must be above 0 and at most 1, prefill_share={self.prefill_share} at "
                f"least 0 and step_s={self.step_s} positive"
            )

    @classmethod
    def within(cls, tpot_slo_s: float | None) -> Self:
        """Of an instance whose requests usually have that target: whoever joins with a first token from elsewhere waits
        for the steps that are planned, though nobody online decodes in them.
        """
        rules = cls()
        return rules if tpot_slo_s is None else replace(rules, step_s=min(rules.step_s, tpot_slo_s))

    def budget_s(self, online_budget_s: float, prefill_s: float | None) -> float:
        """Longest step with offline sequences that decode; for prompts of theirs `step_s` is a limit as well.

        online_budget_s: as `step_budget` has it for the online ones, who get shorter steps where they are late.
        prefill_s: predicted time of the step with what is online in it; None if no prompt is.
        """
        budget_s = self.tpot_share * online_budget_s
        return budget_s if prefill_s is None else min(budget_s, (1 + self.prefill_share) * prefill_s)


def num_in_time(load: StepLoad, contexts: Sequence[int], budget_s: float, model: StepSeconds) -> int:
    """How many of the sequences, the first ones, can decode beside the load within the step's budget.

    contexts: their tokens in the KV cache.
    """
    if budget_s == float("inf"):
        return len(contexts)
    loads = accumulate(contexts, lambda before, computed: before.plus(computed, 1), initial=load)
    return max(0, bisect_right(list(loads), budget_s, key=model.seconds) - 1)
