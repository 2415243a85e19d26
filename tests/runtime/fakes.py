"""A real tokenizer trained on the spot, and a model runner whose answers depend on what the KV cache really holds."""

import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from xllm_compile.runtime.decode_loop import decode_by_steps
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.engine_config import EngineConfig
from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.memory.cpu_memory import CpuMemory
from xllm_compile.runtime.memory.kv_tiers import KVTiers
from xllm_compile.runtime.memory.shared_pages import PageShare
from xllm_compile.runtime.outputs import GraphCacheStats
from xllm_compile.runtime.speculative.speculator import Speculator
from xllm_compile.runtime.step import Int32Array, Step
from xllm_compile.runtime.step_predictor import StepPrior
from xllm_compile.runtime.tokenizer import Tokenizer
from xllm_compile.runtime.transfer.endpoint import open_endpoint
from xllm_compile.runtime.transfer.transfer import TransferConfig

EOS = "<|im_end|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", EOS)
VOCAB_SIZE = 320
CORPUS = (
    "the quick brown fox jumps over the lazy dog and the end of the story",
    "naïve café, déjà vu; Zürich \u4f60\u597d \u4e16\u754c \U0001f600\U0001f680 0123456789",
    "stop strings such as END and ENDING may cross the borders of tokens",
)
CHAT_TEMPLATE = (
    "{%- if tools %}<tools>{{ tools | tojson }}</tools>{% endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'forbidden' %}{{ raise_exception('role ' + message.role + ' is unknown') }}{% endif -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + eos_token + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"
)


def train_byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer=trainer)
    return tokenizer


class HistoryRunner:
    """Writes each token into the KV cache and answers with logits drawn from the history it reads back.

    A wrong position, slot, chunk border, a page given back too early or logits used after the next call all change
    what is generated. `poison` is a token id whose appearance at the end of a history gives NaN.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        *,
        vocab_size: int = VOCAB_SIZE,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 32,
        poison: int | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_model_len = kv_cache.config.max_model_len
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.embedding_size = 4
        self.poison = poison
        self.steps: list[Step] = []
        self.scripts: dict[tuple[int, ...], list[int]] = {}
        self.fails = False
        self.gate = threading.Event()
        """Steps wait while this is cleared."""
        self.gate.set()
        self._kv_cache = kv_cache
        self._logits = torch.empty(0)

    def script(self, prompt: Sequence[int], output: list[int]) -> None:
        """Make these tokens the greedy continuation of the prompt."""
        self.scripts[tuple(prompt)] = output

    def pooled(self) -> Tensor:
        """[P, 4] of each row: its token, its position, the sum of its history, and 1."""
        return self._pooled

    def last_outcome(self) -> str:
        """As if single tokens had the only graph of their own."""
        return "exact" if len(self.steps[-1].token_ids) == 1 else "dynamic"

    def graph_cache_stats(self) -> GraphCacheStats:
        return GraphCacheStats(choices={("layers", "exact", "bucket"): len(self.steps)})

    def execute(self, step: Step, on_layers: Callable[[], None] | None = None) -> Tensor:
        if on_layers is not None:
            on_layers()
        self.gate.wait()
        if self.fails:
            raise RuntimeError("the device is gone")
        self.steps.append(step)
        self._check(step)
        self._logits.fill_(torch.nan)
        rows: dict[int, Tensor] = {}
        wanted = set(step.logits_at.tolist())
        pooled: dict[int, list[int]] = {row: [] for row in step.pool_at.tolist()}
        for index, slot in enumerate(step.slot.tolist()):
            begin, end = step.seq_start[index], step.seq_start[index + 1]
            positions = torch.from_numpy(step.positions[begin:end]).long()
            for layer in self._kv_cache.layers:
                # What is in the cache is the token id plus one: zero is a page that was given back.
                layer[slot, positions] = torch.from_numpy(step.token_ids[begin:end] + 1).float().view(-1, 1, 1, 1)
            for row in range(begin, end):
                if row in pooled:
                    history = self._history(slot, int(step.positions[row]) + 1)
                    pooled[row] = [history[-1], len(history) - 1, sum(history), 1]
                if row in wanted:
                    rows[row] = self.row(self._history(slot, int(step.positions[row]) + 1))
        self._pooled = torch.tensor([pooled[row] for row in step.pool_at.tolist()], dtype=torch.float32)
        self._logits = torch.stack([rows[row] for row in step.logits_at.tolist()]) if wanted else torch.empty(0, 1)
        return self._logits

    def decode_greedily(self, step: Step, num_steps: int) -> Int32Array:
        return decode_by_steps(self.execute, step, num_steps)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """What greedy decoding must generate, without any engine."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.row(tokens).argmax()))
        return tokens[len(prompt) :]

    def _history(self, slot: int, length: int) -> list[int]:
        first, *others = (layer[slot, :length] for layer in self._kv_cache.layers)
        for other in others:
            assert torch.equal(first, other)
        assert (first == first[:, :1, :1, :1]).all()
        return (first[:, 0, 0, 0].to(torch.int64) - 1).tolist()

    def row(self, history: Sequence[int]) -> Tensor:
        """Logits [V] after this history."""
        assert min(history) >= 0, "a token that was never written, or whose page was given back"
        if history[-1] == self.poison:
            return torch.full((self.vocab_size,), torch.nan)
        for prompt, output in self.scripts.items():
            done = len(history) - len(prompt)
            if 0 <= done < len(output) and tuple(history) == (*prompt, *output[:done]):
                return 10.0 * torch.nn.functional.one_hot(torch.tensor(output[done]), self.vocab_size).float()
        seed = zlib.crc32(np.array(history, dtype=np.int32).tobytes())
        return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, self.vocab_size).astype(np.float32))

    def _check(self, step: Step) -> None:
        num_tokens = len(step.token_ids)
        assert 1 <= num_tokens <= self.max_num_batched_tokens
        assert len(step.slot) <= self.max_num_seqs
        assert len(set(step.slot.tolist())) == len(step.slot)
        assert step.seq_start[0] == 0 and step.seq_start[-1] == num_tokens
        assert (np.diff(step.seq_start) > 0).all()
        assert len(step.positions) == len(step.rope_len) == num_tokens
        assert all(array.dtype == np.int32 for array in (step.token_ids, step.positions, step.slot, step.logits_at))
        for index, end in enumerate(step.context_len.tolist()):
            rows = slice(step.seq_start[index], step.seq_start[index + 1])
            count = rows.stop - rows.start
            assert step.positions[rows].tolist() == list(range(end - count, end))
            assert (step.rope_len[rows] >= step.positions[rows] + 1).all()


def make_kv_cache(
    *,
    max_model_len: int = 64,
    num_slots: int = 8,
    total_tokens: int = 512,
    block_tokens: int | None = None,
    tiers: KVTiers | None = None,
    page_tokens: int | None = None,
    share: PageShare | None = None,
    swap_bytes: int | None = None,
) -> KVCache:
    # A page holds one token, so that tests may count memory in tokens; with a prefix cache it is no whole block.
    page_tokens = page_tokens or (1 if block_tokens is None else 3)
    num_layers, head_dim = 2, 256
    bytes_per_token = num_layers * 2 * head_dim * torch.float32.itemsize
    return KVCache(
        KVCacheConfig(
            num_layers=num_layers,
            num_kv_heads=1,
            head_dim=head_dim,
            dtype=torch.float32,
            max_model_len=max_model_len,
            num_slots=num_slots,
            kv_memory_bytes=total_tokens * bytes_per_token,
            page_bytes=page_tokens * bytes_per_token,
            prefix_cache=block_tokens is not None,
            block_tokens=block_tokens or 16,
        ),
        tiers=tiers,
        share=share,
        swap_bytes=swap_bytes,
    )


class EngineFactory:
    def __init__(self, tokenizer: Tokenizer, *, is_async: bool = False) -> None:
        self.tokenizer = tokenizer
        self.is_async = is_async

    def __call__(
        self,
        *,
        config: EngineConfig | None = None,
        max_model_len: int = 64,
        num_slots: int = 8,
        total_tokens: int = 512,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 32,
        poison: int | None = None,
        make_speculator: Callable[[HistoryRunner], Speculator] | None = None,
        block_tokens: int | None = None,
        tiers: KVTiers | None = None,
        page_tokens: int | None = None,
        transfer: TransferConfig | None = None,
        clock: Callable[[], float] | None = None,
        share: PageShare | None = None,
        swap_bytes: int | None = None,
        prior: StepPrior | None = None,
    ) -> tuple[Engine, HistoryRunner]:
        """block_tokens turns the prefix cache on; with transfer it hands requests over, by shared memory."""
        kv_cache = make_kv_cache(
            max_model_len=max_model_len,
            num_slots=num_slots,
            total_tokens=total_tokens,
            block_tokens=block_tokens,
            tiers=tiers,
            page_tokens=page_tokens,
            share=share,
            swap_bytes=swap_bytes,
        )
        memory = kv_cache.xtensor.memory
        assert isinstance(memory, CpuMemory)
        runner = HistoryRunner(
            kv_cache, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, poison=poison
        )
        config = replace(config or EngineConfig(), async_scheduling=self.is_async)
        ticks = iter(range(1, 1_000_000))
        speculator = make_speculator(runner) if make_speculator else None
        engine = Engine(
            runner,
            kv_cache,
            self.tokenizer,
            config,
            clock=clock or (lambda: float(next(ticks))),
            prior=prior,
            speculator=speculator,
            transfer=None if transfer is None else open_endpoint(("shm",), memory.region, transfer),
        )
        return engine, runner
