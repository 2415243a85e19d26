"""Prompts of the OpenAI API as token ids: text, ids, lists of both, and chat messages."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.engine_client import ServiceTokenizer
from xllm_compile.scheduler.openai_tools import message_calls
from xllm_compile.scheduler.openai_types import ChatMessage

MAX_PROMPTS = 2048
"""Most prompts of one completions request, OpenAI's limit."""

# Longer texts are tokenised in a thread: at some MB/s they would hold up every open stream for milliseconds.
_INLINE_CHARS = 2048

_OWN_TEMPLATE_ARGUMENTS = frozenset({"messages", "tools", "documents", "chat_template", "add_generation_prompt"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    token_ids: list[int]
    text: str | None
    """None when the client sent token ids."""


async def encode(tokenizer: ServiceTokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    if len(text) <= _INLINE_CHARS:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


async def completion_prompts(
    tokenizer: ServiceTokenizer, prompt: Any, *, add_special_tokens: bool, param: str = "prompt"
) -> list[Prompt]:
    """The `prompt` field of /v1/completions, or the field ``param`` of the same forms. Raises ApiError (400) when it
    has none of the four."""
    if isinstance(prompt, list) and prompt and not _is_token_ids(prompt):
        if len(prompt) > MAX_PROMPTS:
            raise errors.invalid(f"'{param}' has {len(prompt)} prompts, at most {MAX_PROMPTS} are taken.", param=param)
        items = prompt
    else:
        items = [prompt]
    prompts = []
    for item in items:
        if isinstance(item, str):
            ids = await encode(tokenizer, item, add_special_tokens=add_special_tokens)
            prompts.append(Prompt(token_ids=ids, text=item))
        elif isinstance(item, list) and _is_token_ids(item):
            prompts.append(Prompt(token_ids=item, text=None))
        else:
            raise _bad_prompt(prompt, param)
        if not prompts[-1].token_ids:
            raise errors.invalid(f"'{param}' must not be empty.", param=param)
    return prompts


def _is_token_ids(items: list[Any]) -> bool:
    # type() is exact: True is an int to isinstance.
    return all(type(item) is int and 0 <= item < 2**31 for item in items)


def _bad_prompt(prompt: Any, param: str) -> errors.ApiError:
    if prompt is None:
        return errors.invalid(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    message = (
        f"Invalid type for '{param}': expected a string, an array of strings, an array of token ids, "
        "or an array of token id arrays."
    )
    return errors.invalid(message, param=param, code="invalid_type")


async def chat_prompt(
    tokenizer: ServiceTokenizer,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool = True,
    template_kwargs: dict[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    calls_as_text: bool = False,
) -> Prompt:
    """Messages rendered with the model's chat template. Raises ApiError (400) for content it cannot show the model.

    calls_as_text: the template takes the arguments of earlier calls as JSON text.
    """
    if not messages:
        raise errors.invalid("'messages' must not be empty.", param="messages")
    if template_kwargs and (owned := _OWN_TEMPLATE_ARGUMENTS & template_kwargs.keys()):
        # A template sent by a client is a program sent by a client.
        message = f"'chat_template_kwargs' must not hold '{min(owned)}'."
        raise errors.invalid(message, param="chat_template_kwargs")
    plain = [_plain_message(message, index, calls_as_text=calls_as_text) for index, message in enumerate(messages)]
    try:
        text = tokenizer.apply_chat_template(
            plain,
            add_generation_prompt=add_generation_prompt,
            tools=list(tools) or None,
            **(template_kwargs or {}),
        )
    except ValueError as err:
        raise errors.invalid(str(err), param="messages") from err
    # The template writes the special tokens itself.
    return Prompt(token_ids=await encode(tokenizer, text, add_special_tokens=False), text=text)


def _plain_message(message: ChatMessage, index: int, *, calls_as_text: bool) -> dict[str, Any]:
    where = f"messages[{index}]"
    if message.role == "function" or message.function_call:
        raise errors.not_available("functions")
    if message.tool_calls and message.role != "assistant":
        raise errors.invalid(f"'{where}.tool_calls' needs role 'assistant'.", param=f"{where}.tool_calls")
    if message.audio is not None:
        raise errors.invalid("Audio is not supported by this model.", param=f"{where}.audio")
    # `developer` is OpenAI's newer word for `system`; most templates know only the older and would drop the other.
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role}
    if message.content is None and message.tool_calls:
        # Templates that join text ask whether there is none; the others expect a text.
        plain["content"] = None if calls_as_text else ""
    else:
        plain["content"] = _content_text(message.content, f"{where}.content")
    if message.tool_calls:
        plain["tool_calls"] = message_calls(message, where, as_text=calls_as_text)
    for name in ("name", "reasoning_content", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            plain[name] = value
    return plain


def _content_text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise errors.invalid(f"Missing required parameter: '{where}'.", param=where, code="missing_required_parameter")
    if not isinstance(content, list):
        message = f"Invalid type for '{where}': expected a string or an array of content parts."
        raise errors.invalid(message, param=where, code="invalid_type")
    return "\n".join(_part_text(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part_text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("image_url", "image", "input_image", "video_url", "video"):
        raise errors.invalid("Vision is not supported by this model.", param=where, code="unsupported_content")
    if kind in ("input_audio", "audio_url", "audio", "file"):
        message = f"Content of type '{kind}' is not supported by this model."
        raise errors.invalid(message, param=where, code="unsupported_content")
    if kind != "text" or not isinstance(part.get("text"), str) or len(part) != 2:
        message = f'Invalid value for \'{where}\': expected {{"type": "text", "text": string}}.'
        raise errors.invalid(message, param=where)
    text: str = part["text"]
    return text
