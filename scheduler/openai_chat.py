"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Send

from xllm_compile.runtime.beam_search import BeamSearchParams
from xllm_compile.runtime.outputs import CompletionOutput
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.scheduler import openai_params
from xllm_compile.scheduler.beam_search import beam_search
from xllm_compile.scheduler.chat_formats import constraint, has_special_markers
from xllm_compile.scheduler.chat_parser import ChatParser, MessageFormat, message_of, parse_message
from xllm_compile.scheduler.http_io import send_events, send_json
from xllm_compile.scheduler.openai_beams import beam_params
from xllm_compile.scheduler.openai_logprobs import chat_logprobs
from xllm_compile.scheduler.openai_stream import ChunkEncoder, dumps, quote, usage
from xllm_compile.scheduler.openai_tools import check_format, tool_request
from xllm_compile.scheduler.openai_types import ChatCompletionRequest
from xllm_compile.scheduler.openai_validation import parse_body
from xllm_compile.scheduler.output_stream import OutputStream
from xllm_compile.scheduler.prompts import Prompt, chat_prompt
from xllm_compile.scheduler.service import Service


@dataclass(kw_only=True, slots=True)
class _Chat:
    """One validated request."""

    request: ChatCompletionRequest
    prompt: Prompt
    params: SamplingParams
    expected: MessageFormat
    beams: BeamSearchParams | None
    """Where beams are searched for."""
    request_id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def open(self, service: Service) -> OutputStream:
        token_ids = self.prompt.token_ids
        if self.beams is not None:
            outputs = beam_search(service, self.request_id, token_ids, self.beams)
        else:
            outputs = service.generate(self.request_id, token_ids, self.params)
        return OutputStream([outputs], self.params.n)

    def head(self, service: Service, kind: str) -> dict[str, Any]:
        return {"id": self.request_id, "object": kind, "created": self.created, "model": service.model_name}

    def usage(self, outputs: OutputStream) -> dict[str, Any]:
        return usage(len(self.prompt.token_ids), outputs.num_completion_tokens, outputs.num_cached_tokens)

    def totals(self, outputs: OutputStream, *, has_usage: bool = True) -> dict[str, Any]:
        """What ends an answer: usage, and metrics where they were asked for."""
        totals = {"usage": self.usage(outputs)} if has_usage else {}
        return totals | ({"metrics": outputs.metrics} if self.request.include_metrics else {})


async def handle_chat(service: Service, body: bytes, send: Send) -> None:
    """Raises ApiError for anything the client should hear as an error."""
    request = parse_body(ChatCompletionRequest, body)
    service = service.for_model(request.model)
    chat = await _prepare(service, request)
    if chat.request.stream:
        await send_events(send, _stream(service, chat))
        return
    async with chat.open(service) as outputs:
        finished = await outputs.collect()
    choices = [_choice(service, chat, output) for output in finished]
    answer = chat.head(service, "chat.completion") | {"choices": choices, **chat.totals(outputs)}
    if chat.request.return_token_ids:
        answer["prompt_token_ids"] = chat.prompt.token_ids
    await send_json(send, answer)


async def _prepare(service: Service, request: ChatCompletionRequest) -> _Chat:
    openai_params.refuse_unavailable(request)
    logprobs = openai_params.chat_logprobs(request)
    formats = service.chat_formats
    tools = tool_request(request)
    check_format(tools, formats.tools)
    prompt = await chat_prompt(
        service.tokenizer,
        request.messages,
        add_generation_prompt=request.add_generation_prompt is not False,
        template_kwargs=request.chat_template_kwargs,
        tools=tools.tools,
        calls_as_text=formats.takes_calls_as_text,
    )
    expected = formats.expect(request, tools, prompt)
    asked, asked_param = openai_params.chat_max_tokens(request)
    max_tokens = openai_params.fit_max_tokens(asked, len(prompt.token_ids), service.max_model_len, "messages")
    params = openai_params.sampling_params(
        request,
        service.tokenizer.generation_defaults,
        max_tokens=max_tokens,
        max_tokens_param=asked_param,
        logprobs=logprobs,
        structured=constraint(request, tools, expected, service.tokenizer),
        keep_special_tokens=has_special_markers(expected, service.tokenizer),
    )
    beams = beam_params(request, params)
    return _Chat(request=request, prompt=prompt, params=params, expected=expected, beams=beams)


def _choice(service: Service, chat: _Chat, output: CompletionOutput) -> dict[str, Any]:
    parsed = parse_message(output.text, chat.expected)
    choice: dict[str, Any] = {
        "index": output.index,
        "message": message_of(parsed),
        "logprobs": _logprobs(service, chat, output),
        "finish_reason": _finish_reason(output, has_calls=bool(parsed.tool_calls)),
        "stop_reason": output.stop_reason,
    }
    if chat.request.return_token_ids:
        choice["token_ids"] = output.token_ids
    return choice


def _finish_reason(output: CompletionOutput, *, has_calls: bool) -> str | None:
    return "tool_calls" if has_calls and output.finish_reason == "stop" else output.finish_reason


def _logprobs(service: Service, chat: _Chat, output: CompletionOutput) -> dict[str, Any] | None:
    if not chat.request.logprobs:
        return None
    return chat_logprobs(service.tokenizer, output.token_ids, output.logprobs or [], chat.request.top_logprobs or 0)


async def _stream(service: Service, chat: _Chat) -> AsyncGenerator[bytes, None]:
    options = chat.request.stream_options
    encoder = ChunkEncoder(
        chat.head(service, "chat.completion.chunk"),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
    )
    is_plain = chat.expected.is_plain and not chat.request.logprobs and not chat.request.return_token_ids
    parsers: dict[int, ChatParser] = {}
    async with chat.open(service) as outputs:
        async for moved in outputs:
            so_far = chat.usage(outputs) if encoder.continuous_usage else None
            chunks = []
            for output in moved:
                if output.index not in parsers:
                    parsers[output.index] = ChatParser(chat.expected)
                    chunks.append(encoder.chunk(dumps(_role_choice(chat, output.index)), so_far))
                if is_plain and output.finish_reason is None:
                    # A token may end in an unfinished character or a possible stop string: nothing to show yet.
                    if output.text:
                        choice = (
                            f'{{"index":{output.index},"delta":{{"content":{quote(output.text)}}},'
                            '"logprobs":null,"finish_reason":null}'
                        )
                        chunks.append(encoder.chunk(choice, so_far))
                elif choice_delta := _delta_choice(service, chat, output, parsers[output.index]):
                    chunks.append(encoder.chunk(dumps(choice_delta), so_far))
            if chunks:
                yield "".join(chunks).encode()
        if last := chat.totals(outputs, has_usage=encoder.include_usage):
            yield encoder.last_chunk(last).encode()


def _role_choice(chat: _Chat, index: int) -> dict[str, Any]:
    """OpenAI opens each choice with its role and no content."""
    choice: dict[str, Any] = {
        "index": index,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    if chat.request.return_token_ids:
        choice["prompt_token_ids"] = chat.prompt.token_ids
    return choice


def _delta_choice(service: Service, chat: _Chat, output: CompletionOutput, parser: ChatParser) -> dict[str, Any] | None:
    """None where the parser keeps the text back and there is nothing else to tell."""
    delta = parser.push(output.text, is_last=output.finish_reason is not None)
    tells_tokens = chat.request.logprobs or chat.request.return_token_ids
    if not delta and not tells_tokens and output.finish_reason is None:
        return None
    choice: dict[str, Any] = {
        "index": output.index,
        "delta": delta.to_dict(),
        "logprobs": _logprobs(service, chat, output),
        "finish_reason": _finish_reason(output, has_calls=parser.has_calls),
    }
    if output.finish_reason is not None:
        choice["stop_reason"] = output.stop_reason
    if chat.request.return_token_ids:
        choice["token_ids"] = output.token_ids
    return choice
