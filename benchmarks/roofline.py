"""What a step costs at least: bytes of weights to read, floating-point operations of its products."""

from xllm_compile.models.config import DecoderConfig


def linear_parameters(config: DecoderConfig) -> int:
    """Weights of the products inside the layers; embedding and head are not among them."""
    attention = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim + config.num_heads * config.head_dim
    return config.num_layers * config.hidden_size * (attention + 3 * config.intermediate_size)


def prefill_flops(config: DecoderConfig, num_tokens: int) -> int:
    """Of one prompt from an empty cache, with the head on its last row and causal attention; a multiply-add is two."""
    linears = 2 * linear_parameters(config) * num_tokens
    head = 2 * config.vocab_size * config.hidden_size
    seen_keys = num_tokens * (num_tokens + 1) // 2
    # Scores and weighted values: two products per (query, key) pair.
    attention = config.num_layers * 4 * config.num_heads * config.head_dim * seen_keys
    return linears + head + attention
