"""Between what the service speaks (SamplingParams, CompletionOutput) and the messages of Instance.Run."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from xllm_compile.runtime.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics
from xllm_compile.runtime.pooling import PoolingParams
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.structured_output import StructuredOutput
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.proto import xllm_pb2

# Fields of the same name and meaning, where None is unset.
_SAME = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
    "logit_bias",
)

_FINISH_REASONS: dict[int, FinishReason] = {
    xllm_pb2.FINISH_REASON_STOP: "stop",
    xllm_pb2.FINISH_REASON_LENGTH: "length",
    xllm_pb2.FINISH_REASON_ABORT: "abort",
}

_COUNTS = ("num_preemptions", "num_draft_tokens", "num_accepted_tokens", "num_forced_tokens")


def generate_message(request_id: str, prompt: Sequence[int], params: SamplingParams, seed: int | None) -> Any:
    """Of one completion: params.n is not passed on. Nothing is left to the instance's defaults but a missing seed."""
    sampling = xllm_pb2.SamplingParams(
        n=1,
        seed=seed,
        # -1 keeps all tokens, as 0 does.
        top_k=max(params.top_k, 0),
        keep_special_tokens=not params.skip_special_tokens,
        **{name: getattr(params, name) for name in _SAME},
    )
    if params.structured is not None:
        _set_structured(sampling, params.structured)
    scheduling = xllm_pb2.Scheduling(
        priority=params.priority,
        offline=params.offline,
        ttft_slo_ms=params.ttft_slo_ms,
        tpot_slo_ms=params.tpot_slo_ms,
    )
    return xllm_pb2.GenerateRequest(
        request_id=request_id, token_ids=xllm_pb2.TokenIds(ids=prompt), sampling=sampling, scheduling=scheduling
    )


def embed_message(prompt: Sequence[int], pooling: PoolingParams) -> Any:
    return xllm_pb2.EmbedRequest(
        token_ids=xllm_pb2.TokenIds(ids=prompt),
        pooling=xllm_pb2.POOLING_MEAN if pooling.pooling == "mean" else xllm_pb2.POOLING_LAST,
        keep_length=not pooling.normalize,
        dimensions=pooling.dimensions,
    )


def _set_structured(sampling: Any, structured: StructuredOutput) -> None:
    match structured.kind:
        case "json_object":
            sampling.json_object = True
        case "choice":
            sampling.choice.texts.extend(json.loads(structured.source))
        case kind:
            setattr(sampling, kind, structured.source)
    reasoning = structured.reasoning
    if reasoning is not None:
        sampling.reasoning.CopyFrom(
            xllm_pb2.ReasoningText(start=reasoning.start, end=reasoning.end, is_open=reasoning.is_open)
        )


def completion_of(choice: Any, index: int) -> CompletionOutput:
    """What is new of the choice."""
    kind = choice.WhichOneof("stop_reason") if choice.finish_reason else None
    return CompletionOutput(
        index=index,
        text=choice.text,
        token_ids=list(choice.token_ids),
        logprobs=logprobs_of(choice.logprobs) if choice.logprobs else None,
        finish_reason=_FINISH_REASONS.get(choice.finish_reason),
        stop_reason=getattr(choice, kind) if kind else None,
    )


def logprobs_of(messages: Iterable[Any]) -> list[dict[int, Logprob]]:
    """One dictionary per token; the most probable ones and the chosen one."""
    return [{entry.token_id: _logprob(entry) for entry in (message.chosen, *message.top)} for message in messages]


def prompt_logprobs_of(messages: Iterable[Any]) -> list[dict[int, Logprob] | None]:
    """As logprobs_of; the first token has none."""
    return [None, *logprobs_of(list(messages)[1:])]


def _logprob(entry: Any) -> Logprob:
    return Logprob(logprob=entry.logprob, rank=entry.rank, decoded_token=entry.text)


def count_metrics(metrics: RequestMetrics, message: Any) -> None:
    """Add the counts of an instance's RequestMetrics: a request may have been on several."""
    for name in _COUNTS:
        setattr(metrics, name, getattr(metrics, name) + getattr(message, name))
    for field, count in message.graph_steps.ListFields():
        metrics.graph_steps[field.name] += count


def api_error(failure: Any) -> errors.ApiError:
    """Of a RunFailure: what the instance would have told its own client."""
    return errors.ApiError(
        errors.KINDS_BY_STATUS.get(failure.status, errors.INTERNAL),
        failure.message,
        param=failure.param if failure.HasField("param") else None,
        code=failure.code if failure.HasField("code") else None,
        retry_after_s=failure.retry_after_s if failure.HasField("retry_after_s") else None,
    )
