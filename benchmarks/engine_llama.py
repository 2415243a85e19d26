"""llama.cpp for comparisons: FILE.gguf. Runs in the environment of llama-cpp-python, through its C interface.

The loop is that of llama-server without HTTP: sequences take a slot of the KV cache each, a new one is prefilled as
soon as a slot is free, then all decode together. Slots are streams of their own (not kv_unified, which has every
sequence look at the whole cache), and there are as many as the longest sequence leaves room for.
"""

import argparse
import ctypes
import heapq
import os
from collections import deque
from dataclasses import dataclass

import llama_cpp
import numpy as np

from xllm_compile.benchmarks.engine_process import SteppedAdapter, TokenIds, serve_engine

_BATCH_TOKENS = 2048
_UBATCH_TOKENS = 512
# A stream's length is rounded up to this.
_STREAM_TOKENS = 256
_FLASH_ATTENTION = {
    "auto": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}


@dataclass(kw_only=True, slots=True)
class _Sequence:
    index: int
    prompt: TokenIds
    num_left: int
    slot: int = -1
    num_computed: int = 0
    last: int = -1
    """The token generated last."""


class LlamaAdapter(SteppedAdapter):
    def __init__(self, gguf: str, *, flash_attention: str, kv_tokens: int) -> None:
        """kv_tokens: that the KV cache may hold, of all sequences together."""
        llama_cpp.llama_backend_init()
        _keep_log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(_keep_log, ctypes.c_void_p(0))
        self._keep_log = _keep_log
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(gguf.encode(), parameters)
        if not self._model:
            raise OSError(f"llama.cpp cannot load {gguf}; make it again with gguf_file.py")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._flash_attention = _FLASH_ATTENTION[flash_attention]
        self._kv_tokens = kv_tokens
        self._context: llama_cpp.llama_context_p | None = None
        self._shape = (0, 0)
        self._batch = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._free_slots: list[int] = []

    def begin(self, prompts: list[TokenIds], lengths: list[int]) -> None:
        longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
        stream_tokens = -(-longest // _STREAM_TOKENS) * _STREAM_TOKENS
        self._open_context(min(len(prompts), max(1, self._kv_tokens // stream_tokens)), stream_tokens)
        self._waiting += (
            _Sequence(index=index, prompt=prompt, num_left=length)
            for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        )

    def step(self) -> list[tuple[int, TokenIds]]:
        if self._waiting and self._free_slots:
            sequence = self._waiting.popleft()
            sequence.slot = heapq.heappop(self._free_slots)
            self._running.append(sequence)
            for start in range(0, len(sequence.prompt), _BATCH_TOKENS):
                self._decode([(sequence, sequence.prompt[start : start + _BATCH_TOKENS])])
            computed = [sequence]
        else:
            # Streams are computed together where they follow each other in the batch; others one by one.
            computed = sorted(self._running, key=lambda sequence: sequence.slot)
            self._decode([(sequence, [sequence.last]) for sequence in computed])
        for sequence in computed:
            sequence.num_left -= 1
            if sequence.num_left == 0:
                self._leave(sequence)
        return [(sequence.index, [sequence.last]) for sequence in computed]

    def end(self) -> None:
        self._waiting.clear()
        for sequence in list(self._running):
            self._leave(sequence)

    def _leave(self, sequence: _Sequence) -> None:
        self._running.remove(sequence)
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), sequence.slot, -1, -1)
        heapq.heappush(self._free_slots, sequence.slot)

    def _decode(self, chunks: list[tuple[_Sequence, TokenIds]]) -> None:
        """Compute the chunks; the last token of each is sampled."""
        batch, at, last_at = self._batch, 0, []
        for sequence, ids in chunks:
            for token in ids:
                batch.token[at], batch.pos[at] = token, sequence.num_computed
                batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, sequence.slot, 0
                sequence.num_computed += 1
                at += 1
            batch.logits[at - 1] = 1
            last_at.append(at - 1)
        batch.n_tokens = at
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code} for {at} tokens")
        for (sequence, _), row in zip(chunks, last_at, strict=True):
            logits = llama_cpp.llama_get_logits_ith(self._context, row)
            sequence.last = int(np.argmax(np.ctypeslib.as_array(logits, (self._vocab_size,))))

    def _open_context(self, num_slots: int, stream_tokens: int) -> None:
        """A context is made for a number of slots; one is kept, so that the KV cache exists once."""
        self._free_slots = list(range(num_slots))
        if self._shape == (num_slots, stream_tokens):
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_seq_max, parameters.n_ctx = num_slots, num_slots * stream_tokens
        parameters.n_batch, parameters.n_ubatch = _BATCH_TOKENS, _UBATCH_TOKENS
        parameters.n_threads = parameters.n_threads_batch = len(os.sched_getaffinity(0))
        parameters.flash_attn_type = self._flash_attention
        parameters.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no room for {num_slots} sequences of {stream_tokens} tokens")
        self._shape = (num_slots, stream_tokens)
        # Memory that is touched for the first time is not what is measured.
        warm = _Sequence(index=-1, prompt=[], num_left=0, slot=0)
        self._decode([(warm, [0] * min(_UBATCH_TOKENS, stream_tokens))])
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf")
    parser.add_argument("--flash-attention", choices=list(_FLASH_ATTENTION), default="auto")
    parser.add_argument("--kv-tokens", type=int, required=True)
    options = parser.parse_args()
    serve_engine(
        lambda: LlamaAdapter(options.gguf, flash_attention=options.flash_attention, kv_tokens=options.kv_tokens)
    )


if __name__ == "__main__":
    main()
