"""What a request's span says of what was generated for it: OpenTelemetry's gen_ai attributes, and the engine's phases.

Times of latencies are named as vLLM names them; in seconds.
"""

from typing import Any

from xllm_compile.runtime.outputs import RequestMetrics, RequestOutput
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.scheduler.tracing import PROVIDER, Attributes, Span

CHAT, COMPLETION, EMBEDDINGS = "chat", "text_completion", "embeddings"


def operation(name: str) -> Attributes:
    """Of a request as it comes in; name is one of those above."""
    return {"gen_ai.operation.name": name, "gen_ai.provider.name": PROVIDER}


def trace_generation(
    span: Span, model: str, params: SamplingParams, output: RequestOutput, num_tokens: int, *, has_engine: bool
) -> None:
    """output is the last one of a prompt of the request, num_tokens what all of it generated.

    has_engine: the times are those of an engine in this process, which become spans below this one.
    """
    metrics = output.metrics
    span.set(_asked(model, params) | _latencies(metrics))
    span.set({"gen_ai.response.finish_reasons": [choice.finish_reason or "cut" for choice in output.outputs]})
    span.add(
        {
            "gen_ai.usage.input_tokens": len(output.prompt_token_ids),
            "gen_ai.usage.output_tokens": num_tokens,
            "gen_ai.usage.cache_read.input_tokens": output.num_cached_tokens,
            "xllm.num_preemptions": metrics.num_preemptions,
        }
    )
    if has_engine:
        _trace_phases(span, output)


def _asked(model: str, params: SamplingParams) -> dict[str, Any]:
    asked = {
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.choice.count": params.n if params.n > 1 else None,
        "gen_ai.request.seed": params.seed,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _latencies(metrics: RequestMetrics) -> dict[str, float]:
    arrival_s, first_s, last_s = metrics.arrival_s, metrics.first_token_s, metrics.last_token_s
    spans = {
        "gen_ai.latency.time_in_queue": (arrival_s, metrics.scheduled_s),
        "gen_ai.latency.time_to_first_token": (arrival_s, None if metrics.is_resumed else first_s),
        "gen_ai.latency.time_in_model_prefill": (metrics.scheduled_s, None if metrics.is_resumed else first_s),
        "gen_ai.latency.time_in_model_decode": (first_s, last_s),
        "gen_ai.latency.e2e": (arrival_s, last_s),
    }
    return {name: end - begin for name, (begin, end) in spans.items() if begin is not None and end is not None}


def _trace_phases(span: Span, output: RequestOutput) -> None:
    metrics = output.metrics
    prompt = {
        "gen_ai.usage.input_tokens": len(output.prompt_token_ids),
        "gen_ai.usage.cache_read.input_tokens": output.num_cached_tokens,
    }
    span.past("queue", metrics.arrival_s, metrics.scheduled_s)
    # One that goes on from another instance's tokens has its KV, or computes what of it is missing.
    name = "resume" if metrics.is_resumed else "prefill"
    span.past(name, metrics.scheduled_s, metrics.first_token_s, prompt)
    span.past("decode", metrics.first_token_s, metrics.last_token_s)
    sent = metrics.kv_sent
    if sent is not None:
        sizes = {"xllm.kv.num_tokens": output.num_kv_tokens or 0, "xllm.kv.num_bytes": sent.num_bytes}
        span.past("kv_hand_over", sent.begin_s, sent.end_s, sizes)
