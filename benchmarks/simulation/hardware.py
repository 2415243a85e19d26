"""What simulated instances run on: steps of a model by the cost model, its KV cache, and the links between."""

from dataclasses import dataclass, replace

from xllm_compile.benchmarks.planned_models import planned_regions
from xllm_compile.bucket_plan import predict_step_times, seconds_per_key
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.device_spec import device_spec
from xllm_compile.graph_passes.node_cost import step_seconds
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.scheduler.cluster.state import StepProfile


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One instance and its link."""

    profile: StepProfile
    """What its steps take."""
    kv_tokens: int
    kv_bytes_per_token: int
    link_bytes_per_s: float
    """Of KV, from one instance to another."""
    link_latency_s: float = 0.001
    """Of a hand-over: messages there and back."""
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 40_960

    def hand_over_s(self, num_tokens: int) -> float:
        return self.link_latency_s + num_tokens * self.kv_bytes_per_token / self.link_bytes_per_s

    def scaled(self, factor: float) -> StepProfile:
        """The profile with all times longer by the factor: predictions are off by as much."""
        profile = self.profile
        return replace(
            profile,
            seconds=tuple(seconds * factor for seconds in profile.seconds),
            sequence_s=profile.sequence_s * factor,
            key_s=profile.key_s * factor,
            pair_s=profile.pair_s * factor,
        )


def planned_hardware(
    model: str,
    device: str,
    *,
    kv_bytes_per_token: int,
    kv_bytes: float,
    link_bytes_per_s: float,
    max_num_batched_tokens: int = 8192,
) -> Hardware:
    """By the cost model; nothing is run. Raises ValueError for an unknown device."""
    regions, costs = planned_regions(model), CostModel(spec=device_spec(device))
    times = predict_step_times(regions, costs, max_num_batched_tokens)
    key_s = seconds_per_key(regions, costs)
    prompt = 4096
    whole_s = step_seconds(regions, StepShape(sequences=((prompt, prompt),), padded_tokens=prompt), costs)
    without_s = step_seconds(regions, StepShape(padded_tokens=prompt), costs) + key_s * prompt
    first_row_s, rows_s = times["R"].of(1), times["R"].of(256)
    return Hardware(
        profile=StepProfile(
            num_tokens=times["T"].sizes,
            seconds=tuple(seconds + first_row_s for seconds in times["T"].seconds),
            sequence_s=(rows_s - first_row_s) / 255,
            key_s=key_s,
            pair_s=max(0.0, whole_s - without_s) / (prompt * (prompt - 1) / 2),
        ),
        kv_tokens=int(kv_bytes / kv_bytes_per_token),
        kv_bytes_per_token=kv_bytes_per_token,
        link_bytes_per_s=link_bytes_per_s,
        max_num_batched_tokens=max_num_batched_tokens,
    )
