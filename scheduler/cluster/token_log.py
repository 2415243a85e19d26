"""What a client has of one completion: enough for any instance to go on with it."""

import time
from collections.abc import Sequence
from typing import Any

from xllm_compile.runtime.memory.prefix_cache import BlockChain
from xllm_compile.runtime.outputs import CompletionOutput
from xllm_compile.runtime.resume import Resume, check_resume
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.scheduler.cluster.generate_messages import generate_message
from xllm_compile.scheduler.cluster.state import RequestShape
from xllm_compile.scheduler.proto import xllm_pb2


class TokenLog:
    """The request of one completion and the tokens it has brought so far, from whichever instances."""

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        chain: BlockChain,
        index: int = 0,
        resume: Resume | None = None,
    ) -> None:
        """chain names the prompt's blocks. resume: what the client has already.

        Raises ValueError where it cannot go on.
        """
        if resume is not None:
            check_resume(resume, params, params.max_tokens or 0)
        # The engine tells the completions of a seeded request apart in the same way.
        seed = None if params.seed is None else params.seed + index
        self._message = generate_message("", prompt, params, seed)
        if index > 0:
            # One of them brings those of the prompt.
            self._message.sampling.ClearField("prompt_logprobs")
        self._params = params
        self._chain = chain
        self.index = index
        self.prompt = prompt
        self.token_ids: list[int] = list(resume.output_token_ids) if resume else []
        self._num_text_chars = resume.num_text_chars if resume else 0
        self._first_token_s: float | None = None
        self._cumulative_logprob: float | None = None

    @property
    def is_offline(self) -> bool:
        return self._params.offline

    @property
    def num_tokens(self) -> int:
        """Of prompt and output."""
        return len(self.prompt) + len(self.token_ids)

    @property
    def all_token_ids(self) -> list[int]:
        """Prompt and output."""
        return [*self.prompt, *self.token_ids]

    def shape(self, *, is_begun: bool = False) -> RequestShape:
        """Of what is left. is_begun: an instance had it before."""
        params = self._params
        assert params.max_tokens is not None or params.pooling is not None, "the gateway bounds every request"
        return RequestShape(
            num_prompt_tokens=len(self.prompt) + len(self.token_ids),
            max_output_tokens=(params.max_tokens or 0) - len(self.token_ids),
            digests=self._digests(),
            ttft_slo_s=None if params.ttft_slo_ms is None else params.ttft_slo_ms / 1e3,
            tpot_slo_s=None if params.tpot_slo_ms is None else params.tpot_slo_ms / 1e3,
            is_offline=params.offline,
            priority=params.priority,
            is_begun=is_begun,
        )

    def _digests(self) -> tuple[bytes, ...]:
        """Of the prompt's blocks; none where all is computed, whatever is cached: runtime/prefix_sharing.py."""
        wants_prompt = self._message.sampling.HasField("prompt_logprobs") and not self.token_ids
        if wants_prompt or self._params.pooling is not None:
            return ()
        self._chain.update(self.all_token_ids)
        return tuple(self._chain.digests)

    def request(self, request_id: str, *, is_begun: bool) -> Any:
        """A GenerateRequest for what is left. is_begun: an instance had it before."""
        message = xllm_pb2.GenerateRequest()
        message.CopyFrom(self._message)
        message.request_id = request_id
        if is_begun:
            message.resume.is_begun = True
        if self.token_ids:
            message.resume.output_token_ids.extend(self.token_ids)
            message.resume.num_text_chars = self._num_text_chars
            if self._first_token_s is not None:
                message.resume.first_token_age_ms = 1e3 * (time.monotonic() - self._first_token_s)
            message.sampling.ClearField("prompt_logprobs")
        return message

    def take(self, output: CompletionOutput, arrived_s: float) -> CompletionOutput:
        """What is new, as this completion's. arrived_s: on the monotonic clock."""
        output.index = self.index
        if output.token_ids and not self.token_ids:
            self._first_token_s = arrived_s
        self.token_ids += output.token_ids
        self._num_text_chars += len(output.text)
        if output.logprobs is not None:
            chosen = (entry[token] for token, entry in zip(output.token_ids, output.logprobs, strict=True))
            self._cumulative_logprob = sum((each.logprob for each in chosen), self._cumulative_logprob or 0.0)
        output.cumulative_logprob = self._cumulative_logprob
        return output
