"""Bounds and policies of one engine."""

from dataclasses import dataclass

from xllm_compile.runtime.policies.admission import HORIZON
from xllm_compile.runtime.policies.order import POLICY_CHOICES, STARVATION_S, Order, PolicyChoice


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Bounds of one engine. None takes the model runner's limit."""

    max_num_seqs: int | None = None
    """Most running sequences."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step: long prompts are cut into chunks of this size."""
    max_waiting: int = 1024
    """Most sequences that wait to be scheduled; more are refused with QueueFullError."""
    max_waiting_tokens: int = 4 * 1024 * 1024
    """Most prompt tokens that wait."""
    async_scheduling: bool = False
    """Plan a step and report the last one while the device runs the one between."""
    scheduling_policy: PolicyChoice = "auto"
    """Who goes first: policies/order.py."""
    admission_horizon: int = HORIZON
    """Decode steps that a newcomer must fit beside what runs, so that nobody is preempted; 0 counts its prompt only."""
    starvation_s: float = STARVATION_S
    """Age from which the oldest sequence goes first and keeps its place, whatever the policy."""
    ttft_slo_ms: float | None = None
    """Wanted time to the first token of online requests that name none."""
    tpot_slo_ms: float | None = None
    """Wanted time between tokens of online requests that name none."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_waiting", "max_waiting_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.scheduling_policy not in POLICY_CHOICES:
            raise ValueError(f"scheduling_policy={self.scheduling_policy!r} must be one of {', '.join(POLICY_CHOICES)}")
        if self.starvation_s < 0:
            raise ValueError(f"starvation_s={self.starvation_s} must not be negative")
        for name in ("ttft_slo_ms", "tpot_slo_ms"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive")

    @property
    def order(self) -> Order:
        return Order.chosen(self.scheduling_policy, has_ttft_target=self.ttft_slo_ms is not None)
