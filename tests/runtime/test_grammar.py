"""Structured outputs compiled to masks over tokens, and a sequence's way through them."""

import json
import threading

import numpy as np
import pytest

from xllm_compile.benchmarks.random_schemas import random_schema
from xllm_compile.runtime import grammar
from xllm_compile.runtime.grammar import GrammarCompiler
from xllm_compile.runtime.mask_worker import MaskWorker
from xllm_compile.runtime.structured_output import MAX_SOURCE_CHARS, ReasoningText, StructuredOutput
from xllm_compile.runtime.token_matcher import GrammarError, TokenMatcher
from xllm_compile.runtime.tokenizer import Tokenizer

OPTIONAL_THOUGHTS = ReasoningText(start="<think>", end="</think>")
OPEN_THOUGHTS = ReasoningText(start="<think>", end="</think>", is_open=True)
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    # Models pad their vocabulary beyond the tokenizer's.
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + 5)


def follow(compiler: GrammarCompiler, tokenizer: Tokenizer, structured: StructuredOutput, text: str) -> str:
    """The part of the text that the grammar allows, and "." where it may end there."""
    matcher = compiler.compile(structured).matcher()
    seen: list[int] = []
    for token_id in tokenizer.encode(text):
        if not matcher.mask().allowed[token_id]:
            return tokenizer.decode(seen, skip_special_tokens=False)
        matcher.accept(token_id)
        seen.append(token_id)
    may_end = all(matcher.mask().allowed[token_id] for token_id in tokenizer.eos_token_ids)
    return tokenizer.decode(seen, skip_special_tokens=False) + "." * may_end


@pytest.mark.parametrize(
    ("structured", "text"),
    [
        (StructuredOutput.json_schema(POINT), '{"x": -1, "y":\n 20}'),
        (StructuredOutput.json_schema(POINT), json.dumps({"x": 1, "y": 2}, indent=4)),
        (StructuredOutput.json_schema(json.dumps(POINT)), '{"x":1,"y":2}'),
        (StructuredOutput.json_schema(True), '[1, {"a": null}]'),
        (StructuredOutput.json_schema(POINT).compact(), '{"x":1,"y":2}'),
        (StructuredOutput.json_schema(True).compact(), '[1,{"a":null}]'),
        (StructuredOutput(kind="json_object"), '{"any": [1, {}]}'),
        (StructuredOutput(kind="regex", source=r"a/b\d{2,}|\w+é"), "a/b123"),
        (StructuredOutput.choice(["yes", 'no\n"really"']), 'no\n"really"'),
        (StructuredOutput(kind="grammar", source='start: "a" | b\nb: /[0-9]/ "x"'), "3x"),
        (StructuredOutput(kind="grammar", source='root ::= "a" | b\nb ::= [0-9] "x"'), "3x"),
        (StructuredOutput.choice(["12"], OPTIONAL_THOUGHTS), "12"),
        (StructuredOutput.choice(["12"], OPTIONAL_THOUGHTS), "<think>\n1 </b> \u4f60 12?</think>\n\n12"),
        (StructuredOutput.choice(["12"], OPTIONAL_THOUGHTS), "\n<think></think>12"),
        (StructuredOutput.choice(["12"], OPEN_THOUGHTS), "hm <think> so</think>\n\n12"),
    ],
)
def test_text_that_fits_is_allowed_to_its_end(
    compiler: GrammarCompiler, tokenizer: Tokenizer, structured: StructuredOutput, text: str
) -> None:
    assert follow(compiler, tokenizer, structured, text) == text + "."


@pytest.mark.parametrize("text", ['{ "x"', '{"x" :', '{"x": 1'])
def test_compact_json_has_no_blanks_between_its_tokens(
    compiler: GrammarCompiler, tokenizer: Tokenizer, text: str
) -> None:
    structured = StructuredOutput.json_schema(POINT).compact()
    assert follow(compiler, tokenizer, structured, text) == text.split(" ")[0]
    # What a request writes there itself is no option.
    structured = StructuredOutput.json_schema({**POINT, "x-guidance": {"whitespace_pattern": "x*"}})
    assert follow(compiler, tokenizer, structured, text) in (text, text + " ")


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutput.json_schema(POINT),
        StructuredOutput(kind="regex", source=r"(a|bc?)*"),
        StructuredOutput.choice(["12", "1x"], OPTIONAL_THOUGHTS),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_a_token_is_allowed_where_the_mask_has_it_whatever_was_asked_before(
    compiler: GrammarCompiler, tokenizer: Tokenizer, structured: StructuredOutput, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    asked, masked = compiler.compile(structured).matcher(), compiler.compile(structured).matcher()
    for _ in range(40):
        allowed = masked.mask().allowed
        # The first and the last one tried are allowed, and not always the one that comes.
        ways = np.flatnonzero(allowed)
        tokens = [*rng.choice(ways, 2), *rng.integers(0, len(allowed), 4), *tokenizer.eos_token_ids, rng.choice(ways)]
        for token_id in map(int, tokens):
            row = rng.random(len(allowed), dtype=np.float32)
            row[token_id] = 2.0
            assert asked.choose(row, token_id) == np.where(allowed, row, -1.0).argmax()
        token_id = int(rng.choice(ways) if rng.random() < 0.5 else tokens[-1])
        for matcher in (asked, masked):
            matcher.accept(token_id)
    assert (asked.mask().allowed == masked.mask().allowed).all()


def _allows(matcher: TokenMatcher, token_id: int) -> bool:
    row = np.zeros(len(matcher.copy().mask().allowed), dtype=np.float32)
    row[token_id] = 1.0
    return matcher.choose(row, token_id) == token_id


def test_drafts_are_followed_up_to_the_first_token_that_is_refused(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    text = '{"x": 1, "y": 2}'
    tokens, eos = tokenizer.encode(text), next(iter(tokenizer.eos_token_ids))
    matcher = compiler.compile(StructuredOutput.json_schema(POINT)).matcher()
    assert matcher.num_allowed([*tokens, eos, tokens[0]]) == len(tokens)
    (wrong,) = tokenizer.encode("z")
    for size in range(len(tokens)):
        assert matcher.num_allowed([*tokens[:size], wrong, *tokens[size:]]) == size
    # Asking moves nothing.
    matcher.accept(tokens[0])
    assert _allows(matcher, tokens[1]) and matcher.num_allowed(tokens[1:]) == len(tokens) - 1


def test_what_a_grammar_forces_is_said_until_there_is_a_choice(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(StructuredOutput(kind="regex", source="abc(defgh|x)ijkl")).matcher()
    assert tokenizer.decode(matcher.forced()).startswith("ab")
    for token_id in tokenizer.encode("abcx"):
        matcher.accept(token_id)
    assert tokenizer.decode(matcher.forced()).startswith("ij")
    for token_id in tokenizer.encode("ijkl"):
        matcher.accept(token_id)
    matcher.accept(next(iter(tokenizer.eos_token_ids)))
    assert matcher.forced() == [] and matcher.num_allowed(tokenizer.encode("a")) == 0


@pytest.mark.parametrize("seed", range(8))
def test_masks_allow_nothing_else_where_a_text_is_forced(compiler: GrammarCompiler, seed: int) -> None:
    structured = StructuredOutput.json_schema(random_schema(seed))
    asked, masked = compiler.compile(structured).matcher(), compiler.compile(structured).matcher()
    rng = np.random.default_rng(seed)
    rest: list[int] = []
    for _ in range(150):
        allowed = np.flatnonzero(masked.mask().allowed).tolist()
        forced = asked.forced()
        assert forced[: len(rest)] == rest
        token_id = int(rng.choice(allowed))
        if forced:
            assert allowed == forced[:1]
        rest = forced[1:]
        for matcher in (asked, masked):
            matcher.accept(token_id)


def test_a_greedy_row_does_not_spell_a_forced_text_its_own_way(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    structured = StructuredOutput.choice(["the end of the story"])
    whole = tokenizer.encode("the end of the story")
    # The mask of the beginning is known before anybody asks.
    at = next(at for at, token_id in enumerate(whole) if at and len(tokenizer.decode([token_id])) > 1)
    (other,) = tokenizer.encode(tokenizer.decode([whole[at]])[0])
    asked, masked = compiler.compile(structured).matcher(), compiler.compile(structured).matcher()
    for matcher in (asked, masked):
        for token_id in whole[:at]:
            matcher.accept(token_id)
    row = np.zeros(len(masked.mask().allowed), dtype=np.float32)
    row[other] = 1.0
    assert asked.choose(row, other) == masked.choose(row, other) == whole[at] != other


def test_what_was_tried_and_did_not_come_leaves_no_trace(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(StructuredOutput.choice(["12", "1x"])).matcher()
    (one,), (two,), (other,) = (tokenizer.encode(text) for text in ("1", "2", "x"))
    matcher.accept(one)
    assert _allows(matcher, two)
    matcher.accept(other)
    assert not _allows(matcher, two)
    assert np.flatnonzero(matcher.mask().allowed).tolist() == sorted(tokenizer.eos_token_ids)


@pytest.mark.parametrize(
    ("structured", "text", "allowed"),
    [
        (StructuredOutput.json_schema(POINT), '{"x": 1, "z": 2}', '{"x": 1, "'),
        (StructuredOutput.json_schema(POINT), '{"x": 1\n\n', '{"x": 1\n'),
        (StructuredOutput.json_schema(POINT), '{"x":   1', '{"x": '),
        (StructuredOutput.json_schema(POINT), '{"x": "1"}', '{"x": '),
        (StructuredOutput.choice(["yes", "no"]), "yea", "ye"),
        (StructuredOutput.choice(["12"], OPEN_THOUGHTS), "12", "12"),
        (StructuredOutput.choice(["12"], OPEN_THOUGHTS), "x</think>no", "x</think>"),
        (StructuredOutput.choice(["12"], OPTIONAL_THOUGHTS), "so</think>12", ""),
    ],
)
def test_text_that_does_not_fit_is_forbidden_where_it_goes_wrong(
    compiler: GrammarCompiler, tokenizer: Tokenizer, structured: StructuredOutput, text: str, allowed: str
) -> None:
    assert follow(compiler, tokenizer, structured, text) == allowed


@pytest.mark.parametrize(
    ("structured", "message"),
    [
        (StructuredOutput(kind="regex", source="["), "unclosed character class"),
        (StructuredOutput(kind="regex", source="(?=a)b"), "look-around"),
        (StructuredOutput(kind="regex", source=r"[^\s\S]"), "no text matches"),
        (StructuredOutput(kind="regex", source="((a{0,100}){0,100}){0,100}"), "too many expressions"),
        (StructuredOutput(kind="grammar", source="start: nothing"), 'unknown name: "nothing"'),
        (StructuredOutput(kind="grammar", source="root ::= ["), "the grammar cannot be used"),
        (StructuredOutput.json_schema({"type": "strin"}), "Invalid type: strin"),
        (StructuredOutput.json_schema({"not": {}}), 'Unimplemented keys: ["not"]'),
        (StructuredOutput.json_schema({"$ref": "#/$defs/x"}), "does not exist"),
        (StructuredOutput.json_schema({"type": "string", "minLength": 3, "maxLength": 2}), "Unsatisfiable"),
        (StructuredOutput.json_schema({"type": "string", "allOf": [{"pattern": f"a{i}.*b"} for i in range(20)]}), ""),
    ],
)
def test_what_cannot_be_compiled_is_an_error_that_names_the_reason(
    compiler: GrammarCompiler, structured: StructuredOutput, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^the {structured.kind} cannot be used: ") as raised:
        compiler.compile(structured)
    assert message in str(raised.value)


def test_a_long_regex_is_not_repeated_in_its_error(compiler: GrammarCompiler) -> None:
    structured = StructuredOutput(kind="regex", source="(x|" * 5000 + "y" + ")" * 5000)
    with pytest.raises(ValueError, match=r"(?s)the regex cannot be used: .*nested parentheses") as raised:
        compiler.compile(structured)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    "make",
    [
        lambda: StructuredOutput.json_schema("{"),
        lambda: StructuredOutput.json_schema("[" * 100_000),
        lambda: StructuredOutput.json_schema(None),
        lambda: StructuredOutput.choice([]),
        lambda: StructuredOutput.choice("yes"),
        lambda: StructuredOutput.choice(["yes", ""]),
        lambda: StructuredOutput(kind="regex", source="a" * (MAX_SOURCE_CHARS + 1)),
    ],
)
def test_malformed_sources_are_refused_before_any_work(make) -> None:
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize("regex", ["(a+)+b", "(a|a)*b", "(.*a){200}b", "(a|b)*a(a|b){20}", "(x+x+)+y"])
def test_a_regex_that_would_backtrack_for_ages_compiles_and_matches(
    compiler: GrammarCompiler, tokenizer: Tokenizer, regex: str
) -> None:
    text = {"y": "x" * 60 + "y", "b": "a" * 220 + "b", "}": "a" * 60}[regex[-1]]
    assert follow(compiler, tokenizer, StructuredOutput(kind="regex", source=regex), text) == text + "."


def test_a_special_token_that_opens_reasoning_is_matched_by_its_id(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    thoughts = ReasoningText(start="<|im_start|>", end="<|im_start|>")
    text = "<|im_start|>hm<|im_start|>12"
    assert follow(compiler, tokenizer, StructuredOutput.choice(["12"], thoughts), text) == text + "."


def test_grammars_are_kept_by_content_and_the_oldest_go(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "MAX_CACHED_GRAMMARS", 2)
    first = compiler.compile(StructuredOutput.choice(["a"]))
    second = compiler.compile(StructuredOutput.choice(["b"]))
    assert compiler.compile(StructuredOutput.choice(["a"])) is first
    compiler.compile(StructuredOutput.choice(["c"]))
    assert compiler.compile(StructuredOutput.choice(["a"])) is first
    assert compiler.compile(StructuredOutput.choice(["b"])) is not second


def test_matchers_of_one_grammar_are_independent(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    compiled = compiler.compile(StructuredOutput.choice(["ab", "cd"]))
    one, other = compiled.matcher(), compiled.matcher()
    (a,) = tokenizer.encode("a")
    one.accept(a)
    assert not one.mask().allowed[a]
    assert other.mask().allowed[a]


def test_after_the_end_only_the_end_of_sequence_may_come(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(StructuredOutput.choice(["a"])).matcher()
    matcher.accept(*tokenizer.encode("a"))
    for _ in range(3):
        assert set(np.flatnonzero(matcher.mask().allowed)) == tokenizer.eos_token_ids
        matcher.accept(min(tokenizer.eos_token_ids))


def test_a_forbidden_token_is_an_error_from_then_on(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(StructuredOutput.choice(["a"])).matcher()
    matcher.accept(*tokenizer.encode("b"))
    matcher.prepare()
    for _ in range(2):
        with pytest.raises(GrammarError, match="not allowed"):
            matcher.mask()


def test_a_padded_token_is_never_allowed(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    mask = compiler.compile(StructuredOutput(kind="regex", source=r"(?s:.*)")).matcher().mask()
    assert len(mask.allowed) == tokenizer.vocab_size + 5
    assert not mask.allowed[tokenizer.vocab_size :].any()
    # Other special tokens are no text either.
    assert set(tokenizer.special_token_ids) & set(np.flatnonzero(mask.allowed)) == tokenizer.eos_token_ids


def test_masks_are_prepared_in_another_thread(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    worker = MaskWorker()
    matchers = [compiler.compile(StructuredOutput.json_schema(POINT)).matcher() for _ in range(4)]
    for matcher in matchers:
        matcher.accept(*tokenizer.encode("{"))
    worker.prepare([None, *matchers])
    num_threads = threading.active_count()
    worker.close()
    assert threading.active_count() == num_threads - 1
    assert all(matcher._mask is not None for matcher in matchers)


def test_without_an_end_of_sequence_token_there_is_no_structured_output(tokenizer: Tokenizer) -> None:
    endless = Tokenizer(tokenizer._tokenizer)
    with pytest.raises(ValueError, match="end-of-sequence"):
        GrammarCompiler(endless, endless.vocab_size).compile(StructuredOutput(kind="json_object"))
