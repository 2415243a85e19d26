"""What a live service of instances adds to their steps, measured from outside on one that has nothing else to do.

With the profile of a step it makes the hardware that the simulator runs on: nothing in it is fitted to what the two
are compared by.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from xllm_compile.benchmarks.live_cluster import LiveCluster
from xllm_compile.benchmarks.openai_client import StreamResult
from xllm_compile.benchmarks.simulation.hardware import Hardware
from xllm_compile.benchmarks.simulation.requests import SimRequest
from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.scheduler.cluster.state import StepProfile

# Prompts of the first are computed where they are decoded, those of the second are handed over.
_SHORT, _LONG = 16, 500
_GAP_S = 0.9
"""Between requests that should meet nobody."""
_NUM_REQUESTS = 12
"""Of each kind: of a few, one that met something else makes the median."""
_STREAMS_EACH, _STREAM_TOKENS = 8, 48


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Seconds."""

    gap_s: float
    """Between two steps, of instances that decode."""
    gateway_s: float
    """From client to instance and back, beside the step."""
    reserve_s: float
    """More until the first token where the request is handed over."""
    hand_over_s: float
    """From the first token to the second, beside the step."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(cluster: LiveCluster, profile: StepProfile, *, num_decodes: int, seed: int) -> Calibration:
    """Of a cluster that routes by the policy `slo` and has fixed roles."""
    cluster.replay(_requests(_NUM_REQUESTS // 3, _GAP_S / 2, _LONG, 4), seed=seed)
    short = _answers(cluster, _requests(_NUM_REQUESTS, _GAP_S, _SHORT, 8), seed + 1)
    long = _answers(cluster, _requests(_NUM_REQUESTS, _GAP_S, _LONG, 8), seed + 2)
    gateway_s = _median(one.ttft_s for one in short) - _prompt_s(profile, _SHORT)
    handed_s = _median(one.ttft_s for one in long) - _prompt_s(profile, _LONG)
    second_s = _median(one.itl_s[0] for one in long) - _median(gap for one in long for gap in one.itl_s[1:])
    # As many streams on each instance that decodes.
    streams = _answers(cluster, _requests(_STREAMS_EACH * num_decodes, 0.0, _SHORT, _STREAM_TOKENS), seed + 3)
    load = StepLoad(_STREAMS_EACH, _STREAMS_EACH, _STREAMS_EACH * (_SHORT + _STREAM_TOKENS // 2))
    middle = slice(_STREAM_TOKENS // 4, -_STREAM_TOKENS // 4)
    gap_s = _median(gap for one in streams for gap in one.itl_s[middle]) - profile.step_s(load)
    return Calibration(
        gap_s=max(0.0, gap_s),
        gateway_s=max(0.0, gateway_s),
        reserve_s=max(0.0, handed_s - gateway_s),
        hand_over_s=max(0.0, second_s),
    )


def hardware_of(
    cluster: LiveCluster, profile: StepProfile, found: Calibration, max_num_batched_tokens: int
) -> Hardware:
    """One instance of the cluster, as simulated."""
    instances = cluster.state()["instances"]
    return Hardware(
        profile=profile,
        kv_tokens=min(each["kv_tokens_total"] for each in instances),
        kv_bytes_per_token=0,
        # Of a prompt's last chunk; what bytes add to it within a machine is less than what varies.
        link_bytes_per_s=1.0,
        link_latency_s=found.hand_over_s,
        max_num_seqs=min(each["max_num_seqs"] for each in instances),
        max_num_batched_tokens=max_num_batched_tokens,
        gap_s=found.gap_s,
        gateway_s=found.gateway_s,
        reserve_s=found.reserve_s,
    )


def _requests(count: int, gap_s: float, num_prompt_tokens: int, num_output_tokens: int) -> list[SimRequest]:
    return [
        SimRequest(
            number=number,
            arrival_s=number * gap_s,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_output_tokens,
        )
        for number in range(count)
    ]


def _answers(cluster: LiveCluster, requests: Sequence[SimRequest], seed: int) -> list[StreamResult]:
    results = cluster.replay(requests, seed=seed).results
    failed = next((one.error for one in results if one.error is not None), None)
    if failed is not None:
        raise RuntimeError(f"a request of the calibration failed: {failed}")
    return results


def _prompt_s(profile: StepProfile, num_tokens: int) -> float:
    return profile.step_s(StepLoad().plus(0, num_tokens))


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
