"""Renders Hugging Face chat templates: Jinja in the sandbox that the models' authors tested them in."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment, Template

Message = Mapping[str, Any]


class ChatTemplate:
    """One model's template or, where it has several, its named ones. Jinja is imported and run on first use."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._compiled: dict[str, Template] = {}

    @property
    def text(self) -> str:
        """All sources, for those who want to know what the model writes."""
        return "\n".join(self._sources.values())

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Prompt text. chat_template replaces the model's own; kwargs reach the template (enable_thinking, ...).

        Raises ValueError on messages that the template refuses.
        """
        import jinja2

        source = chat_template if chat_template is not None else self._choose(has_tools=bool(tools))
        try:
            return self._template(source).render(
                messages=[_plain_content(message) for message in messages],
                tools=tools,
                documents=kwargs.pop("documents", None),
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
                **kwargs,
            )
        # TypeError: the template met a value of a kind it does not expect, such as a message without content.
        except (jinja2.TemplateError, TypeError) as err:
            raise ValueError(f"the chat template refused the messages: {err}; change them or the template") from err

    def _choose(self, *, has_tools: bool) -> str:
        if has_tools and "tool_use" in self._sources:
            return self._sources["tool_use"]
        if "default" in self._sources:
            return self._sources["default"]
        if not self._sources:
            raise ValueError(
                "the model has no chat template; put chat_template.jinja beside tokenizer.json, pass chat_template=, "
                "or send a plain prompt"
            )
        raise ValueError(
            f"the model has chat templates {sorted(self._sources)} and none named 'default'; "
            "pass one of them as chat_template="
        )

    def _template(self, source: str) -> "Template":
        if source not in self._compiled:
            self._compiled[source] = make_environment().from_string(source)
        return self._compiled[source]


def make_environment() -> "Environment":
    """The environment that transformers renders chat templates in (transformers/utils/chat_template_utils.py)."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what the assistant wrote, for training; here it is just its content."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML characters, which models never saw in training.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _plain_content(message: Message) -> Message:
    """OpenAI's list of text parts as one string, which is what text templates expect."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ValueError(f"content part of type {kind!r} is not supported by a text model; send type 'text' only")
        texts.append(str(part.get("text", "")))
    return {**message, "content": "\n".join(texts)}
