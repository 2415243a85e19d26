"""Our model definition in stock torch operators, launched one by one, for comparisons: MODEL_DIR.

What a model costs without this project's compiler: ``models/decoder.py`` as it is written, called directly. No capture,
no passes, no packed weights; our operators are made of torch's own, with no copy or mask that prompts of one length do
not need. The loop around it is shorter than our engine's: no scheduler, no sampler but argmax.
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from xllm_compile.benchmarks.engine_process import Generation, TokenIds, serve_engine
from xllm_compile.models.checkpoint import Checkpoint
from xllm_compile.models.config import read_hf_config
from xllm_compile.models.decoder import EMBED_WEIGHT, Region, build_regions
from xllm_compile.models.registry import read_model_config
from xllm_compile.models.rope import rope_constants
from xllm_compile.runtime.ops import LIBRARY


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Over the whole head, in x's dtype, as transformers does it."""
    first, second = x.chunk(2, dim=-1)
    c, s = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


def kv_write(k: Tensor, v: Tensor, kv_cache: Tensor, positions: Tensor, seq_start: Tensor, slot: Tensor) -> None:
    """Of sequences with equally many tokens."""
    rows, at = slot.long().repeat_interleave(k.shape[0] // slot.shape[0]), positions.long()
    kv_cache[rows, at, 0] = k
    kv_cache[rows, at, 1] = v


def attention(
    q: Tensor, kv_cache: Tensor, seq_start: Tensor, context_len: Tensor, slot: Tensor, scale: float, window: int
) -> Tensor:
    """Of sequences with equally many tokens and keys, in the first slots; either one token each or whole prompts."""
    num_tokens, num_heads, head_dim = q.shape
    num_seqs, num_kv_heads = slot.shape[0], kv_cache.shape[3]
    keys, values = kv_cache[:num_seqs, : int(context_len[0])].permute(2, 0, 3, 1, 4)
    if num_tokens == num_seqs:
        # The heads of a group as queries of its one key/value head: nothing is repeated, and there is no mask.
        grouped = q.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
        return F.scaled_dot_product_attention(grouped, keys, values, scale=scale).reshape(q.shape)
    queries = q.view(num_seqs, num_tokens // num_seqs, num_heads, head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).reshape(q.shape)


class StockAdapter:
    """Raises ValueError for attention windows and for a partial rotary embedding, which the above leaves out."""

    def __init__(self, model_dir: Path) -> None:
        config = read_model_config(read_hf_config(model_dir))
        if any(config.layer_windows) or config.rotary_dim != config.head_dim:
            raise ValueError(f"{model_dir} has attention windows or a partial rotary embedding; take another model")
        for implementation in (rms_norm, rope, kv_write, attention):
            LIBRARY.impl(implementation.__name__, implementation, "CPU")
        self._config = config
        checkpoint, constants = Checkpoint(model_dir), rope_constants(config)

        def weights(region: Region, layer: int) -> dict[str, Tensor]:
            names = {name: name.format(layer=layer) for name in region.weights}
            return {
                name: constants[name] if name in constants else checkpoint.tensor(source)
                for name, source in names.items()
            }

        embed, *layers, head = build_regions(config)
        by_number = {number: region for region in layers for number in region.layers}
        self._embed, self._head = (embed, weights(embed, 0)), (head, weights(head, 0))
        self._layers = [(by_number[number], weights(by_number[number], number)) for number in sorted(by_number)]

    @torch.inference_mode()
    def generate(self, prompts: list[TokenIds], num_tokens: int) -> Generation:
        num_seqs, length = len(prompts), len(prompts[0])
        if any(len(prompt) != length for prompt in prompts):
            raise ValueError("prompts of one call must have one length: padding would change what is compared")
        config = self._config
        shape = (len(self._layers), num_seqs, length + num_tokens, 2, config.num_kv_heads, config.head_dim)
        cache = torch.zeros(shape, dtype=self._embed[1][EMBED_WEIGHT].dtype)
        began = time.perf_counter()
        tokens = [self._step(torch.tensor(prompts, dtype=torch.int32), 0, cache)]
        first = time.perf_counter()
        for done in range(num_tokens - 1):
            tokens.append(self._step(tokens[-1].unsqueeze(1), length + done, cache))
        ended = time.perf_counter()
        return Generation(
            first_s=first - began,
            decode_s=ended - first,
            num_decode_tokens=num_seqs * (num_tokens - 1),
            token_ids=torch.stack(tokens, 1).tolist(),
        )

    def _step(self, token_ids: Tensor, position: int, cache: Tensor) -> Tensor:
        """The next token [S] of each sequence, token_ids [S, N] being those from ``position`` on."""
        num_seqs, num_tokens = token_ids.shape
        positions = torch.arange(position, position + num_tokens, dtype=torch.int32).repeat(num_seqs)
        embed, embed_weights = self._embed
        rope_len = torch.full_like(positions, position + num_tokens)
        hidden, zeros, cos, sin = embed.function(
            {"token_ids": token_ids.flatten(), "positions": positions, "rope_len": rope_len}, embed_weights
        )
        step = {
            "cos": cos,
            "sin": sin,
            "positions": positions,
            "seq_start": torch.arange(0, num_seqs + 1, dtype=torch.int32) * num_tokens,
            "context_len": torch.full((num_seqs,), position + num_tokens, dtype=torch.int32),
            "slot": torch.arange(num_seqs, dtype=torch.int32),
        }
        delta, residual = hidden, zeros
        for (region, weights), kv_cache in zip(self._layers, cache, strict=True):
            delta, residual = region.function(
                {"delta": delta, "residual": residual, "kv_cache": kv_cache, **step}, weights
            )
        last = torch.arange(1, num_seqs + 1) * num_tokens - 1
        head, head_weights = self._head
        rows = torch.arange(num_seqs)
        (logits,) = head.function({"delta": delta[last], "residual": residual[last], "logits_at": rows}, head_weights)
        return logits.argmax(-1).int()


if __name__ == "__main__":
    serve_engine(lambda: StockAdapter(Path(sys.argv[1])))
