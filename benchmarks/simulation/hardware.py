"""What simulated instances run on: steps of a model by the cost model, its KV cache, and the links between."""

from dataclasses import dataclass, replace

from xllm_compile.benchmarks.planned_models import planned_regions
from xllm_compile.bucket_plan import predict_step_times, seconds_per_key
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.device_spec import device_spec
from xllm_compile.graph_passes.node_cost import step_seconds
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.runtime.policies.chunk import StepLoad
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
    gap_s: float = 0.0
    """The device waits for its host so long between two steps."""
    gateway_s: float = 0.0
    """From the client to an instance, and with the first token back."""
    reserve_s: float = 0.0
    """To ask for a place on the instance that is to decode, beside the wait for its device."""
    is_async: bool = True
    """Whether a step is planned while the one before it runs."""

    def hand_over_s(self, num_tokens: int) -> float:
        return self.link_latency_s + num_tokens * self.kv_bytes_per_token / self.link_bytes_per_s

    def least_s(self, num_prompt_tokens: int, num_output_tokens: int) -> float:
        """Device time of a request at the least, whatever it shares its steps with and however it is cut into them.

        Every token takes its share of the cheapest step there is, and what attention reads and computes is read and
        computed.
        """
        profile, most = self.profile, self.max_num_batched_tokens
        token_s = min(profile.step_s(StepLoad(num_tokens=size)) / size for size in {*profile.num_tokens, most})
        num_tokens = num_prompt_tokens + num_output_tokens - 1
        num_keys = num_output_tokens * num_prompt_tokens + num_output_tokens * (num_output_tokens - 1) // 2
        num_pairs = num_prompt_tokens * (num_prompt_tokens - 1) // 2
        linear_s = profile.sequence_s * num_output_tokens + profile.key_s * num_keys + profile.pair_s * num_pairs
        return token_s * num_tokens + linear_s

    def truth(self, factor: float) -> StepProfile:
        """What steps take from one to the next, where predictions are off by the factor."""
        profile = self.profile
        return replace(
            profile,
            seconds=tuple(self.gap_s + seconds * factor for seconds in profile.seconds),
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
