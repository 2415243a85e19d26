"""More candidates than answers: ``best_of`` of /v1/completions, as OpenAI and vLLM had it."""

import math
from collections.abc import AsyncGenerator
from contextlib import aclosing

from xllm_compile.runtime.outputs import CompletionOutput, RequestOutput


async def best_of(outputs: AsyncGenerator[RequestOutput, None], n: int) -> AsyncGenerator[RequestOutput, None]:
    """The n candidates of highest cumulative log-probability, the best first, once all are finished.

    ``outputs`` are of a request for all candidates, with log-probabilities, that reports at its end only.
    """
    async with aclosing(outputs):
        async for output in outputs:
            if not any(candidate.finish_reason == "abort" for candidate in output.outputs):
                output.outputs = sorted(output.outputs, key=_score, reverse=True)[:n]
                for index, candidate in enumerate(output.outputs):
                    candidate.index = index
            yield output


def _score(candidate: CompletionOutput) -> float:
    return -math.inf if candidate.cumulative_logprob is None else candidate.cumulative_logprob
