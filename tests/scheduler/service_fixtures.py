"""A real engine and tokenizer over a model that counts: after byte b comes byte b + 1."""

import threading
from collections.abc import Callable

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from xllm_compile.runtime.chat_template import ChatTemplate
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.engine_config import EngineConfig
from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.memory.cpu_memory import CpuMemory
from xllm_compile.runtime.outputs import GraphCacheStats
from xllm_compile.runtime.step import Step
from xllm_compile.runtime.tokenizer import BYTE_OF_CHAR, Tokenizer
from xllm_compile.runtime.transfer.endpoint import open_endpoint
from xllm_compile.runtime.transfer.transfer import TransferConfig
from xllm_compile.scheduler.cluster.state import InstanceInfo, Role

MAX_MODEL_LEN = 128
EOS_ID = 256
VOCAB_SIZE = 257

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' and loop.first %}{{ raise_exception('assistant first') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ suffix }}"
)


def byte_tokenizer(generation_defaults: dict[str, float] | None = None, template: str = CHAT_TEMPLATE) -> Tokenizer:
    """Token id = byte value; 256 is end-of-sequence."""
    vocab = dict(BYTE_OF_CHAR.items())
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<eos>"])
    return Tokenizer(
        raw,
        eos_token_ids=(EOS_ID,),
        chat_template=ChatTemplate({"default": template}, {}),
        generation_defaults=generation_defaults or {"temperature": 0.0},
    )


class CountingRunner:
    """The next byte gets logit 10, the one after it 5; `gate` cleared makes the model wait before a step.

    `closes_after`: it clears its gate by itself with so many steps done.
    """

    vocab_size = VOCAB_SIZE
    max_model_len = MAX_MODEL_LEN
    max_num_seqs = 8
    max_num_batched_tokens = 64
    embedding_size = 3

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.num_steps = 0
        self.closes_after = -1
        self.error: Exception | None = None

    def execute(self, step: Step, on_layers: Callable[[], None] | None = None) -> Tensor:
        if on_layers is not None:
            on_layers()
        if not self.gate.wait(timeout=30):
            raise TimeoutError("the test left the gate closed")
        if self.error is not None:
            raise self.error
        self.num_steps += 1
        if self.num_steps == self.closes_after:
            self.gate.clear()
        self._pooled = torch.tensor([[3.0, 4.0, float(token)] for token in step.token_ids[step.pool_at]])
        last = torch.from_numpy(step.token_ids[step.logits_at]).long()
        logits = torch.zeros(len(last), VOCAB_SIZE)
        rows = torch.arange(len(last))
        logits[rows, (last + 2) % 256] = 5.0
        logits[rows, (last + 1) % 256] = 10.0
        return logits

    def pooled(self) -> Tensor:
        """[P, 3] of each row: 3, 4 and its token."""
        return self._pooled

    def last_outcome(self) -> str:
        return "exact"

    def graph_cache_stats(self) -> GraphCacheStats:
        return GraphCacheStats(choices={("layers", "exact", "bucket"): self.num_steps})


class ScriptedRunner(CountingRunner):
    """Answers every prompt with `text`, then ends."""

    max_model_len = 2048
    max_num_batched_tokens = 2048

    def __init__(self, text: str = "") -> None:
        super().__init__()
        self.text = text
        self._written: dict[int, tuple[int, int, int]] = {}
        """By slot: the position and id of the last token written, and how many there were."""

    def execute(self, step: Step, on_layers: Callable[[], None] | None = None) -> Tensor:
        if on_layers is not None:
            on_layers()
        self.num_steps += 1
        logits = torch.zeros(len(step.logits_at), VOCAB_SIZE)
        script = [*self.text.encode(), EOS_ID]
        for row, at in enumerate(step.logits_at.tolist()):
            sequence = int(step.seq_start.searchsorted(at, side="right")) - 1
            slot, position = int(step.slot[sequence]), int(step.positions[at])
            # A prompt may begin anywhere: what is known of it is not computed again.
            *last, count = self._written.get(slot, (-1, -1, 0))
            done = count if last == [position, int(step.token_ids[at])] else 0
            token_id = script[min(done, len(script) - 1)]
            logits[row, token_id] = 10.0
            self._written[slot] = (position + 1, token_id, done + 1)
        return logits


def counting_engine(
    runner: CountingRunner,
    config: EngineConfig | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    is_transferring: bool = False,
) -> Engine:
    """is_transferring: it sends and takes KV by shared memory."""
    cache = KVCache(
        KVCacheConfig(
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            dtype=torch.float32,
            max_model_len=runner.max_model_len,
            num_slots=8,
            kv_memory_bytes=1 << 20,
        )
    )
    transfer = None
    if is_transferring:
        memory = cache.xtensor.memory
        assert isinstance(memory, CpuMemory)
        transfer = open_endpoint(("shm",), memory.region, TransferConfig(timeout_s=60))
    return Engine(runner, cache, tokenizer or byte_tokenizer(), config, transfer=transfer)


def instance_info(port: int) -> InstanceInfo:
    """Of an instance that counts."""
    return InstanceInfo(
        name="counter",
        incarnation="first",
        role=Role.MIX,
        address=f"127.0.0.1:{port}",
        model_names=("counter",),
        weights_key="weights",
        kv_layout="layout",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        kv_tokens_total=1024,
    )
