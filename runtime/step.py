"""One token-packed step: what the scheduler builds and the model runner executes.

Prefill chunks and decodes ride together. All arrays are int32. T tokens, S sequences, R logits rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from xllm_compile.runtime.outputs import GraphCacheStats

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    token_ids: Int32Array
    """[T]"""
    positions: Int32Array
    """[T] position of each token in its sequence."""
    rope_len: Int32Array
    """[T] length that length-dependent rotary scaling uses: max(prompt length, context_len) of the token's sequence."""
    seq_start: Int32Array
    """[S+1] cumulative token counts; sequence s owns rows seq_start[s]:seq_start[s+1]."""
    context_len: Int32Array
    """[S] tokens in the cache once this step's tokens are written."""
    slot: Int32Array
    """[S] KV-cache row the sequence owns."""
    logits_at: Int32Array
    """[R] rows of the step whose logits are wanted."""
    pool_at: Int32Array = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    """[P] rows whose final hidden states are wanted, for embeddings."""
    page_ops: Int32Array = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    """What happens to pages of the KV cache before the step, as runtime/memory/page_ops.py writes it."""


class ModelRunner(Protocol):
    """Executes steps. The engine knows no more of the model than this."""

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    """Most sequences in one step."""
    max_num_batched_tokens: int
    """Most tokens in one step."""
    embedding_size: int
    """Elements of a hidden state."""

    def execute(self, step: Step, on_layers: Callable[[], None] | None = None) -> Tensor:
        """Run one step, writing the KV cache. Returns float32 logits [R, vocab_size], valid until the next call.

        on_layers is called right before the layers run, which is the long part and leaves Python's lock to others.
        """
        ...

    def pooled(self) -> Tensor:
        """Float32 hidden states [P, embedding_size] after the final norm, at the last step's ``pool_at``. Valid until
        the next call of `execute`."""
        ...

    def last_outcome(self) -> str:
        """How the graphs of the last step's layers were found (graph_cache.Outcome)."""
        ...

    def graph_cache_stats(self) -> GraphCacheStats:
        """How steps found their graphs so far."""
        ...


class RunnerAround:
    """A ModelRunner that is another one in all but `execute`."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.vocab_size = runner.vocab_size
        self.max_model_len = runner.max_model_len
        self.max_num_seqs = runner.max_num_seqs
        self.max_num_batched_tokens = runner.max_num_batched_tokens
        self.embedding_size = runner.embedding_size

    def pooled(self) -> Tensor:
        return self._runner.pooled()

    def last_outcome(self) -> str:
        return self._runner.last_outcome()

    def graph_cache_stats(self) -> GraphCacheStats:
        return self._runner.graph_cache_stats()
