"""How a dense decoder is cut over the ranks of one instance: heads, feed-forward size, and the weights that follow."""

from dataclasses import dataclass

from xllm_compile.models.config import DecoderConfig
from xllm_compile.runtime.ops.spec import Shard


class TensorParallelError(ValueError):
    """The model cannot be cut into that many parts. Names the sizes that can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankShape:
    """What one rank computes. With fewer key/value heads than ranks, neighbouring ranks hold the same one."""

    tensor_parallel_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    num_kv_replicas: int

    def shard(self, weight: str) -> Shard | None:
        """The part of a layer's weight ("mlp.up_proj.weight") that a rank holds; None where it holds all of it."""
        size = self.tensor_parallel_size
        module, _, kind = weight.rpartition(".")
        if size == 1:
            return None
        if module in ("self_attn.k_proj", "self_attn.v_proj"):
            return Shard(axis=0, num_parts=size // self.num_kv_replicas, num_replicas=self.num_kv_replicas)
        if module in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj"):
            return Shard(axis=0, num_parts=size)
        if module in ("self_attn.o_proj", "mlp.down_proj") and kind == "weight":
            return Shard(axis=1, num_parts=size)
        return None


def rank_shape(config: DecoderConfig, tensor_parallel_size: int) -> RankShape:
    """Raises TensorParallelError, naming the value and what divides, when the model cannot be cut evenly."""
    size, kv_heads = tensor_parallel_size, config.num_kv_heads
    if not _fits(config, size):
        fitting = [str(n) for n in range(1, config.num_heads + 1) if _fits(config, n)]
        raise TensorParallelError(
            f"tensor_parallel_size={size} does not divide num_attention_heads={config.num_heads},"
            f" num_key_value_heads={kv_heads} (or the other way round) and intermediate_size="
            f"{config.intermediate_size}; use one of {', '.join(fitting)}"
        )
    return RankShape(
        tensor_parallel_size=size,
        num_heads=config.num_heads // size,
        num_kv_heads=max(1, kv_heads // size),
        intermediate_size=config.intermediate_size // size,
        num_kv_replicas=max(1, size // kv_heads),
    )


def _fits(config: DecoderConfig, size: int) -> bool:
    heads_fit = config.num_heads % size == 0 and (config.num_kv_heads % size == 0 or size % config.num_kv_heads == 0)
    return heads_fit and config.intermediate_size % size == 0
