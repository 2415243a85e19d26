"""Compiles structured outputs to grammars over the model's tokens, with llguidance.

Compiling takes milliseconds and lets other threads run; what a grammar may cost, to compile and per token, is bounded
by `_limits`, so that no regular expression or schema can stall the engine. Compiled grammars are kept by content.
llguidance's own view of the tokenizer is made when the first request asks: 0.2 s for 152 thousand tokens.
"""

import json
import threading
from collections import OrderedDict
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from xllm_compile.runtime.structured_output import (
    COMPACT_JSON,
    JSON_OPTIONS_KEY,
    ReasoningText,
    StructuredOutput,
    schema_object,
)
from xllm_compile.runtime.token_matcher import GrammarError, TokenMask, TokenMatcher

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from xllm_compile.runtime.tokenizer import Tokenizer

MAX_CACHED_GRAMMARS = 256
# What is kept at each end of a message of the library's.
_REASON_CHARS = 400
NUM_PROBE_TOKENS = 64

# One space, or a line end and an indentation: enough for every usual layout. With more, a model that is undecided goes
# on writing blanks between two tokens of JSON, up to its length limit.
JSON_OPTIONS = {"whitespace_pattern": r" |\n[ \t]{0,32}"}


class SpecialTokens(Protocol):
    """What of a tokenizer says which texts are special tokens."""

    special_token_ids: frozenset[int]

    def token_id(self, text: str) -> int | None: ...


class Grammar:
    """One compiled structured output. Immutable; sequences take their own matcher from it."""

    def __init__(self, prototype: TokenMatcher) -> None:
        self._prototype = prototype

    def matcher(self) -> TokenMatcher:
        return self._prototype.copy()


class GrammarCompiler:
    """Thread-safe."""

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int) -> None:
        """vocab_size is the model's: masks have that many tokens."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._guidance_lock = threading.Lock()
        self._guidance_tokenizer: LLTokenizer | None = None
        self._kept_masks: dict[bytes, TokenMask] = {}
        self._grammars: OrderedDict[StructuredOutput, Grammar] = OrderedDict()

    def compile(self, structured: StructuredOutput) -> Grammar:
        """Raises ValueError when it is malformed, not supported, or too costly."""
        with self._lock:
            if structured in self._grammars:
                self._grammars.move_to_end(structured)
                return self._grammars[structured]
        grammar = self._compile(structured)
        with self._lock:
            self._grammars[structured] = grammar
            while len(self._grammars) > MAX_CACHED_GRAMMARS:
                self._grammars.popitem(last=False)
        return grammar

    def _compile(self, structured: StructuredOutput) -> Grammar:
        from llguidance import LLMatcher

        if not self._tokenizer.eos_token_ids:
            raise ValueError("structured output needs an end-of-sequence token, and the model's tokenizer names none")
        if structured.reasoning is not None:
            # The probe below would walk through the reasoning alone.
            self.compile(replace(structured, reasoning=None))
        source = json.dumps({"grammars": _grammars(structured, self._tokenizer)})
        matcher = LLMatcher(self._guidance(), source, log_level=0, limits=_limits())
        self._check(structured, matcher)
        prototype = TokenMatcher(matcher, self._vocab_size, self._tokenizer.eos_token_ids, self._kept_masks)
        # The first mask is needed anyway, and some errors show only with it.
        prototype.prepare()
        self._check(structured, matcher)
        if structured.kind in ("regex", "grammar") and structured.reasoning is None:
            _probe(structured, prototype.copy(), sorted(self._tokenizer.eos_token_ids))
        return Grammar(prototype)

    def _check(self, structured: StructuredOutput, matcher: "LLMatcher") -> None:
        if matcher.is_error():
            reason = matcher.get_error().replace("<non-verbose/>", "").strip()
            if structured.kind != "grammar":
                # The place in a grammar that the client has never seen.
                reason = reason.partition("\n   1 |")[0]
            if reason.startswith("NoExtension"):
                reason = "no text matches it"
            raise ValueError(f"the {structured.kind} cannot be used: {_clipped(reason)}")

    def _guidance(self) -> "LLTokenizer":
        with self._guidance_lock:
            if self._guidance_tokenizer is None:
                self._guidance_tokenizer = _guidance_tokenizer(self._tokenizer, self._vocab_size)
            return self._guidance_tokenizer


def _clipped(reason: str) -> str:
    """Without the middle of what is very long: the library repeats what it was given, and says why last."""
    if len(reason) <= 2 * _REASON_CHARS:
        return reason
    return f"{reason[:_REASON_CHARS]} ... {reason[-_REASON_CHARS:]}"


def _probe(structured: StructuredOutput, matcher: TokenMatcher, eos_token_ids: list[int]) -> None:
    """Walk a few tokens: nested counts such as (((a{0,99}){0,99}){0,99} pass the first mask and fail later ones."""
    try:
        for _ in range(NUM_PROBE_TOKENS):
            going_on = np.setdiff1d(np.flatnonzero(matcher.mask().allowed), eos_token_ids)
            if not len(going_on):
                return
            matcher.accept(int(going_on[0]))
    except GrammarError as err:
        raise ValueError(f"the {structured.kind} cannot be used: {err}; simplify it") from None


def _limits() -> "LLParserLimits":
    """llguidance's defaults: about 20 ms for a grammar's start and 15 ms for a mask. Its longer messages go."""
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)


def _guidance_tokenizer(tokenizer: "Tokenizer", vocab_size: int) -> "LLTokenizer":
    from llguidance import LLTokenizer, TokenizerWrapper

    eos_token_ids = sorted(tokenizer.eos_token_ids)
    slices = LLTokenizer.json_slices()
    if not tokenizer.is_byte_level:
        return LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=eos_token_ids, slices=slices)
    # A third of the time that it takes to read tokenizer.json again.
    return LLTokenizer(
        TokenizerWrapper(_TokenBytes(tokenizer, vocab_size)),
        n_vocab=vocab_size,
        eos_token=eos_token_ids,
        slices=slices,
    )


class _TokenBytes:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int) -> None:
        self.eos_token_id = min(tokenizer.eos_token_ids)
        # An end-of-sequence token is no text, whatever tokenizer.json says of it.
        self.special_token_ids = sorted(tokenizer.special_token_ids | tokenizer.eos_token_ids)
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self._tokenizer = tokenizer
        # Asked for the texts that a grammar forces: few, again and again.
        self._encoded = lru_cache(maxsize=1024)(self._encode)

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encoded(text)

    def _encode(self, text: bytes | str) -> list[int]:
        decoded = text.decode() if isinstance(text, bytes) else text
        return self._tokenizer.encode(decoded, add_special_tokens=False)


def _grammars(structured: StructuredOutput, tokenizer: "Tokenizer") -> list[dict[str, Any]]:
    """What llguidance calls a grammar is a list of them; the text begins in the first."""
    answer = {"name": "answer", **_answer(structured)}
    if structured.reasoning is None:
        return [answer]
    return [{"lark_grammar": _reasoning_grammar(structured.reasoning, tokenizer)}, answer]


def _answer(structured: StructuredOutput) -> dict[str, Any]:
    source = structured.source
    match structured.kind:
        case "json_schema" | "json_object":
            return {"json_schema": with_json_options(structured.schema or {})}
        case "regex":
            from llguidance import LLMatcher

            lark: str = json.loads(LLMatcher.grammar_from_regex(source))["grammars"][0]["lark_grammar"]
            return {"lark_grammar": lark}
        case "choice":
            return {"lark_grammar": "start: " + " | ".join(json.dumps(choice) for choice in json.loads(source))}
        case "grammar":
            return {"lark_grammar": _lark(source)}


def with_json_options(schema: dict[str, Any] | bool) -> dict[str, Any]:
    """A JSON schema as the grammar library is to read it."""
    schema = schema_object(schema)
    is_compact = schema.get(JSON_OPTIONS_KEY) == COMPACT_JSON
    return {**schema, JSON_OPTIONS_KEY: COMPACT_JSON if is_compact else JSON_OPTIONS}


def _lark(source: str) -> str:
    """llama.cpp's GBNF, which has ::= where Lark has a colon, becomes Lark."""
    if "::=" not in source:
        return source
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(source)
    except Exception as err:
        raise ValueError(f"the grammar cannot be used: {err}") from err


def _reasoning_grammar(reasoning: ReasoningText, tokenizer: "Tokenizer") -> str:
    """Thoughts end where their end first appears; a few blanks may follow, as the models write them."""
    begin = "" if reasoning.is_open else f"(BLANK? {literal(reasoning.start, tokenizer)} "
    close = "" if reasoning.is_open else ")?"
    end_id = _special_id(reasoning.end, tokenizer)
    if end_id is None:
        thoughts = f"thoughts[suffix={json.dumps(reasoning.end)}]: /(?s:.*)/"
    else:
        thoughts = f"thoughts: /(?s:.*)/ <[{end_id}]>"
    return f"start: {begin}thoughts BLANK?{close} @answer\nBLANK: /[\\n ]{{1,4}}/\n{thoughts}\n"


def literal(text: str, tokenizer: "SpecialTokens") -> str:
    """The text in a Lark grammar, which names special tokens by their id."""
    special_id = _special_id(text, tokenizer)
    return json.dumps(text) if special_id is None else f"<[{special_id}]>"


def _special_id(text: str, tokenizer: "SpecialTokens") -> int | None:
    token_id = tokenizer.token_id(text)
    return token_id if token_id in tokenizer.special_token_ids else None
