"""POST /tokenize and /detokenize, in vLLM's shapes."""

from typing import Any

from starlette.types import Send

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.http_io import send_json
from xllm_compile.scheduler.openai_tools import check_tools
from xllm_compile.scheduler.openai_types import DetokenizeRequest, TokenizeRequest
from xllm_compile.scheduler.openai_validation import parse_body
from xllm_compile.scheduler.prompts import chat_prompt, encode
from xllm_compile.scheduler.service import Service


async def handle_tokenize(service: Service, body: bytes, send: Send) -> None:
    request = parse_body(TokenizeRequest, body)
    service = service.for_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise errors.invalid("Give either 'prompt' or 'messages'.", param="prompt")
    if request.messages is not None:
        prompt = await chat_prompt(
            service.tokenizer,
            request.messages,
            add_generation_prompt=request.add_generation_prompt is not False,
            template_kwargs=request.chat_template_kwargs,
            tools=check_tools(request.tools),
            calls_as_text=service.chat_formats.takes_calls_as_text,
        )
        token_ids = prompt.token_ids
    else:
        token_ids = await encode(
            service.tokenizer, request.prompt or "", add_special_tokens=request.add_special_tokens is not False
        )
    answer: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": service.max_model_len,
        "tokens": token_ids,
        "token_strs": None,
    }
    if request.return_token_strs:
        answer["token_strs"] = [service.tokenizer.token_text(token_id) for token_id in token_ids]
    await send_json(send, answer)


async def handle_detokenize(service: Service, body: bytes, send: Send) -> None:
    request = parse_body(DetokenizeRequest, body)
    service = service.for_model(request.model)
    for token_id in request.tokens:
        if not 0 <= token_id < 2**31:
            raise errors.invalid(f"tokens holds {token_id}, which is no token id.", param="tokens")
    await send_json(send, {"prompt": service.tokenizer.decode(request.tokens, skip_special_tokens=False)})
