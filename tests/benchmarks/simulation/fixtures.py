"""A small device, and requests of several kinds."""

import random

from xllm_compile.benchmarks.simulation.hardware import Hardware
from xllm_compile.benchmarks.simulation.requests import SimRequest
from xllm_compile.scheduler.cluster.state import StepProfile

PROFILE = StepProfile(num_tokens=(1, 64, 1024), seconds=(0.010, 0.012, 0.070), sequence_s=1e-5, key_s=2e-7, pair_s=1e-9)


def hardware(
    kv_tokens: int = 100_000, max_num_seqs: int = 64, max_num_batched_tokens: int = 1024, is_async: bool = True
) -> Hardware:
    return Hardware(
        profile=PROFILE,
        kv_tokens=kv_tokens,
        kv_bytes_per_token=1000,
        link_bytes_per_s=1e9,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        is_async=is_async,
    )


def requests(
    count: int, rate: float, *, seed: int = 0, offline_share: float = 0.0, longest: int = 3000, tpot_slo_s: float = 0.05
) -> list[SimRequest]:
    rng = random.Random(seed)
    now, found = 0.0, []
    for number in range(count):
        now += rng.expovariate(rate)
        is_offline = rng.random() < offline_share
        found.append(
            SimRequest(
                number=number,
                arrival_s=now,
                num_prompt_tokens=rng.randint(1, longest),
                num_output_tokens=max(1, min(600, int(rng.expovariate(1 / 80)))),
                ttft_slo_s=None if is_offline else 1.0,
                tpot_slo_s=None if is_offline else tpot_slo_s,
                is_offline=is_offline,
            )
        )
    return found
