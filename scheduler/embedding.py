"""The embedding of one prompt, for both APIs."""

import numpy as np
import numpy.typing as npt

from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.service import Service


async def embed(
    service: Service, request_id: str, token_ids: list[int], params: SamplingParams
) -> npt.NDArray[np.float32]:
    """``params`` are embedding_params. Raises ApiError."""
    async for output in service.generate(request_id, token_ids, params):
        if output.embedding is not None:
            return output.embedding
    raise errors.ApiError(errors.UNAVAILABLE, "The server ended this request early.", code="aborted")
