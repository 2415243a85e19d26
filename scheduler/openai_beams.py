"""Beam search in requests of the OpenAI API: vLLM's ``use_beam_search``, with ``n`` or ``best_of`` as its width."""

from xllm_compile.runtime.beam_search import BeamSearchParams
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.openai_types import ChatCompletionRequest, CompletionRequest

# What a request may say beside its prompt. Beams are no samples, and end at an end-of-sequence or their length only.
_FIELDS = frozenset(
    [
        "model",
        "prompt",
        "messages",
        "add_special_tokens",
        "add_generation_prompt",
        "chat_template_kwargs",
        "max_tokens",
        "max_completion_tokens",
        "n",
        "priority",
        "offline",
        "best_of",
        "use_beam_search",
        "length_penalty",
        "ignore_eos",
        "skip_special_tokens",
        "logprobs",
        "top_logprobs",
        "return_token_ids",
        "include_metrics",
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
    ]
)


def beam_params(request: CompletionRequest | ChatCompletionRequest, params: SamplingParams) -> BeamSearchParams | None:
    """None where the request asks for no beam search; ``params`` are those it would be sampled with. Raises ApiError
    (400) for what does not go with it."""
    if not request.use_beam_search:
        if request.length_penalty is not None:
            raise errors.invalid("'length_penalty' needs 'use_beam_search' to be true.", param="length_penalty")
        return None
    for name in sorted(request.model_fields_set - _FIELDS):
        value = getattr(request, name)
        if value not in (None, False) and not (name == "temperature" and value == 0):
            raise errors.invalid(f"'{name}' does not go with beam search; leave it out.", param=name)
    assert params.max_tokens is not None
    try:
        return BeamSearchParams(
            beam_width=getattr(request, "best_of", None) or params.n,
            n=params.n,
            max_tokens=params.max_tokens,
            length_penalty=1.0 if request.length_penalty is None else request.length_penalty,
            ignore_eos=params.ignore_eos,
            skip_special_tokens=params.skip_special_tokens,
            priority=params.priority,
            offline=params.offline,
            logprobs=params.logprobs,
        )
    except ValueError as err:
        name, _, rest = str(err).partition("=")
        if name == "beam_width":
            name = "n" if getattr(request, "best_of", None) is None else "best_of"
        raise errors.invalid(f"{name}={rest}", param=name) from None
