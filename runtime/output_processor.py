"""What a new token means for its sequence, and what the caller gets to see of a request."""

import logging
from collections.abc import Collection
from collections.abc import Sequence as Items

from torch import Tensor

from xllm_compile.runtime.batch import PoolRows, PromptRows
from xllm_compile.runtime.outputs import CompletionOutput, Logprob, RequestOutput
from xllm_compile.runtime.pooling import make_embedding
from xllm_compile.runtime.sampler import SampledToken, TokenLogprobs
from xllm_compile.runtime.sampling_params import RequestOutputKind
from xllm_compile.runtime.sequence import Request, Sequence
from xllm_compile.runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def append_token(sequence: Sequence, sampled: SampledToken, tokenizer: Tokenizer) -> None:
    """Add the token, its text and log-probabilities; finish the sequence where it ends one.

    An end-of-sequence or stop token is part of token_ids and not of the text.
    """
    params = sequence.request.params
    token_id = sampled.token_id
    sequence.token_ids.append(token_id)
    if sampled.logprobs is not None:
        _append_logprobs(sequence, sampled.logprobs, tokenizer)

    # Before min_tokens the sampler does not choose these.
    is_eos = token_id in tokenizer.eos_token_ids and not params.ignore_eos
    if is_eos or token_id in params.stop_token_ids:
        if params.include_stop_str_in_output:
            sequence.detokenizer.push(token_id, may_stop=False)
        sequence.detokenizer.finish()
        sequence.finish("stop", None if is_eos else token_id)
        return

    stop = sequence.detokenizer.push(token_id, may_stop=sequence.num_output_tokens > params.min_tokens)
    if stop is not None:
        sequence.finish("stop", stop)
    elif sequence.num_output_tokens >= sequence.request.max_output_tokens:
        finish_length(sequence)


def fail(sequence: Sequence, reason: str) -> None:
    """End a sequence for which no token could be sampled."""
    request_id = sequence.request.request_id
    logger.error("request %s failed: %s", request_id, reason)
    sequence.detokenizer.finish()
    sequence.finish("abort", f"error: request {request_id} failed: {reason}")


def finish_length(sequence: Sequence) -> None:
    """End the sequence at its length. Text that was kept back may still turn out to end in a stop string."""
    stop = sequence.detokenizer.finish()
    if stop is None:
        sequence.finish("length")
    else:
        sequence.finish("stop", stop)


def add_pooled(rows: PoolRows, pooled: Tensor, now: float) -> bool:
    """Add what a chunk brings to its sequence's embedding. Returns whether that is all, and the sequence finished."""
    sequence = rows.sequence
    sequence.pooled = pooled if sequence.pooled is None else sequence.pooled + pooled
    if rows.is_last:
        sequence.embedding = make_embedding(sequence.pooled, sequence.num_tokens, rows.params)
        sequence.request.metrics.last_token_s = now
        sequence.finish("stop")
    return rows.is_last


def collect_prompt_logprobs(
    prompt_rows: Items[PromptRows], found: Items[Items[TokenLogprobs]], tokenizer: Tokenizer
) -> None:
    """Append what a step found out about prompt tokens to their requests."""
    for rows, of_tokens in zip(prompt_rows, found, strict=True):
        collected = rows.sequence.request.prompt_logprobs
        assert collected is not None
        collected += [_decoded_logprobs(of_token, tokenizer) for of_token in of_tokens]


def make_outputs(changed: Collection[Request]) -> list[RequestOutput]:
    """What these requests show after a step. Those that are finished let go of their sequences."""
    outputs = [make_output(request) for request in changed]
    for request in changed:
        if request.is_finished:
            # They point back at it: apart, both go at once and not when the collector comes by.
            request.sequences.clear()
    return [output for output in outputs if output is not None]


def make_output(request: Request) -> RequestOutput | None:
    """What the request shows after a step that changed it, by its output kind; None where that is nothing."""
    kind = request.params.output_kind
    if kind is RequestOutputKind.FINAL_ONLY and not request.is_finished:
        return None
    if kind is RequestOutputKind.DELTA:
        outputs = [_delta(sequence) for sequence in request.sequences if _has_news(sequence)]
        prompt_logprobs = None if request.is_prompt_sent else request.prompt_logprobs
    else:
        outputs = [_completion(sequence) for sequence in request.sequences]
        prompt_logprobs = request.prompt_logprobs
    if not outputs:
        return None
    request.is_prompt_sent = True
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=outputs,
        finished=request.is_finished,
        metrics=request.metrics,
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=request.num_cached_tokens,
        embedding=request.sequences[0].embedding,
        num_kv_tokens=request.num_kv_tokens if request.sequences[0].finish_reason == "handed_over" else None,
    )


def _append_logprobs(sequence: Sequence, found: TokenLogprobs, tokenizer: Tokenizer) -> None:
    if sequence.logprobs is None:
        sequence.logprobs, sequence.cumulative_logprob = [], 0.0
    sequence.logprobs.append(_decoded_logprobs(found, tokenizer))
    sequence.cumulative_logprob = (sequence.cumulative_logprob or 0.0) + found.logprobs[0]


def _decoded_logprobs(found: TokenLogprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    return {
        token_id: Logprob(logprob=logprob, rank=rank, decoded_token=tokenizer.token_text(token_id))
        for token_id, logprob, rank in zip(found.token_ids, found.logprobs, found.ranks, strict=True)
    }


def _has_news(sequence: Sequence) -> bool:
    return sequence.num_output_tokens > sequence.num_tokens_sent or (sequence.is_finished and not sequence.is_end_sent)


def _completion(sequence: Sequence) -> CompletionOutput:
    return CompletionOutput(
        index=sequence.index,
        text=sequence.detokenizer.text,
        token_ids=sequence.output_token_ids[sequence.num_resumed_tokens :],
        # A copy: the caller may still look at it when the next token has come.
        logprobs=None if sequence.logprobs is None else list(sequence.logprobs),
        cumulative_logprob=sequence.cumulative_logprob,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )


def _delta(sequence: Sequence) -> CompletionOutput:
    sent = sequence.num_tokens_sent
    sequence.num_tokens_sent = sequence.num_output_tokens
    sequence.is_end_sent = sequence.is_finished
    return CompletionOutput(
        index=sequence.index,
        text=sequence.detokenizer.take_new(),
        token_ids=sequence.token_ids[sequence.num_prompt_tokens + sent :],
        logprobs=None if sequence.logprobs is None else sequence.logprobs[sent - sequence.num_resumed_tokens :],
        cumulative_logprob=sequence.cumulative_logprob,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )
