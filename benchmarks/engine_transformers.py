"""transformers for comparisons: MODEL_DIR MODE [--dtype float32].

eager is generate() with sdpa attention. compile is generate() with a static cache and torch.compile, frozen weights,
one compilation per shape. generate() would run the prompt eagerly; as one "chunk" of its own length it is compiled.
"""

import argparse
import os
import time
from typing import Any

# Before torch is imported: inductor packs the weights for oneDNN only when it may treat them as constants.
os.environ.setdefault("TORCHINDUCTOR_FREEZING", "1")

import torch
from transformers import AutoModelForCausalLM, CompileConfig, LogitsProcessor, LogitsProcessorList, StaticCache
from transformers.utils import logging as transformers_logging

from xllm_compile.benchmarks.engine_process import Generation, TokenIds, serve_engine

_CACHE_GRANULE = 64


class _FirstTokenClock(LogitsProcessor):
    """Notes when the first logits are there."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.at is None:
            self.at = time.perf_counter()
        return scores


class TransformersAdapter:
    def __init__(self, model_dir: str, mode: str, dtype: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self._is_compiled = mode == "compile"
        self._caches: dict[tuple[int, int], StaticCache] = {}
        if self._is_compiled:
            torch._dynamo.config.automatic_dynamic_shapes = False
            torch._dynamo.config.cache_size_limit = 64

    def generate(self, prompts: list[TokenIds], num_tokens: int) -> Generation:
        length = len(prompts[0])
        if any(len(prompt) != length for prompt in prompts):
            raise ValueError("prompts of one call must have one length: padding would change what is compared")
        ids = torch.tensor(prompts)
        clock = _FirstTokenClock()
        # Freezing needs no_grad: inference tensors cannot be constants of a compiled graph.
        with torch.no_grad() if self._is_compiled else torch.inference_mode():
            began = time.perf_counter()
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([clock]),
                **self._compile_options(len(prompts), length),
            )
            ended = time.perf_counter()
        assert clock.at is not None
        return Generation(
            first_s=clock.at - began,
            decode_s=ended - clock.at,
            num_decode_tokens=len(prompts) * (num_tokens - 1),
            token_ids=output[:, length:].tolist(),
        )

    def _compile_options(self, num_seqs: int, length: int) -> dict[str, Any]:
        """A static cache per shape, so that every call of a shape finds its compiled code again."""
        if not self._is_compiled:
            return {}
        key = (num_seqs, length)
        if key not in self._caches:
            room = -(-(length + _CACHE_GRANULE + 8) // _CACHE_GRANULE) * _CACHE_GRANULE
            self._caches[key] = StaticCache(config=self._model.config, max_cache_len=room)
        self._caches[key].reset()
        config = CompileConfig(fullgraph=False, mode="default")
        # The default is to compile on GPUs only.
        config._compile_all_devices = True  # type: ignore[assignment]
        return {"past_key_values": self._caches[key], "compile_config": config, "prefill_chunk_size": length}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir")
    parser.add_argument("mode", choices=["eager", "compile"])
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    serve_engine(lambda: TransformersAdapter(options.model_dir, options.mode, options.dtype))


if __name__ == "__main__":
    main()
