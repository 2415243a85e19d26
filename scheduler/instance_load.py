"""What an instance says of its load: from the engine's counters, and what it believes of its steps."""

from collections.abc import Callable

from xllm_compile.runtime.outputs import EngineStats, HandOverStats
from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.scheduler.cluster.state import InstanceCounters, InstanceLoad, StepProfile

# So many of each to tell what one adds: the smallest step has a least time.
_MANY = 1024


def instance_load(
    stats: EngineStats,
    *,
    ttft_s: float | None,
    tpot_s: float | None,
    is_draining: bool,
    profile: StepProfile,
) -> InstanceLoad:
    return InstanceLoad(
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_waiting_tokens=stats.num_waiting_tokens,
        num_late_waiting_tokens=stats.num_late_waiting_tokens,
        num_decoding=stats.num_decoding,
        num_context_tokens=stats.num_context_tokens,
        num_offline=stats.num_offline_running + stats.num_offline_waiting,
        num_offline_waiting_tokens=stats.num_offline_waiting_tokens,
        num_offline_decoding=stats.num_offline_decoding,
        num_offline_context_tokens=stats.num_offline_context_tokens,
        kv_tokens_used=stats.kv_tokens_used,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        is_draining=is_draining,
        profile=profile,
        counters=instance_counters(stats),
    )


def instance_counters(stats: EngineStats) -> InstanceCounters:
    steps, hand_overs = stats.graph_cache.by_outcome(), stats.hand_overs or HandOverStats()
    return InstanceCounters(
        num_prompt_tokens=stats.num_prompt_tokens,
        num_generated_tokens=stats.num_generated_tokens,
        prefix_queried_tokens=stats.prefix_queried_tokens,
        prefix_hit_tokens=stats.prefix_hit_tokens,
        num_exact_steps=steps["exact"],
        num_padded_steps=steps["padded"],
        num_dynamic_steps=steps["dynamic"],
        num_eager_steps=steps["eager"],
        num_preemptions=stats.num_preemptions,
        num_hand_overs=hand_overs.num_complete,
        num_failed_hand_overs=hand_overs.num_failed,
        num_sent_bytes=hand_overs.num_bytes,
    )


def step_profile(seconds: Callable[[StepLoad], float], max_num_batched_tokens: int) -> StepProfile:
    """Of a predictor that is linear in all but the number of tokens (runtime/step_predictor.py)."""
    sizes = [1]
    while sizes[-1] < max_num_batched_tokens:
        sizes.append(min(2 * sizes[-1], max_num_batched_tokens))
    base_s = seconds(StepLoad(num_tokens=sizes[-1]))

    def slope(load: StepLoad) -> float:
        return max(0.0, seconds(load) - base_s) / _MANY

    return StepProfile(
        num_tokens=tuple(sizes),
        seconds=tuple(seconds(StepLoad(num_tokens=size)) for size in sizes),
        sequence_s=slope(StepLoad(num_tokens=sizes[-1], num_seqs=_MANY)),
        key_s=slope(StepLoad(num_tokens=sizes[-1], num_keys=_MANY)),
        pair_s=slope(StepLoad(num_tokens=sizes[-1], num_pairs=_MANY)),
    )
