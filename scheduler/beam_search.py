"""Beam search over a service: the steps of one prompt's search, as Service.generate gives outputs."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from xllm_compile.runtime.beam_search import BeamSearch, BeamSearchParams, one_token_params
from xllm_compile.runtime.outputs import RequestOutput
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.service import Service
from xllm_compile.scheduler.tasks import gather_or_cancel


async def beam_search(
    service: Service, request_id: str, token_ids: list[int], params: BeamSearchParams
) -> AsyncGenerator[RequestOutput, None]:
    """One output with the n best beams, the best first. Raises ApiError."""
    search = BeamSearch(params=params, prompt=token_ids, tokenizer=service.tokenizer)
    for step in range(params.max_tokens):
        search.take(await _ask(service, f"{request_id}-{step}", search.prompts(), one_token_params(params)))
        if search.is_done:
            break
    yield search.output(request_id)


async def _ask(
    service: Service, request_id: str, prompts: Sequence[list[int]], params: SamplingParams
) -> list[RequestOutput]:
    """All at once. One that fails ends the others."""

    async def ask(index: int, prompt: list[int]) -> RequestOutput:
        outputs = service.generate(f"{request_id}.{index}", prompt, params, is_measured=False)
        async with aclosing(outputs):
            async for output in outputs:
                if output.outputs[0].finish_reason != "abort":
                    return output
        raise errors.ApiError(errors.UNAVAILABLE, "The server ended this request early.", code="aborted")

    return await gather_or_cancel(ask(index, prompt) for index, prompt in enumerate(prompts))
