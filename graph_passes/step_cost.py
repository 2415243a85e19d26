"""Relative cost of a step by its size: one formula for choosing buckets and for choosing among them."""

# A step reads every weight once, however few tokens it has: on the machines measured that takes as long as
# computing about 20 tokens (bf16: 48 GB/s read, 970 GFLOP/s).
_WEIGHTS_AS_TOKENS = 20.0

# Padding is worth it up to this factor; beyond it the dynamic-shape graph runs the step at its own size.
DYNAMIC_OVERHEAD = 1.1


def step_cost(num_tokens: int) -> float:
    """Relative time of a step of ``num_tokens`` rows, padding included."""
    return _WEIGHTS_AS_TOKENS + num_tokens
