"""Text to token ids and back, chat templates and generation defaults, from the files of a Hugging Face directory."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from xllm_compile.runtime.chat_template import ChatTemplate, Message
from xllm_compile.runtime.resources import return_freed_memory
from xllm_compile.runtime.sampling_params import SamplingParams

GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Thread-safe. ``Tokenizer.from_directory`` reads it from a model or artifact directory."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int] = (),
        chat_template: ChatTemplate | None = None,
        generation_defaults: Mapping[str, float] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        # A file may ask for padding or truncation that only made sense in training.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._chat_template = chat_template or ChatTemplate({}, {})
        added = tokenizer.get_added_tokens_decoder()
        self.eos_token_ids: frozenset[int] = frozenset(eos_token_ids)
        """Each of them ends a completion."""
        self.special_token_ids: frozenset[int] = frozenset(at for at, token in added.items() if token.special)
        self.generation_defaults: dict[str, float] = dict(generation_defaults or {})
        """What generation_config.json says of temperature, top_p, top_k, min_p and repetition_penalty."""
        self.is_byte_level: bool = _is_byte_level(tokenizer)
        """Whether a text is the UTF-8 decoding of its tokens' bytes, one after the other."""
        self.token_bytes = lru_cache(maxsize=None)(self._token_bytes)
        self.token_text = lru_cache(maxsize=None)(self._token_text)

    @classmethod
    def from_directory(cls, directory: Path | str) -> "Tokenizer":
        """Read tokenizer.json and, where they exist, tokenizer_config.json, chat_template.jinja and
        generation_config.json. Raises ValueError on a missing or damaged file."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"{directory} has no tokenizer.json; save one with AutoTokenizer.from_pretrained(...)"
                ".save_pretrained(...), or name the directory that has it"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # The tokenizers package raises Exception itself.
        except Exception as err:
            raise ValueError(f"{path} is not a tokenizer: {err}; download or save it again") from err
        # Reading 150,000 tokens frees more than 50 MB again, which the process would keep for good.
        return_freed_memory()
        config = _read_json(directory / "tokenizer_config.json")
        generation = _read_json(directory / "generation_config.json")
        special_tokens = {name: token for name in SPECIAL_TOKENS if (token := _token_of(config.get(name)))}
        return cls(
            tokenizer,
            eos_token_ids=_eos_token_ids(tokenizer, generation, special_tokens),
            chat_template=ChatTemplate(_template_sources(directory, config), special_tokens),
            generation_defaults=_generation_defaults(generation),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    @property
    def chat_template_text(self) -> str:
        """The source of the chat template, or of all where it has several; empty where there is none."""
        return self._chat_template.text

    @property
    def vocab_size(self) -> int:
        """Smallest number above every token id, found by looking at all; the model's own may be larger, for padding."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def token_id(self, text: str) -> int | None:
        """The token that stands for exactly this text; None where there is none."""
        found: int | None = self._tokenizer.token_to_id(text)
        return found

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        content: str = self._tokenizer.to_str()
        return content

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Prompt text of a conversation; encode it with add_special_tokens=False, the template wrote them already.

        Raises ValueError when the model has no template or the template refuses the messages.
        """
        return self._chat_template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, chat_template=chat_template, **kwargs
        )

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """SamplingParams with the model's generation defaults where nothing else is said."""
        return SamplingParams(**{**self.generation_defaults, **overrides})

    def _token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token of a byte-level vocabulary; empty for ids that only pad the model's vocabulary."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        # Same rule as the ByteLevel decoder: a token with a character outside the alphabet stands for itself.
        if all(char in BYTE_OF_CHAR for char in token):
            return bytes(BYTE_OF_CHAR[char] for char in token)
        return str(token).encode()

    def _token_text(self, token_id: int) -> str:
        """Text of a token on its own, special ones included; U+FFFD where it is part of a character."""
        return self.decode([token_id], skip_special_tokens=False)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next character from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_alphabet()


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    decoder = tokenizer.decoder
    if decoder is None:
        return False
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    return [step["type"] for step in steps] == ["ByteLevel"]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ValueError(f"{path} is not JSON: {err}; download or save it again") from err
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}; download or save it again")
    return content


def _token_of(value: Any) -> str | None:
    """A special token is written as a string or as a description of an added token."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _eos_token_ids(
    tokenizer: tokenizers.Tokenizer, generation: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> list[int]:
    from_generation = generation.get("eos_token_id")
    ids = from_generation if isinstance(from_generation, list) else [from_generation]
    named = tokenizer.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
    return [token_id for token_id in (*ids, named) if token_id is not None]


def _template_sources(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return {"default": path.read_text(encoding="utf-8")}
    template = config.get("chat_template")
    if isinstance(template, list):
        return {str(entry["name"]): str(entry["template"]) for entry in template}
    return {"default": template} if isinstance(template, str) else {}


def _generation_defaults(generation: Mapping[str, Any]) -> dict[str, float]:
    defaults = {name: generation[name] for name in GENERATION_DEFAULTS if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults
