"""From an OpenAI request to SamplingParams: defaults, limits, and what is refused because it is not there yet."""

import re
from collections.abc import Mapping
from typing import Any

from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams
from xllm_compile.runtime.structured_output import StructuredOutput
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.openai_types import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    SamplingFields,
)

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of /v1/completions; chat goes on to the end of the context."""

MAX_CANDIDATES = 128
"""Most that best_of asks for, as much as n."""

_PASSED_ON = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "logit_bias",
    "skip_special_tokens",
    "ttft_slo_ms",
    "tpot_slo_ms",
)

# Values of fields that are not available yet which ask for nothing and so may pass.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}


def refuse_unavailable(request: SamplingFields) -> None:
    """Raises ApiError (400) for an option this server knows but cannot honour: none is silently dropped."""
    for name, harmless in _HARMLESS.items():
        value = getattr(request, name, None)
        if value is not None and value not in harmless:
            raise errors.not_available(name)
    if request.stream_options is not None and not request.stream:
        message = "'stream_options' is only allowed when 'stream' is true."
        raise errors.invalid(message, param="stream_options")
    best_of = getattr(request, "best_of", None)
    if best_of is not None and not (request.n or 1) <= best_of <= MAX_CANDIDATES:
        message = f"best_of={best_of} must be in [n={request.n or 1}, {MAX_CANDIDATES}]."
        raise errors.invalid(message, param="best_of")
    if best_of is not None and best_of > (request.n or 1) and request.stream:
        message = "Candidates are chosen when all are finished: with 'stream', leave 'best_of' out."
        raise errors.invalid(message, param="best_of")


def completion_logprobs(request: CompletionRequest) -> tuple[int | None, int | None]:
    """(logprobs, prompt_logprobs); the prompt's are wanted with echo."""
    return request.logprobs, request.logprobs if request.echo else None


def chat_logprobs(request: ChatCompletionRequest) -> int | None:
    if request.top_logprobs is not None and not request.logprobs:
        raise errors.invalid("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None


def chat_max_tokens(request: ChatCompletionRequest) -> tuple[int | None, str]:
    """The limit asked for, None for the rest of the context, and the field it came from."""
    if request.max_completion_tokens is not None:
        return request.max_completion_tokens, "max_completion_tokens"
    return request.max_tokens, "max_tokens"


def fit_max_tokens(max_tokens: int | None, num_prompt: int, max_model_len: int, prompt_param: str) -> int:
    """Tokens to generate at most. Raises ApiError (400, context_length_exceeded) when prompt and output do not fit."""
    room = max_model_len - num_prompt
    if room < 1:
        raise errors.context_length_exceeded(num_prompt, 0, max_model_len, prompt_param)
    if max_tokens is None:
        return room
    if max_tokens > room:
        raise errors.context_length_exceeded(num_prompt, max_tokens, max_model_len, prompt_param)
    return max_tokens


def sampling_params(
    request: SamplingFields,
    model_defaults: Mapping[str, float],
    *,
    max_tokens: int,
    max_tokens_param: str = "max_tokens",
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    structured: StructuredOutput | None = None,
    keep_special_tokens: bool = False,
) -> SamplingParams:
    """The request's options over the model's own (generation_config.json), as in vLLM. Raises ApiError (400)."""
    options: dict[str, Any] = dict(model_defaults)
    options.update({name: value for name in _PASSED_ON if (value := getattr(request, name)) is not None})
    options |= place_options(request)
    if keep_special_tokens:
        options["skip_special_tokens"] = False
    kind = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
    return build_sampling_params(
        options
        | {
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
            "structured": structured,
            "output_kind": kind,
        },
        {"max_tokens": max_tokens_param},
    )


def place_options(request: SamplingFields | EmbeddingRequest) -> dict[str, Any]:
    """The request's place among others, as options of SamplingParams."""
    if request.priority == "offline":
        return {"priority": 0, "offline": True}
    return {name: value for name in ("priority", "offline") if (value := getattr(request, name)) is not None}


def build_sampling_params(options: Mapping[str, Any], renamed: Mapping[str, str] | None = None) -> SamplingParams:
    """SamplingParams whose ValueError became an ApiError (400); renamed maps its fields to the client's names."""
    seed = options.get("seed")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise errors.invalid(f"seed={seed} must fit in 64 bits", param="seed")
    try:
        return SamplingParams(**options)
    except ValueError as err:
        message = str(err)
        # Its messages open with the field: "top_p=2.0 must be in (0, 1]".
        named = re.match(r"(\w+)=", message)
        param = named.group(1) if named else None
        if param is not None and renamed and param in renamed:
            message, param = message.replace(param, renamed[param], 1), renamed[param]
        raise errors.invalid(message, param=param) from None
