"""Between the messages of xllm.proto and the runtime's types."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xllm_compile.runtime.hand_over import HandOver
from xllm_compile.runtime.outputs import CompletionOutput, Logprob
from xllm_compile.runtime.pooling import PoolingParams
from xllm_compile.runtime.resume import Resume
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams, embedding_params
from xllm_compile.runtime.structured_output import ReasoningText, StructuredOutput
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.engine_client import ServiceTokenizer
from xllm_compile.scheduler.openai_params import build_sampling_params, fit_max_tokens
from xllm_compile.scheduler.openai_types import ChatMessage
from xllm_compile.scheduler.output_stream import OutputStream
from xllm_compile.scheduler.prompts import chat_prompt, encode
from xllm_compile.scheduler.proto import xllm_pb2
from xllm_compile.scheduler.service import Service

_CHAT_ROLES = ("system", "developer", "user", "assistant")

# Fields whose absence means "the model's default".
_OPTIONAL = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
)

_TARGETS = ("ttft_slo_ms", "tpot_slo_ms")

_FINISH_REASONS = {
    None: xllm_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": xllm_pb2.FINISH_REASON_STOP,
    "length": xllm_pb2.FINISH_REASON_LENGTH,
    "abort": xllm_pb2.FINISH_REASON_ABORT,
    "handed_over": xllm_pb2.FINISH_REASON_HANDED_OVER,
}


_POOLINGS = {
    xllm_pb2.POOLING_UNSPECIFIED: "last",
    xllm_pb2.POOLING_LAST: "last",
    xllm_pb2.POOLING_MEAN: "mean",
}


async def prompt_of(request: Any, tokenizer: ServiceTokenizer) -> list[int]:
    """Token ids of a GenerateRequest's or EmbedRequest's prompt. Raises ApiError when there is none."""
    kind = request.WhichOneof("prompt")
    if kind == "text":
        token_ids = await encode(tokenizer, request.text, add_special_tokens=True)
    elif kind == "token_ids":
        token_ids = list(request.token_ids.ids)
    elif kind == "chat":
        messages = [_chat_message(message) for message in request.chat.messages]
        token_ids = (await chat_prompt(tokenizer, messages)).token_ids
    else:
        kinds = [field.name for field in request.DESCRIPTOR.oneofs_by_name["prompt"].fields]
        raise errors.invalid(f"Set one of {', '.join(kinds)}.", param="prompt")
    if not token_ids:
        raise errors.invalid("The prompt must not be empty.", param=kind)
    return token_ids


def resume_of(request: Any) -> Resume | None:
    """Of a GenerateRequest."""
    if not request.HasField("resume"):
        return None
    resume = request.resume
    return Resume(
        output_token_ids=list(resume.output_token_ids),
        num_text_chars=resume.num_text_chars,
        reservation_id=resume.reservation_id,
        num_kv_tokens=resume.num_kv_tokens,
        is_begun=resume.is_begun,
        first_token_age_s=_first_token_age_s(resume),
    )


def _first_token_age_s(resume: Any) -> float | None:
    if not resume.HasField("first_token_age_ms"):
        return None
    if not 0 <= resume.first_token_age_ms < math.inf:
        raise errors.invalid(
            f"first_token_age_ms={resume.first_token_age_ms:g} must be at least 0 and finite; leave it out where it is"
            " not known.",
            param="resume.first_token_age_ms",
        )
    return float(resume.first_token_age_ms) / 1e3


def hand_over_of(request: Any) -> HandOver | None:
    """Of a GenerateRequest or a RunHandOver. Raises ApiError where it says nothing of where to send."""
    return reserved(request.hand_over.reservation) if request.HasField("hand_over") else None


def reserved(reservation: Any) -> HandOver:
    """Of a Reservation. Raises ApiError where it says nothing of where to send."""
    try:
        return HandOver(
            transfers=tuple(reservation.transfers),
            token=reservation.token,
            num_cached_tokens=reservation.num_cached_tokens,
            page_offsets=tuple(reservation.page_offsets),
            page_bytes=reservation.page_bytes,
            num_tokens=reservation.num_tokens or None,
        )
    except ValueError as err:
        raise errors.invalid(str(err), param="reservation") from None


def _chat_message(message: Any) -> ChatMessage:
    if message.role not in _CHAT_ROLES:
        raise errors.invalid(f"role='{message.role}' must be one of {', '.join(_CHAT_ROLES)}.", param="chat.messages")
    return ChatMessage(role=message.role, content=message.content)


def sampling_params_of(request: Any, service: Service, *, num_prompt: int) -> SamplingParams:
    """Raises ApiError naming the option that is out of range."""
    sampling = request.sampling
    asked = sampling.max_tokens if sampling.HasField("max_tokens") else None
    options: dict[str, Any] = dict(service.tokenizer.generation_defaults)
    options.update({name: getattr(sampling, name) for name in _OPTIONAL if sampling.HasField(name)})
    wishes = request.scheduling
    options.update({name: getattr(wishes, name) for name in _TARGETS if wishes.HasField(name)})
    return build_sampling_params(
        options
        | {
            "max_tokens": fit_max_tokens(asked, num_prompt, service.max_model_len, "prompt"),
            "stop": tuple(sampling.stop),
            "stop_token_ids": tuple(sampling.stop_token_ids),
            "include_stop_str_in_output": sampling.include_stop_str_in_output,
            "ignore_eos": sampling.ignore_eos,
            "skip_special_tokens": not sampling.keep_special_tokens,
            "logit_bias": dict(sampling.logit_bias),
            "priority": wishes.priority,
            "offline": wishes.offline,
            "structured": _structured(sampling),
            "output_kind": RequestOutputKind.FINAL_ONLY if request.final_only else RequestOutputKind.DELTA,
        }
    )


def _structured(sampling: Any) -> StructuredOutput | None:
    kind = sampling.WhichOneof("structured")
    reasoning = None
    if sampling.HasField("reasoning"):
        given = sampling.reasoning
        reasoning = ReasoningText(start=given.start, end=given.end, is_open=given.is_open)
    try:
        match kind:
            case None:
                return None
            case "json_schema":
                return StructuredOutput.json_schema(sampling.json_schema, reasoning)
            case "choice":
                return StructuredOutput.choice(list(sampling.choice.texts), reasoning)
            case "json_object":
                return StructuredOutput(kind="json_object", reasoning=reasoning) if sampling.json_object else None
            case _:
                return StructuredOutput(kind=kind, source=getattr(sampling, kind), reasoning=reasoning)
    except ValueError as err:
        raise errors.invalid(f"Invalid value for '{kind}': {err}.", param=f"sampling.{kind}") from None


def embedding_params_of(request: Any) -> SamplingParams:
    """Of an EmbedRequest. Raises ApiError naming the option that is out of range."""
    kind = _POOLINGS.get(request.pooling)
    if kind is None:
        raise errors.invalid(f"pooling={request.pooling} is none of Pooling's values.", param="pooling")
    if request.HasField("dimensions") and request.dimensions == 0:
        raise errors.invalid("dimensions=0 must be at least 1.", param="dimensions")
    # An unset field reads as 0, which keeps all.
    dimensions = request.dimensions or None
    return embedding_params(PoolingParams(pooling=kind, normalize=not request.keep_length, dimensions=dimensions))


def choice_message(choice: CompletionOutput) -> Any:
    message = xllm_pb2.Choice(
        index=choice.index,
        text=choice.text,
        token_ids=choice.token_ids,
        finish_reason=_FINISH_REASONS[choice.finish_reason],
    )
    for token_id, entries in zip(choice.token_ids, choice.logprobs or (), strict=False):
        message.logprobs.append(_token_logprobs(token_id, entries))
    if isinstance(choice.stop_reason, str):
        message.stop_string = choice.stop_reason
    elif choice.stop_reason is not None:
        message.stop_token_id = choice.stop_reason
    return message


def _token_logprobs(token_id: int, entries: dict[int, Logprob]) -> Any:
    ranked = sorted(entries.items(), key=lambda item: item[1].rank)
    # Without alternatives asked for the only entry is the chosen token itself.
    top = [_logprob(top_id, entry) for top_id, entry in ranked if top_id != token_id or len(entries) > 1]
    return xllm_pb2.TokenLogprobs(chosen=_logprob(token_id, entries[token_id]), top=top)


def _logprob(token_id: int, entry: Logprob) -> Any:
    return xllm_pb2.Logprob(token_id=token_id, text=entry.decoded_token, logprob=entry.logprob, rank=entry.rank)


def usage_message(num_prompt: int, num_resumed: int, outputs: OutputStream) -> Any:
    """Of the whole request, with what it generated elsewhere."""
    return xllm_pb2.Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_resumed + outputs.num_completion_tokens,
        cached_tokens=outputs.num_cached_tokens,
    )


def prompt_logprobs_messages(token_ids: Sequence[int], entries: Sequence[dict[int, Logprob] | None]) -> Iterator[Any]:
    """One per token of the prompt, the first empty; none without entries."""
    for token_id, found in zip(token_ids, entries, strict=False):
        yield xllm_pb2.TokenLogprobs() if found is None else _token_logprobs(token_id, found)


def metrics_message(values: Mapping[str, Any]) -> Any:
    """Of response_metrics."""
    return xllm_pb2.RequestMetrics(**dict(values) | {"graph_steps": xllm_pb2.GraphSteps(**values["graph_steps"])})
