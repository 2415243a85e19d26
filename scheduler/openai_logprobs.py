"""Log-probabilities in the formats of the two OpenAI APIs."""

from collections.abc import Sequence
from typing import Any

from xllm_compile.runtime.outputs import Logprob
from xllm_compile.scheduler.engine_client import ServiceTokenizer

# JSON has no -inf; the value vLLM sends for a token that cannot be.
_LOWEST = -9999.0

TokenLogprobs = dict[int, Logprob]


def completion_logprobs(
    tokenizer: ServiceTokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    text_offset: int,
) -> tuple[dict[str, Any], int]:
    """The `logprobs` object of /v1/completions and the text offset after it.

    logprobs has an entry per token, None for a prompt's first; text_offset counts characters of the whole text.
    """
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, entries in zip(token_ids, logprobs, strict=True):
        text = tokenizer.token_text(token_id) if entries is None else entries[token_id].decoded_token
        tokens.append(text)
        offsets.append(text_offset)
        text_offset += len(text)
        token_logprobs.append(None if entries is None else _finite(entries[token_id].logprob))
        top_logprobs.append(None if entries is None else _by_text(entries))
    return {
        "text_offset": offsets,
        "token_logprobs": token_logprobs,
        "tokens": tokens,
        "top_logprobs": top_logprobs,
    }, text_offset


def _by_text(entries: TokenLogprobs) -> dict[str, float]:
    by_text: dict[str, float] = {}
    for entry in sorted(entries.values(), key=lambda entry: entry.rank):
        # Two tokens may have one text; the more probable one keeps the place.
        by_text.setdefault(entry.decoded_token, _finite(entry.logprob))
    return by_text


def chat_logprobs(
    tokenizer: ServiceTokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int
) -> dict[str, Any]:
    """The `logprobs` object of /v1/chat/completions; num_top alternatives per token."""
    content = []
    for token_id, entries in zip(token_ids, logprobs, strict=True):
        ranked = sorted(entries.items(), key=lambda item: item[1].rank)[:num_top]
        content.append(
            _chat_entry(tokenizer, token_id, entries[token_id])
            | {"top_logprobs": [_chat_entry(tokenizer, top_id, entry) for top_id, entry in ranked]}
        )
    return {"content": content, "refusal": None}


def _chat_entry(tokenizer: ServiceTokenizer, token_id: int, entry: Logprob) -> dict[str, Any]:
    # Where a character spans tokens its text is U+FFFD and only the bytes let a client put it together.
    raw = tokenizer.token_bytes(token_id) if tokenizer.is_byte_level else entry.decoded_token.encode()
    return {"token": entry.decoded_token, "logprob": _finite(entry.logprob), "bytes": list(raw)}


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
