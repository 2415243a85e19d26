import pytest

from tests.runtime.policies.items import MillisecondsPerToken
from xllm_compile.runtime.policies.preemption import SwapPath, recompute_s, swap_pays
from xllm_compile.runtime.step_predictor import StepPredictor, StepPrior

# Qwen3-8B in bfloat16 on an H200: 144 KiB of KV per token; 4.8 TB/s of memory, PCIe 5 x16.
H200 = StepPredictor(
    StepPrior(
        by_tokens=lambda tokens: max(3.6e-3, tokens * 2.4e-5),
        token_s=2.4e-5,
        sequence_s=1e-6,
        key_s=3.1e-8,
        pair_s=1e-9,
    )
)
PCIE = SwapPath(bytes_per_s=55e9, kv_bytes_per_token=144 * 1024, latency_s=2e-5)


def test_recomputing_goes_in_full_steps() -> None:
    assert recompute_s(1000, 256, MillisecondsPerToken()) == pytest.approx(1.0)
    assert recompute_s(0, 256, MillisecondsPerToken()) == 0.0


@pytest.mark.parametrize("num_tokens", [64, 1000, 8000])
def test_a_gpu_swaps_over_pcie(num_tokens: int) -> None:
    assert swap_pays(num_tokens, 8192, H200, PCIE)


def test_a_slow_link_is_no_way_out() -> None:
    ethernet = SwapPath(bytes_per_s=1e9, kv_bytes_per_token=144 * 1024, latency_s=1e-4)
    assert not swap_pays(1000, 8192, H200, ethernet)


def test_a_path_has_a_rate() -> None:
    with pytest.raises(ValueError, match="bytes_per_s=0"):
        SwapPath(bytes_per_s=0, kv_bytes_per_token=1)
