"""Mapped ranges against a block table: memory beyond what is needed, time to get it, and attention.

Memory and latency come from the runtime's KV cache in the shape of Qwen3-0.6B; sequences are played, not computed.
"""

import ctypes
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.paged_kv import BLOCK_TOKENS, PagedKernels
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.timing import measure_in_turns, summarise
from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.ops import native

_LAYERS, _HEADS, _KV_HEADS, _HEAD_DIM = 28, 16, 8, 128
_SHORTEST, _LONGEST = 16, 4096
_MADV_HUGEPAGE = 14
# Between two played steps, for what another thread maps ahead; real steps are far longer.
_PAUSE_S = 0.002


def run_xtensor(
    results: Path,
    command: Sequence[str],
    *,
    sequences: int,
    steps: int,
    context: int,
    batch: int,
    rounds: int,
    step_ms: float,
    prompt_token_ms: float,
) -> None:
    """Measure and write xtensor_memory.json."""
    rng = random.Random(0)
    lengths = [draw_length(rng) for _ in range(sequences)]
    memory = measure_memory(lengths)
    say(f"playing {steps} steps of {sequences} sequences")
    played = {
        how: measure_latency(random.Random(1), sequences, steps, pretouch=how == "pre-touched")
        for how in ("pre-touched", "touched as needed")
    }
    seconds = measure_attention(batch, context, rounds)
    table = seconds["block table, huge pages"]
    ratio = summarise([a / b for a, b in zip(seconds["mapped ranges"].values, table.values, strict=True)])
    rows = [(name, f"{summary.median * 1e3:.2f}", f"{summary.min * 1e3:.2f}") for name, summary in seconds.items()]
    show_table(f"attention, {batch} x {context} keys, {_LAYERS} layers, ms", ("", "median", "min"), rows)
    bars = [
        Bar(
            what=f"{sequences} sequences: bytes mapped / bytes needed",
            value=memory["mapped_bytes"] / memory["needed_bytes"],
            unit="x",
            bar="<= 1.08",
        ),
        *_latency_bars(played, step_ms, prompt_token_ms),
        Bar(what="attention against a block table on huge pages", value=ratio.median, unit="x time", bar="<= 1"),
    ]
    raw = {
        **memory,
        "lengths": lengths,
        "latency_s": {how: summarise(latencies).to_json() for how, (latencies, _) in played.items()},
        "prompt_tokens": played["pre-touched"][1],
        "attention_s": {name: summary.to_json() for name, summary in seconds.items()},
    }
    finish(make_record("xtensor_memory", command, seed=0, raw=raw, bars=bars), results)


def _latency_bars(
    played: Mapping[str, tuple[list[float], list[int]]], step_ms: float, prompt_token_ms: float
) -> Iterator[Bar]:
    for how, (latencies, prompts) in played.items():
        latency = summarise(latencies)
        shares = [
            seconds * 1e3 / (step_ms + prompt_token_ms * num_tokens)
            for seconds, num_tokens in zip(latencies, prompts, strict=True)
        ]
        yield Bar(what=f"memory of a step's tokens, {how}, median", value=latency.median * 1e3, unit="ms")
        yield Bar(what=f"memory of a step's tokens, {how}, p99", value=latency.p99 * 1e3, unit="ms")
        yield Bar(
            what=f"the same, {how}, of a step of {step_ms:g} ms and {prompt_token_ms:g} per prompt token",
            value=summarise(shares).p99,
            unit="of a step",
            bar="<= 0.01" if how == "pre-touched" else "",
        )


def draw_length(rng: random.Random) -> int:
    """Lognormal, half below 400 tokens."""
    while not _SHORTEST <= (length := int(rng.lognormvariate(6, 1))) <= _LONGEST:
        pass
    return length


def make_cache(num_slots: int, num_tokens: int, max_model_len: int = _LONGEST, *, pretouch: bool = False) -> KVCache:
    """With room for as many tokens, and a page more for each slot."""
    config = KVCacheConfig(
        num_layers=_LAYERS,
        num_kv_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        dtype=torch.bfloat16,
        max_model_len=max_model_len,
        num_slots=num_slots,
        kv_memory_bytes=max(num_tokens, max_model_len) * 2 * _LAYERS * _KV_HEADS * _HEAD_DIM * 2 * 17 // 16
        + num_slots * (4 << 20),
        prefix_cache=False,
        pretouch=pretouch,
    )
    return KVCache(config)


def measure_memory(lengths: Sequence[int]) -> dict[str, int]:
    cache = make_cache(len(lengths), sum(lengths))
    for length in lengths:
        has_room = cache.extend(cache.allocate(), length)
        assert has_room
    pages = cache.num_pages_by_state()["mapped"]
    cache.close()
    return {
        "page_bytes": cache.config.page_size,
        "mapped_bytes": pages * cache.config.page_size,
        "needed_bytes": sum(lengths) * 2 * _LAYERS * _KV_HEADS * _HEAD_DIM * 2,
    }


def measure_latency(
    rng: random.Random, num_sequences: int, steps: int, *, pretouch: bool = False
) -> tuple[list[float], list[int]]:
    """Seconds that each step's calls of the cache take, and prompt tokens of the step.

    Every sequence grows by a token, those that end are replaced, one in a step. A newcomer's prompt is half its length.
    """
    cache = make_cache(num_sequences, num_sequences * 1024, pretouch=pretouch)
    live: dict[int, int] = {}
    latencies, prompts = [], []
    for _ in range(steps):
        wanted = draw_length(rng) if len(live) < num_sequences else 0
        prompts.append(0)
        started_s = time.perf_counter()
        for slot in [slot for slot, left in live.items() if left == 0]:
            cache.free(slot)
            del live[slot]
        for slot in live:
            has_room = cache.extend(slot, 1)
            live[slot] = live[slot] - 1 if has_room else 0
        if wanted and cache.num_free_pages > cache.config.pages_for(wanted):
            slot = cache.allocate(num_tokens=wanted)
            cache.extend(slot, wanted // 2)
            live[slot] = wanted - wanted // 2 - 1
            prompts[-1] = wanted // 2
        latencies.append(time.perf_counter() - started_s)
        cache.ops.take()
        time.sleep(_PAUSE_S)
    cache.close()
    return latencies, prompts


def measure_attention(batch: int, context: int, rounds: int) -> dict[str, Any]:
    """Decode over all layers, each on KV of its own, in turns; the results are compared first."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        native.build_kernels(Path(folder) / "kernels.so")
        kernels = native.Kernels(Path(folder) / "kernels.so")
        paged = PagedKernels(Path(folder))
    for one in (kernels, paged.kernels):
        one.set_num_threads(torch.get_num_threads())
    content = torch.randn(context, 2, _KV_HEADS, _HEAD_DIM).bfloat16()
    cache = make_cache(batch, batch * context, max_model_len=context)
    slots = torch.tensor([cache.allocate() for _ in range(batch)], dtype=torch.int32)
    for slot in slots.tolist():
        cache.extend(slot, context)
        for layer in cache.layers:
            layer[slot] = content
    num_blocks = batch * context // BLOCK_TOKENS
    table = torch.randperm(num_blocks, dtype=torch.int32).view(batch, -1)
    blocks = {
        name: paged_layers(content, table, is_huge="huge" in name)
        for name in ("block table", "block table, huge pages")
    }
    paged.use_table(table)
    q = torch.randn(batch, _HEADS, _HEAD_DIM).bfloat16()
    start = torch.arange(batch + 1, dtype=torch.int32)
    length = torch.full((batch,), context, dtype=torch.int32)

    def attend(attention: Callable[..., Tensor], layers: Sequence[Tensor]) -> Tensor:
        for layer in layers:
            out = attention(q, layer, start, length, slots, _HEAD_DIM**-0.5, 0)
        return out

    runs = {"mapped ranges": partial(attend, kernels.attention, cache.layers)}
    runs |= {name: partial(attend, paged.kernels.attention, layers) for name, layers in blocks.items()}
    expected = runs["mapped ranges"]()
    for run in runs.values():
        torch.testing.assert_close(run(), expected, rtol=0, atol=0)
    return measure_in_turns(runs, repeats=rounds)


def paged_layers(content: Tensor, table: Tensor, *, is_huge: bool) -> list[Tensor]:
    """Per layer [batch, context, 2, heads, dim], whose memory is blocks in the table's order."""
    layers = []
    for _ in range(_LAYERS):
        layer = torch.empty(table.shape[0], *content.shape, dtype=content.dtype)
        if is_huge:
            begin = -(-layer.data_ptr() // 4096) * 4096
            size = (layer.data_ptr() + layer.nbytes - begin) // 4096 * 4096
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _MADV_HUGEPAGE)
        by_block = layer.view(-1, BLOCK_TOKENS, *content.shape[1:])
        for row in table.long():
            by_block[row] = content.view(-1, BLOCK_TOKENS, *content.shape[1:])
        layers.append(layer)
    return layers
