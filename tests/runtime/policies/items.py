"""Sequences as scheduling sees them, without an engine, and a predictor with simple numbers."""

import itertools
import math
from dataclasses import dataclass, field

from xllm_compile.runtime.policies.chunk import StepLoad

_numbers = itertools.count()


@dataclass(eq=False)
class Item:
    name: str
    num_tokens: int
    num_computed_tokens: int = 0
    max_chunk: int = 1_000_000
    num_growth_tokens: int = 0
    is_offline: bool = False
    priority: int = 0
    is_begun: bool = False
    first_deadline_s: float = math.inf
    next_due_s: float = math.inf
    tpot_slo_s: float | None = None
    block_tokens: int = 1
    num_unheld_blocks: int = 0
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def max_chunk_tokens(self) -> int:
        return self.max_chunk

    @property
    def num_kv_blocks(self) -> int:
        return -(-self.num_computed_tokens // self.block_tokens)


class MillisecondsPerToken:
    """Every token takes a millisecond."""

    def seconds(self, load: StepLoad) -> float:
        return load.num_tokens / 1e3
