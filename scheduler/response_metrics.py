"""The ``metrics`` of an answer to a request with ``include_metrics``: vLLM's fields, and how graphs were found.

Times describe one stream of tokens; they are None where an answer has several. Counts are of all its prompts.
"""

from collections.abc import Sequence
from typing import Any

from xllm_compile.runtime.outputs import RequestMetrics

OUTCOMES = ("exact", "padded", "dynamic", "eager")
"""How a step's graphs are found (runtime/graph_cache.py)."""


def response_metrics(prompts: Sequence[RequestMetrics], *, num_choices: int, num_tokens: int) -> dict[str, Any]:
    """``prompts``: of each prompt, finished; num_choices and num_tokens: of the whole answer."""
    return {
        **_times(prompts[0] if num_choices == 1 else None, num_tokens),
        "num_preemptions": sum(metrics.num_preemptions for metrics in prompts),
        "num_draft_tokens": sum(metrics.num_draft_tokens for metrics in prompts),
        "num_accepted_tokens": sum(metrics.num_accepted_tokens for metrics in prompts),
        "num_forced_tokens": sum(metrics.num_forced_tokens for metrics in prompts),
        "graph_steps": {name: sum(metrics.graph_steps[name] for metrics in prompts) for name in OUTCOMES},
    }


def _times(metrics: RequestMetrics | None, num_tokens: int) -> dict[str, float | None]:
    """From being queued to the last token, in milliseconds."""
    scheduled = metrics.scheduled_s if metrics else None
    first, last = (metrics.first_token_s, metrics.last_token_s) if metrics else (None, None)
    generation_ms = _ms(first, last)
    inference_ms = _ms(scheduled, last)
    return {
        "queue_time_ms": _ms(metrics.arrival_s if metrics else None, scheduled),
        "time_to_first_token_ms": None if metrics and metrics.is_resumed else _ms(scheduled, first),
        "generation_time_ms": generation_ms,
        "mean_itl_ms": generation_ms / (num_tokens - 1) if generation_ms is not None and num_tokens > 1 else None,
        "tokens_per_second": num_tokens / inference_ms * 1e3 if inference_ms else None,
    }


def _ms(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else (end - begin) * 1e3
