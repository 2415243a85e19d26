"""A request that goes on with what another instance generated of it.

The tokens are put in as if this instance had sampled them: text, stop strings, penalties, grammar, limits and the
request's random numbers stand where they stood there, so what follows is what would have followed. Their KV is found
or computed again, as after a preemption.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

from xllm_compile.runtime.output_processor import append_token
from xllm_compile.runtime.sampler import SampledToken
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.sequence import Sequence
from xllm_compile.runtime.token_matcher import GrammarError
from xllm_compile.runtime.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """What a request has generated elsewhere."""

    output_token_ids: Items[int]
    num_text_chars: int = 0
    """Characters of text that the client has: these are not sent again."""
    reservation_id: str = ""
    """Of the KV that was sent here for it; empty where there is none."""
    num_kv_tokens: int = 0
    """Tokens from the start whose KV has arrived there, as its sender says. The rest is computed."""
    is_begun: bool = False
    """Another instance had it, whatever came of that: it has waited in a queue already."""
    first_token_age_s: float | None = None
    """So long ago the client got its first token: tokens are due from there on. None where nobody says."""


def check_resume(resume: Resume, params: SamplingParams, max_output_tokens: int) -> None:
    """Raises ValueError where the request cannot go on: what it was asked does not allow it."""
    has_kv = bool(resume.output_token_ids or resume.reservation_id)
    for name, value in (("n", params.n != 1), ("prompt_logprobs", has_kv and params.prompt_logprobs is not None)):
        if value:
            raise ValueError(
                f"{name}={getattr(params, name)} cannot be resumed: what it needs of the prompt, or of the other"
                " completions, is not there any more; send the request anew, without resume"
            )
    if len(resume.output_token_ids) > max_output_tokens:
        raise ValueError(
            f"resume has {len(resume.output_token_ids)} output_token_ids, and max_tokens and the model's length leave"
            f" {max_output_tokens}; resume with the max_tokens that the request began with"
        )


def replay(sequence: Sequence, resume: Resume, tokenizer: Tokenizer) -> None:
    """Take the tokens in. The sequence is finished afterwards where the last of them ends it.

    Raises ValueError when it had ended before, when its grammar does not allow them, and when the client cannot have
    as much text.
    """
    for index, token_id in enumerate(resume.output_token_ids):
        if sequence.is_finished:
            raise ValueError(
                f"resume: the request ended ({sequence.finish_reason}) with token {index} of"
                f" {len(resume.output_token_ids)} output_token_ids; it cannot go on behind its end"
            )
        append_token(sequence, SampledToken(token_id=token_id), tokenizer)
    sequence.sampling.replay(resume.output_token_ids)
    if sequence.sampling.matcher is not None and not sequence.is_finished:
        try:
            sequence.sampling.matcher.mask()
        except GrammarError as err:
            raise ValueError(f"resume: output_token_ids do not fit the request's structured output: {err}") from None
    sequence.num_tokens_sent = sequence.num_resumed_tokens = len(resume.output_token_ids)
    num_chars = len(sequence.detokenizer.text)
    if resume.num_text_chars > num_chars:
        raise ValueError(
            f"resume: num_text_chars={resume.num_text_chars} is above the {num_chars} characters of text that"
            f" {len(resume.output_token_ids)} output_token_ids give; count those of the responses that brought them"
        )
    sequence.detokenizer.skip(resume.num_text_chars)
