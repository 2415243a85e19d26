"""What a build has decided before it writes the first file: the source it read, and the plan made for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xllm_compile.build_config import BuildConfig
from xllm_compile.device import ChosenDevice
from xllm_compile.graph_jobs import GraphJob
from xllm_compile.graph_passes.quantisation import Quantisation
from xllm_compile.graph_passes.step_cost import StepTimes
from xllm_compile.memory_layout import pool_bytes
from xllm_compile.micro_batches import SplitPlan
from xllm_compile.models.checkpoint import Checkpoint
from xllm_compile.models.config import DecoderConfig
from xllm_compile.models.stored_quantisation import StoredQuantisation
from xllm_compile.report import BucketReport, RegionReport
from xllm_compile.runtime.ops.spec import WeightSpec
from xllm_compile.runtime.program import RegionProgram


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What is being compiled, read and checked."""

    hf_config: dict[str, Any]
    config: DecoderConfig
    checkpoint: Checkpoint
    checkpoint_hash: str
    dtype: str
    kv_cache_dtype: str
    """dtype, or int8."""
    max_model_len: int
    tensor_parallel_size: int
    stored: StoredQuantisation | None
    """How the checkpoint's layers are quantised already."""
    quantisation: Quantisation | None
    """What the quantise pass is to do: with the checkpoint's own quantisation, or as the user asks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    config: BuildConfig
    source: Source
    device: ChosenDevice
    compiler: str
    """The version of the target's compiler."""
    key: str
    """Of the whole build."""
    programs: Sequence[RegionProgram]
    reports: Sequence[RegionReport]
    step_times: dict[str, StepTimes]
    buckets: BucketReport
    split: SplitPlan
    weights: Sequence[WeightSpec]
    jobs: Sequence[GraphJob]

    @property
    def activation_bytes(self) -> int:
        """Of the pool that all graphs share, for the largest step."""
        return pool_bytes(
            [(piece, report.layers) for report in self.reports for piece in report.lifetimes],
            self.buckets.tokens,
            self.buckets.logits,
            self.config.max_num_batched_tokens,
        )
