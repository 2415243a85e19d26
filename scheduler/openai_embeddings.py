"""POST /v1/embeddings."""

import asyncio
import base64
import uuid
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from starlette.types import Send

from xllm_compile.runtime.pooling import PoolingParams
from xllm_compile.runtime.sampling_params import SamplingParams, embedding_params
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.embedding import embed
from xllm_compile.scheduler.http_io import send_json_text
from xllm_compile.scheduler.openai_params import place_options
from xllm_compile.scheduler.openai_stream import dumps
from xllm_compile.scheduler.openai_types import EmbeddingRequest
from xllm_compile.scheduler.openai_validation import parse_body
from xllm_compile.scheduler.prompts import Prompt, completion_prompts
from xllm_compile.scheduler.service import Service
from xllm_compile.scheduler.tasks import gather_or_cancel

# Inputs of one request that are in the engine at once: thousands would fill its queue for everybody.
_MAX_AT_ONCE = 64


async def handle_embeddings(service: Service, body: bytes, send: Send) -> None:
    """Raises ApiError for anything the client should hear as an error."""
    request = parse_body(EmbeddingRequest, body)
    service = service.for_model(request.model)
    params = _params(request)
    prompts = await completion_prompts(
        service.tokenizer, request.input, add_special_tokens=request.add_special_tokens is not False, param="input"
    )
    for prompt in prompts:
        if len(prompt.token_ids) > service.max_model_len:
            raise errors.context_length_exceeded(len(prompt.token_ids), 0, service.max_model_len, "input")
    parts = await _embed_all(service, prompts, params, is_base64=request.encoding_format == "base64")
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    data = ",".join(f'{{"object":"embedding","index":{index},"embedding":{part}}}' for index, part in enumerate(parts))
    tail = dumps({"model": service.model_name, "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens}})
    await send_json_text(send, f'{{"object":"list","data":[{data}],{tail[1:]}')


def _params(request: EmbeddingRequest) -> SamplingParams:
    try:
        pooling = PoolingParams(
            pooling=request.pooling or "last",
            normalize=request.normalize is not False,
            dimensions=request.dimensions,
        )
        return replace(embedding_params(pooling), **place_options(request))
    except ValueError as err:
        raise errors.invalid(str(err), param=str(err).partition("=")[0]) from None


async def _embed_all(service: Service, prompts: list[Prompt], params: SamplingParams, *, is_base64: bool) -> list[str]:
    """The JSON of each embedding. One that fails ends the others."""
    request_id = f"embd-{uuid.uuid4().hex}"
    places = asyncio.Semaphore(_MAX_AT_ONCE)

    async def encoded(index: int, prompt: Prompt) -> str:
        async with places:
            values = await embed(service, f"{request_id}-{index}", prompt.token_ids, params)
            # Here, while others compute: encoding all at the end would hold up every open stream.
            return _encode(values, is_base64=is_base64)

    return await gather_or_cancel(encoded(index, prompt) for index, prompt in enumerate(prompts))


def _encode(values: npt.NDArray[np.float32], *, is_base64: bool) -> str:
    """As OpenAI: an array of numbers, or a string of little-endian float32."""
    if is_base64:
        return f'"{base64.b64encode(values.astype("<f4").tobytes()).decode()}"'
    return dumps(values.tolist())
