"""What the service needs of an engine and a tokenizer."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

from xllm_compile.runtime.async_engine import SleepLevel, SleepMode
from xllm_compile.runtime.engine_thread import PauseMode
from xllm_compile.runtime.hand_over import HandOver
from xllm_compile.runtime.outputs import EngineStats, RequestOutput
from xllm_compile.runtime.resume import Resume
from xllm_compile.runtime.sampling_params import SamplingParams


class EngineClient(Protocol):
    """The asynchronous engine (runtime/async_engine.py), as far as the service uses it."""

    @property
    def is_healthy(self) -> bool: ...

    def generate(
        self,
        request_id: str,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        resume: Resume | None = None,
        hand_over: HandOver | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Closing or cancelling the iterator aborts the request.

        resume is what it has generated elsewhere, hand_over where its KV goes with its next token.
        """
        ...

    async def abort(self, request_id: str) -> None: ...

    def stats(self) -> EngineStats: ...

    @property
    def is_paused(self) -> bool: ...

    async def pause(self, mode: PauseMode) -> None:
        """Returns when nothing is computed any more; requests stay or end, by the mode."""
        ...

    def resume(self) -> None: ...

    @property
    def is_sleeping(self) -> bool: ...

    async def sleep(self, level: SleepLevel, mode: SleepMode) -> None:
        """Returns when the memory of weights and KV is given back; new requests are refused until `wake_up`."""
        ...

    def wake_up(self) -> None:
        """Thread-safe; may wait for other models that share the memory. Raises SharedMemoryFullError."""
        ...

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new, wait, then abort what is left. True when all finished in time."""
        ...


class ServiceTokenizer(Protocol):
    """The tokenizer (runtime/tokenizer.py), as far as the service uses it. Thread-safe."""

    is_byte_level: bool
    generation_defaults: dict[str, float]
    eos_token_ids: frozenset[int]
    special_token_ids: frozenset[int]

    @property
    def chat_template_text(self) -> str:
        """The source of the chat template; empty where there is none."""
        ...

    def token_id(self, text: str) -> int | None: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    @property
    def token_text(self) -> Callable[[int], str]: ...

    @property
    def token_bytes(self) -> Callable[[int], bytes]:
        """Meaningful when is_byte_level."""
        ...

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str: ...
