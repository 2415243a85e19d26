"""Offline generation: many prompts in, their finished outputs back, in vLLM's shape."""

import itertools
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol, cast

from xllm_compile.runtime.beam_search import BeamSearch, BeamSearchParams, one_token_params
from xllm_compile.runtime.chat_template import Message
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.outputs import RequestOutput
from xllm_compile.runtime.policies.queue_bound import QueueFullError
from xllm_compile.runtime.pooling import PoolingParams
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams, embedding_params
from xllm_compile.runtime.sequence import Request
from xllm_compile.runtime.tokenizer import Tokenizer

# The mapping is {"prompt_token_ids": [...]}.
Prompt = str | Sequence[int] | Mapping[str, Sequence[int]]
Prompts = Prompt | Sequence[Prompt]
Params = SamplingParams | Sequence[SamplingParams] | None


class ProgressReport(Protocol):
    def __call__(self, *, num_finished: int, num_tokens: int) -> None: ...


class LLMBase:
    """Generates on a ready engine. Not thread-safe; `async_engine` serves concurrent callers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._ids = itertools.count()

    def get_tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    def generate(
        self, prompts: Prompts, sampling_params: Params = None, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """Complete each prompt; results are in the order of the prompts.

        A prompt is text, a list of token ids, or {"prompt_token_ids": [...]}. sampling_params is one for all or one
        for each; None takes the model's generation defaults. use_tqdm shows progress where stderr is a terminal.
        Raises ValueError, before anything is computed, when a prompt or option is bad.
        """
        listed = _listed(prompts)
        params = self._params_for(sampling_params, len(listed))
        requests = [
            self.engine.make_request(str(next(self._ids)), _content(prompt), _final_only(param))
            for prompt, param in zip(listed, params, strict=True)
        ]
        return self._run(requests, use_tqdm=use_tqdm)

    def embed(
        self, prompts: Prompts, pooling_params: PoolingParams | None = None, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """An embedding of each prompt, in ``embedding`` of its output; prompts are those of `generate`."""
        params = embedding_params(pooling_params)
        requests = [
            self.engine.make_request(str(next(self._ids)), _content(prompt), params) for prompt in _listed(prompts)
        ]
        return self._run(requests, use_tqdm=use_tqdm)

    def beam_search(self, prompts: Prompts, params: BeamSearchParams, *, use_tqdm: bool = False) -> list[RequestOutput]:
        """The most probable continuations of each prompt that a beam search finds, the best first.

        Raises ValueError, before anything is computed, for a prompt without room for max_tokens.
        """
        tokenizer = self.engine.tokenizer
        searches = []
        for prompt in _listed(prompts):
            content = _content(prompt)
            ids = tokenizer.encode(content) if isinstance(content, str) else [int(token) for token in content]
            if len(ids) + params.max_tokens > self.engine.max_model_len:
                raise ValueError(
                    f"a prompt of {len(ids)} tokens and max_tokens={params.max_tokens} exceed"
                    f" max_model_len={self.engine.max_model_len}; shorten one of them"
                )
            searches.append(BeamSearch(params=params, prompt=ids, tokenizer=tokenizer))
        for _ in range(params.max_tokens):
            open_ones = [search for search in searches if search.metrics is None or not search.is_done]
            if not open_ones:
                break
            asked = [search.prompts() for search in open_ones]
            outputs = iter(self.generate([*itertools.chain(*asked)], one_token_params(params), use_tqdm=use_tqdm))
            for search, beams in zip(open_ones, asked, strict=True):
                search.take([next(outputs) for _ in beams])
        return [search.output(str(next(self._ids))) for search in searches]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, through the model's chat template."""
        if not messages:
            raise ValueError("messages is empty; send at least one message")
        is_one = isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Sequence[Message]], [messages] if is_one else messages)
        tokenizer = self.engine.tokenizer
        texts = [
            tokenizer.apply_chat_template(
                conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                chat_template=chat_template,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        params = self._params_for(sampling_params, len(texts))
        requests = [
            self.engine.make_request(
                str(next(self._ids)), tokenizer.encode(text, add_special_tokens=False), _final_only(param), text
            )
            for text, param in zip(texts, params, strict=True)
        ]
        return self._run(requests, use_tqdm=use_tqdm)

    def _params_for(self, given: Params, count: int) -> Sequence[SamplingParams]:
        if given is None:
            given = self.engine.tokenizer.default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise ValueError(f"{len(given)} sampling_params for {count} prompts; give one, or one for each prompt")
        return given

    def _run(self, requests: Sequence[Request], *, use_tqdm: bool) -> list[RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        expected = {request.request_id for request in requests}
        queue = deque(requests)
        num_tokens = 0
        try:
            with _progress(len(requests), is_wanted=use_tqdm) as report:
                while len(finished) < len(requests):
                    self._feed(queue)
                    for output in self.engine.step():
                        if output.request_id not in expected:
                            # The end of a request that an interrupted call left behind.
                            continue
                        finished[output.request_id] = output
                        num_tokens += sum(len(completion.token_ids) for completion in output.outputs)
                        report(num_finished=len(finished), num_tokens=num_tokens)
        finally:
            # Interrupted: what is left must not go on with the next call.
            for request in requests:
                self.engine.abort(request.request_id)
        return [finished[request.request_id] for request in requests]

    def _feed(self, queue: deque[Request]) -> None:
        """Hand over requests for as long as the engine's bounded queue takes them."""
        while queue:
            try:
                self.engine.check_queue(
                    queue[0],
                    num_waiting=self.engine.num_waiting,
                    num_waiting_tokens=self.engine.num_waiting_tokens,
                )
            except QueueFullError:
                return
            self.engine.add(queue.popleft())


def _final_only(params: SamplingParams) -> SamplingParams:
    """The same options, reporting only at the end."""
    return replace(params, output_kind=RequestOutputKind.FINAL_ONLY)


def _listed(prompts: Prompts) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [cast(Prompt, prompts)]
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [cast(Sequence[int], items)]
    return cast(list[Prompt], items)


def _content(prompt: Prompt) -> str | Sequence[int]:
    if not isinstance(prompt, Mapping):
        return prompt
    if set(prompt) != {"prompt_token_ids"}:
        raise ValueError(f"a prompt with keys {sorted(prompt)} is not understood; give text or prompt_token_ids")
    return prompt["prompt_token_ids"]


def _progress(total: int, *, is_wanted: bool) -> AbstractContextManager[ProgressReport]:
    if not is_wanted or not sys.stderr.isatty():
        return nullcontext(_no_report)
    from xllm_compile.runtime.progress import progress_bar

    return progress_bar(total)


def _no_report(*, num_finished: int, num_tokens: int) -> None:
    pass
