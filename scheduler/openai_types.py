"""Request bodies of the OpenAI API and vLLM's additions to it. Unknown fields and wrong types are refused.

Defaults are None wherever the model's own generation defaults decide (openai_params.py). Fields typed Any are read
by hand: a union of prompt forms would be validated once per form, and its errors would name all of them.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Strict(BaseModel):
    # strict: "0.5" is no number. Integers still pass as floats.
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Usage so far in every chunk, as vLLM."""


class ResponseFormat(_Strict):
    type: str
    json_schema: Any = None


class SamplingFields(_Strict):
    """What completions and chat completions share."""

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Bookkeeping for the caller; it changes nothing in the answer.
    user: str | None = None
    # vLLM's additions.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    use_beam_search: bool | None = None
    """The n most probable continuations, found by beam search n (or best_of) wide."""
    length_penalty: float | None = None
    """Of beam search: scores are divided by the length to this power (default 1)."""
    include_metrics: bool | None = None
    """Answer with times and counts of this request (response_metrics.py)."""
    # Scheduling: vLLM's priority (lower goes first), or xLLM's "offline" and targets.
    priority: int | Literal["offline"] | None = None
    offline: bool | None = None
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    # What the answer must look like: OpenAI's, and vLLM's newer and older words.
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None


class CompletionRequest(SamplingFields):
    prompt: Any = None
    """str, list of str, list of token ids, or list of those."""
    best_of: int | None = None
    """Candidates of which the n most probable are answered."""
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None
    """Let the tokenizer add its begin-of-sequence token to text prompts (default true)."""


class EmbeddingRequest(_Strict):
    model: str | None = None
    input: Any = None
    """str, list of str, list of token ids, or list of those."""
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    # Bookkeeping for the caller; it changes nothing in the answer.
    user: str | None = None
    # Additions: names of vLLM where it has them.
    add_special_tokens: bool | None = None
    pooling: str | None = None
    """last (default) or mean."""
    normalize: bool | None = None
    """Scale to length 1 (default true)."""
    priority: int | Literal["offline"] | None = None
    offline: bool | None = None


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Any = None
    """str, or a list of content parts."""
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    """What an earlier answer thought; the template decides whether the model sees it."""
    tool_calls: Any = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None


class ChatCompletionRequest(SamplingFields):
    messages: list[ChatMessage]
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    """Show the reasoning (default true), as vLLM."""
    # Bookkeeping for the caller; they change nothing in the answer.
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Known, and refused unless they ask for nothing.
    store: bool | None = None
    service_tier: str | None = None
    modalities: list[str] | None = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None


class TokenizeRequest(_Strict):
    """vLLM's /tokenize: a prompt or chat messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Any = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Strict):
    model: str | None = None
    tokens: list[int]
