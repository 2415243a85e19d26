"""Shape and budget of an instance's KV cache, and what follows: bytes of a token, size and number of pages."""

import math
from dataclasses import dataclass
from functools import cache

import torch

from xllm_compile.runtime.memory.cpu_memory import HUGE_PAGE_BYTES, max_mappings
from xllm_compile.runtime.ops.kv_rows import row_width

_SMALLEST_PAGE_BYTES = 4096
_LARGEST_PAGE_BYTES = 64 << 20
# Tokens a multiple of this apart share their sets of the CPU's L1, and with 28 layers of 4 KiB they use a quarter of
# those of a 1 MiB L2. Eight lines more spread them over all.
_ALIASING_BYTES = 4096
_SPREAD_BYTES = 512
# Tokens of less are not worth it: 512 bytes are 1.6% of these.
_SMALLEST_SPREAD_TOKEN_BYTES = 32 << 10


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCacheConfig:
    """Shape and budget. Raises ValueError when not even one sequence of max_model_len fits."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    """The model's, or int8 (runtime/ops/kv_rows.py)."""
    max_model_len: int
    """Most tokens of one sequence; the length of a slot."""
    num_slots: int
    """Most sequences that hold KV at the same time."""
    kv_memory_bytes: int
    """Budget of physical memory over all layers, in whole pages."""
    prefix_cache: bool = True
    """Keep the KV of what was computed and share it between sequences that start alike."""
    block_tokens: int = 16
    """Tokens of a block, the unit in which prefixes are shared."""
    pretouch: bool = False
    """Have all of the memory at once, instead of page by page as it is needed."""
    page_bytes: int | None = None
    """Physical page; None takes 2 MiB, less for a model whose blocks are small, more where the system allows too few
    mappings for as many pages."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "max_model_len", "num_slots", "block_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.page_bytes is None:
            object.__setattr__(self, "page_bytes", self._fitting_page_bytes())
        if self.page_size < self.bytes_per_token:
            raise ValueError(f"page_bytes={self.page_bytes} is less than a token's {self.bytes_per_token} bytes")
        if self.num_pages < self.pages_per_slot:
            needed = self.pages_per_slot * self.page_size
            fitting = self.num_pages * self.page_tokens
            shorter = f" or lower max_model_len to at most {fitting}" if fitting else ""
            raise ValueError(
                f"kv_memory_bytes={self.kv_memory_bytes} holds {fitting} tokens of {self.bytes_per_token} bytes, "
                f"one sequence of max_model_len={self.max_model_len} needs {needed} bytes; "
                f"raise kv_memory_bytes to at least {needed}{shorter}"
            )

    @property
    def token_shape(self) -> tuple[int, int, int, int]:
        return _token_shape(self.num_layers, self.num_kv_heads, self.head_dim, self.dtype)

    @property
    def bytes_per_token(self) -> int:
        """From one token to the next: what a token holds, and padding where that would alias in the CPU's caches."""
        return _bytes_per_token(self.num_layers, self.num_kv_heads, self.head_dim, self.dtype)

    @property
    def page_size(self) -> int:
        assert self.page_bytes is not None
        return self.page_bytes

    @property
    def num_pages(self) -> int:
        return self.kv_memory_bytes // self.page_size

    @property
    def page_tokens(self) -> int:
        """Whole tokens of a page. Scheduling counts a page for each so many; the rest, under one token, is slack."""
        return self.page_size // self.bytes_per_token

    @property
    def pages_per_slot(self) -> int:
        """What scheduling counts for one sequence of full length."""
        return -(-self.max_model_len // self.page_tokens)

    @property
    def total_tokens(self) -> int:
        """Tokens that one sequence without end could hold."""
        return min(self.num_pages * self.page_tokens, self.num_slots * self.max_model_len)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that num_tokens touch."""
        return -(-num_tokens * self.bytes_per_token // self.page_size)

    def _fitting_page_bytes(self) -> int:
        size = _SMALLEST_PAGE_BYTES
        while size < min(self.block_tokens * self.bytes_per_token, HUGE_PAGE_BYTES) or size < self.bytes_per_token:
            size *= 2
        # Each page may become a mapping of its own, and each slot ends in one.
        while self.kv_memory_bytes // size + 2 * self.num_slots > max_mappings() and size < _LARGEST_PAGE_BYTES:
            size *= 2
        return size


def _token_shape(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    return (num_layers, 2, num_kv_heads, row_width(head_dim, is_int8=dtype == torch.int8))


@cache
def _bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    # Asked for several times for every token of every step.
    content = math.prod(_token_shape(num_layers, num_kv_heads, head_dim, dtype)) * dtype.itemsize
    is_aliased = content % _ALIASING_BYTES == 0 and content >= _SMALLEST_SPREAD_TOKEN_BYTES
    return content + _SPREAD_BYTES * is_aliased
