import itertools

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers

from tests.runtime.fakes import EOS, train_byte_level
from xllm_compile.runtime.detokenizer import Detokenizer, TextDecoder, detokenize, make_detokenizer
from xllm_compile.runtime.tokenizer import Tokenizer

BYTE_LEVEL = Tokenizer(train_byte_level())


def sentencepiece_like() -> Tokenizer:
    """The shape of Llama 2's and Gemma's vocabularies: pieces with a visible space, single bytes for the rest."""
    pieces = [
        "<unk>",
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"abcdefgh",
        "\u2581a",
        "bc",
        "\u4f60",
    ]
    vocabulary = {piece: at for at, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("\u2581", "a"), ("b", "c")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return Tokenizer(tokenizer)


SENTENCEPIECE = sentencepiece_like()


def pushed(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool = True) -> list[str]:
    detokenizer = make_detokenizer(tokenizer, skip_special_tokens=skip_special_tokens, stop=(), include_stop=False)
    parts = []
    for token_id in ids:
        detokenizer.push(token_id)
        parts.append(detokenizer.take_new())
    detokenizer.finish()
    parts.append(detokenizer.take_new())
    assert detokenizer.text == "".join(parts)
    return parts


class Chunks:
    """A text decoder whose tokens are indices into a list of texts."""

    def __init__(self, chunks: list[str]) -> None:
        self.chunks = chunks

    def push(self, token_id: int) -> str:
        return self.chunks[token_id]

    def flush(self) -> str:
        return ""


def test_which_decoder_serves_which_vocabulary() -> None:
    assert BYTE_LEVEL.is_byte_level
    assert not SENTENCEPIECE.is_byte_level


@given(st.text())
def test_byte_level_text_comes_back_token_by_token(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    parts = pushed(BYTE_LEVEL, ids, skip_special_tokens=False)
    assert "".join(parts) == text
    # A replacement character is shown only where the text itself has one.
    assert sum(part.count("\ufffd") for part in parts) == text.count("\ufffd")


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1)), st.booleans())
def test_any_byte_level_tokens_give_what_decoding_them_at_once_gives(ids: list[int], skips: bool) -> None:
    expected = BYTE_LEVEL.decode(ids, skip_special_tokens=skips)
    assert "".join(pushed(BYTE_LEVEL, ids, skip_special_tokens=skips)) == expected


@given(st.text(st.sampled_from("abcdefgh \u4f60\u597d\u00e9\U0001f600\n"), max_size=30))
def test_byte_fallback_text_comes_back_token_by_token(text: str) -> None:
    ids = SENTENCEPIECE.encode(text, add_special_tokens=False)
    assert "".join(pushed(SENTENCEPIECE, ids)) == text


@given(st.lists(st.integers(0, SENTENCEPIECE.vocab_size - 1), max_size=40))
def test_any_byte_fallback_tokens_are_survived_without_hoarding(ids: list[int]) -> None:
    parts = pushed(SENTENCEPIECE, ids)
    assert len(parts) == len(ids) + 1


def test_characters_across_tokens_wait_until_they_are_whole() -> None:
    ids = BYTE_LEVEL.encode("\U0001f984", add_special_tokens=False)
    assert len(ids) > 1
    parts = pushed(BYTE_LEVEL, ids)
    assert parts[:-2] == [""] * (len(ids) - 1) and parts[-2] == "\U0001f984"


def test_a_character_cut_at_the_end_becomes_one_replacement() -> None:
    ids = BYTE_LEVEL.encode("a\U0001f984", add_special_tokens=False)
    assert "".join(pushed(BYTE_LEVEL, ids[:-1])) == "a\ufffd"


def test_special_tokens_and_ids_beyond_the_vocabulary() -> None:
    eos = BYTE_LEVEL.encode(EOS)[0]
    ids = [*BYTE_LEVEL.encode("a"), eos, 100_000, *BYTE_LEVEL.encode("b")]
    assert detokenize(BYTE_LEVEL, ids) == "ab"
    assert detokenize(BYTE_LEVEL, ids, skip_special_tokens=False) == f"a{EOS}b"


def run_chunks(chunks: list[str], stop: list[str], include_stop: bool = False) -> tuple[list[str], str | None]:
    decoder: TextDecoder = Chunks(chunks)
    detokenizer = Detokenizer(decoder, stop=stop, include_stop=include_stop)
    shown = []
    for at in range(len(chunks)):
        found = detokenizer.push(at)
        shown.append(detokenizer.take_new())
        if found is not None:
            return shown, found
    found = detokenizer.finish()
    return [*shown, detokenizer.take_new()], found


@pytest.mark.parametrize("chunks", [["one EN", "D two"], ["one E", "N", "D"], ["one END two"], list("one END two")])
def test_a_stop_string_is_found_and_cut_across_tokens(chunks: list[str]) -> None:
    shown, found = run_chunks(chunks, ["END"])
    assert ("".join(shown), found) == ("one ", "END")
    shown, found = run_chunks(chunks, ["END"], include_stop=True)
    assert ("".join(shown), found) == ("one END", "END")


def test_text_that_may_become_a_stop_string_is_held_back_and_given_out() -> None:
    assert run_chunks(["a EN", "", "X"], ["END"]) == (["a ", "", "ENX", ""], None)
    assert run_chunks(["a EN"], ["END"]) == (["a ", "EN"], None)
    assert run_chunks(["aab", "aab", "aac"], ["aabaac"]) == (["", "aab", ""], "aabaac")


def test_of_stop_strings_ending_together_the_longest_counts() -> None:
    assert run_chunks(["xxabc"], ["c", "abc", "bc"]) == (["xx"], "abc")


def test_a_stop_string_inside_a_longer_candidate_ends_first() -> None:
    assert run_chunks(["xab"], ["abc", "b"]) == (["xa"], "b")


def test_no_stop_is_found_in_tokens_that_may_not_stop() -> None:
    detokenizer = Detokenizer(Chunks(["END", "EN", "D", "END"]), stop=["END"])
    assert detokenizer.push(0, may_stop=False) is None
    assert detokenizer.push(1, may_stop=False) is None
    assert detokenizer.push(2) is None
    assert detokenizer.push(3) == "END"
    assert detokenizer.text == "ENDEND"


@given(
    text=st.text("ab", max_size=40),
    cuts=st.sets(st.integers(0, 40)),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    include_stop=st.booleans(),
)
def test_stopping_does_not_depend_on_how_text_is_cut(
    text: str, cuts: set[int], stop: list[str], include_stop: bool
) -> None:
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    chunks = [text[begin:end] for begin, end in itertools.pairwise(borders)]
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(one) for one in stop)]
    if ends:
        expected_stop = max((one for one in stop if text[: ends[0]].endswith(one)), key=len)
        expected = text[: ends[0]] if include_stop else text[: ends[0] - len(expected_stop)]
    else:
        expected_stop, expected = None, text
    shown, found = run_chunks(chunks, stop, include_stop)
    assert ("".join(shown), found) == (expected, expected_stop)
    for at in range(1, len(shown)):
        assert expected.startswith("".join(shown[:at]))
