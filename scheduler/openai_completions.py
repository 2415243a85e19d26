"""POST /v1/completions."""

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.types import Send

from xllm_compile.runtime.beam_search import BeamSearchParams
from xllm_compile.runtime.outputs import CompletionOutput, RequestOutput
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.scheduler import openai_params
from xllm_compile.scheduler.beam_search import beam_search
from xllm_compile.scheduler.best_of import best_of
from xllm_compile.scheduler.http_io import send_events, send_json
from xllm_compile.scheduler.openai_beams import beam_params
from xllm_compile.scheduler.openai_logprobs import TokenLogprobs, completion_logprobs
from xllm_compile.scheduler.openai_stream import ChunkEncoder, dumps, quote, usage
from xllm_compile.scheduler.openai_structured import structured_output
from xllm_compile.scheduler.openai_types import CompletionRequest
from xllm_compile.scheduler.openai_validation import parse_body
from xllm_compile.scheduler.output_stream import OutputStream
from xllm_compile.scheduler.prompts import Prompt, completion_prompts
from xllm_compile.scheduler.service import Service


@dataclass(kw_only=True, slots=True)
class _Completion:
    """One validated request, and what has been written of its choices."""

    request: CompletionRequest
    prompts: list[Prompt]
    params: list[SamplingParams]
    beams: list[BeamSearchParams | None]
    """Of each prompt, where beams are searched for."""
    drops_output: bool
    """max_tokens=0 with echo: the prompt is scored, the one token that a step must generate is not shown."""
    request_id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    text_offsets: dict[int, int] = field(default_factory=dict)
    """Characters written per choice; a choice that is missing has not started."""

    @property
    def n(self) -> int:
        return self.request.n or 1

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def open(self, service: Service) -> OutputStream:
        return OutputStream([self._outputs(service, index) for index in range(len(self.prompts))], self.n)

    def _outputs(self, service: Service, index: int) -> AsyncGenerator[RequestOutput, None]:
        request_id, token_ids = f"{self.request_id}-{index}", self.prompts[index].token_ids
        beams, params = self.beams[index], self.params[index]
        if beams is not None:
            return beam_search(service, request_id, token_ids, beams)
        outputs = service.generate(request_id, token_ids, params)
        return best_of(outputs, self.n) if params.n > self.n else outputs

    def head(self, service: Service) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "object": "text_completion",
            "created": self.created,
            "model": service.model_name,
        }

    def usage(self, outputs: OutputStream) -> dict[str, Any]:
        num_completion = 0 if self.drops_output else outputs.num_completion_tokens
        return usage(self.num_prompt_tokens, num_completion, outputs.num_cached_tokens)

    def totals(self, outputs: OutputStream, *, has_usage: bool = True) -> dict[str, Any]:
        """What ends an answer: usage, and metrics where they were asked for."""
        totals = {"usage": self.usage(outputs)} if has_usage else {}
        return totals | ({"metrics": outputs.metrics} if self.request.include_metrics else {})


async def handle_completion(service: Service, body: bytes, send: Send) -> None:
    """Raises ApiError for anything the client should hear as an error."""
    request = parse_body(CompletionRequest, body)
    service = service.for_model(request.model)
    completion = await _prepare(service, request)
    if completion.request.stream:
        await send_events(send, _stream(service, completion))
        return
    async with completion.open(service) as outputs:
        finished = await outputs.collect()
        choices = [_choice(service, completion, output, outputs) for output in finished]
    await send_json(send, completion.head(service) | {"choices": choices, **completion.totals(outputs)})


async def _prepare(service: Service, request: CompletionRequest) -> _Completion:
    openai_params.refuse_unavailable(request)
    prompts = await completion_prompts(
        service.tokenizer, request.prompt, add_special_tokens=request.add_special_tokens is not False
    )
    max_tokens = openai_params.DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    drops_output = max_tokens == 0 and bool(request.echo)
    structured = structured_output(request)
    logprobs, prompt_logprobs = openai_params.completion_logprobs(request)
    params = []
    for prompt in prompts:
        room = openai_params.fit_max_tokens(
            max_tokens or int(drops_output), len(prompt.token_ids), service.max_model_len, "prompt"
        )
        params.append(
            openai_params.sampling_params(
                request,
                service.tokenizer.generation_defaults,
                max_tokens=room,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                structured=structured,
            )
        )
    beams = [beam_params(request, each) for each in params]
    if request.best_of is not None and not request.use_beam_search:
        # The candidates' own log-probabilities are what they are chosen by.
        num_logprobs = 0 if logprobs is None else logprobs
        params = [replace(each, n=request.best_of, logprobs=num_logprobs) for each in params]
    return _Completion(request=request, prompts=prompts, params=params, beams=beams, drops_output=drops_output)


async def _stream(service: Service, completion: _Completion) -> AsyncGenerator[bytes, None]:
    options = completion.request.stream_options
    encoder = ChunkEncoder(
        completion.head(service),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
    )
    is_plain = completion.request.logprobs is None and not completion.request.echo
    is_plain = is_plain and not completion.request.return_token_ids
    async with completion.open(service) as outputs:
        async for moved in outputs:
            so_far = completion.usage(outputs) if encoder.continuous_usage else None
            chunks = []
            for output in moved:
                if is_plain and output.finish_reason is None:
                    # A token may end in an unfinished character or a possible stop string: nothing to show yet.
                    if output.text:
                        choice = (
                            f'{{"index":{output.index},"text":{quote(output.text)},'
                            '"logprobs":null,"finish_reason":null,"stop_reason":null}'
                        )
                        chunks.append(encoder.chunk(choice, so_far))
                else:
                    chunks.append(encoder.chunk(dumps(_choice(service, completion, output, outputs)), so_far))
            if chunks:
                yield "".join(chunks).encode()
        if last := completion.totals(outputs, has_usage=encoder.include_usage):
            yield encoder.last_chunk(last).encode()


def _choice(
    service: Service, completion: _Completion, output: CompletionOutput, outputs: OutputStream
) -> dict[str, Any]:
    """One choice, or with streaming what is new of it; the first piece carries the echoed prompt."""
    request, tokenizer = completion.request, service.tokenizer
    prompt = completion.prompts[output.index // completion.n]
    is_first = output.index not in completion.text_offsets
    text, token_ids = output.text, output.token_ids
    logprobs: list[TokenLogprobs | None] = list(output.logprobs or ())
    if completion.drops_output:
        text, token_ids, logprobs = "", [], []
    if request.echo and is_first:
        text = (tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text) + text
        token_ids = prompt.token_ids + token_ids
        logprobs = list(outputs.prompt_logprobs[output.index // completion.n] or ()) + logprobs
    choice: dict[str, Any] = {
        "index": output.index,
        "text": text,
        "logprobs": None,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }
    offset = completion.text_offsets.get(output.index, 0)
    if request.logprobs is not None:
        choice["logprobs"], offset = completion_logprobs(tokenizer, token_ids, logprobs, offset)
    completion.text_offsets[output.index] = offset
    if request.return_token_ids:
        choice["token_ids"] = [] if completion.drops_output else output.token_ids
        choice["prompt_token_ids"] = prompt.token_ids if is_first else None
    return choice
