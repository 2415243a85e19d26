"""What a KV cache counts of itself."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class KVCacheStats:
    """Counters only grow."""

    num_queried_tokens: int = 0
    """Tokens of sequences that were looked up."""
    num_hit_tokens: int = 0
    """Tokens that need not be computed."""
    num_shared_pages: int = 0
    """Pages mapped into one more range instead of being computed again."""
    num_copied_bytes: int = 0
    """Copied at the boundary of shared prefixes."""
    num_maps: int = 0
    num_maps_ahead: int = 0
    """Of these, made by another thread before the page was needed."""
    num_evicted_pages: int = 0
    """Pages taken although their content could still be found."""
