"""Reasoning and tool calls in the text of each family, and the same however the text is cut."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compile.runtime.structured_output import ReasoningText
from xllm_compile.scheduler.chat_parser import ChatParser, MessageDelta, MessageFormat, merge_calls, parse_message
from xllm_compile.scheduler.tool_formats import FORMATS
from xllm_compile.scheduler.tool_parser import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR

THINK = ReasoningText(start="<think>", end="</think>")
PARAMETERS = {
    "weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "time": {"type": "object", "properties": {}},
}


def expect(tools=None, *, reasoning=None, **options):
    return MessageFormat(tools=FORMATS[tools] if tools else None, reasoning=reasoning, parameters=PARAMETERS, **options)


def calls_of(found: MessageDelta):
    return [(call.name, json.loads(call.arguments)) for call in found.tool_calls]


def deepseek_v3(*calls):
    bodies = [
        f"{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n{arguments}\n```{CALL_END}" for name, arguments in calls
    ]
    return CALLS_BEGIN + "\n".join(bodies) + CALLS_END


def deepseek_v31(*calls):
    bodies = [f"{CALL_BEGIN}{name}{SEPARATOR}{arguments}{CALL_END}" for name, arguments in calls]
    return CALLS_BEGIN + "".join(bodies) + CALLS_END


WEATHER = '{"city": "K\\u00f6ln \\"}\\" {<", "days": 3}'
WRITTEN = {
    "hermes": (
        f'<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    ),
    "llama3_json": f'{{"name": "weather", "parameters": {WEATHER}}}; {{"name": "time", "parameters": {{}}}}',
    "qwen3_coder": (
        '<tool_call>\n<function=weather>\n<parameter=city>\nKöln "}" {<\n</parameter>\n<parameter=days>\n3\n'
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=time>\n</function>\n</tool_call>"
    ),
    "deepseek_v3": deepseek_v3(("weather", WEATHER), ("time", "{}")),
    "deepseek_v31": deepseek_v31(("weather", WEATHER), ("time", "{}")),
}
CALLED = [("weather", {"city": 'Köln "}" {<', "days": 3}), ("time", {})]


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_calls_of_every_format(name):
    found = parse_message(WRITTEN[name], expect(name))
    assert calls_of(found) == CALLED
    assert found.content == ""
    assert [call.index for call in found.tool_calls] == [0, 1]
    assert len({call.id for call in found.tool_calls}) == 2


@pytest.mark.parametrize("name", sorted(set(WRITTEN) - {"llama3_json"}))
def test_content_around_calls(name):
    found = parse_message(f" Let me look.\n\n{WRITTEN[name]}\nDone.", expect(name))
    assert calls_of(found) == CALLED
    assert found.content == " Let me look.\nDone."


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_one_call_only_where_one_is_wanted(name):
    assert calls_of(parse_message(WRITTEN[name], expect(name, is_parallel=False))) == CALLED[:1]


def test_llamas_calls_after_its_tag_and_after_text():
    call = '{"name": "time", "parameters": {"zone": "UTC"}}'
    for text in (call, f"\n<|python_tag|>{call}", f" {call}\n"):
        assert calls_of(parse_message(text, expect("llama3_json"))) == [("time", {"zone": "UTC"})]
    found = parse_message(f"Now: <|python_tag|>{call}", expect("llama3_json"))
    assert (found.content, calls_of(found)) == ("Now:", [("time", {"zone": "UTC"})])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "plain text, 3 < 4\n"),
        ("hermes", "about <tool_call> as such"),
        ("hermes", "<tool_call>\n[1, 2]\n</tool_call>"),
        ("hermes", '<tool_call>\n{"arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"na'),
        ("llama3_json", '{"name": "Bob", "age": 3}'),
        ("llama3_json", '  {"city": "Bonn"} and more'),
        ("llama3_json", "{x"),
        ("llama3_json", "<b>bold</b>"),
        ("qwen3_coder", "<tool_call>\n<fun=weather>"),
        ("deepseek_v3", f"{CALLS_BEGIN}nothing"),
        ("deepseek_v3", f"{CALLS_BEGIN}{CALL_BEGIN}weather"),
    ],
)
def test_what_is_no_call_is_content(name, text):
    found = parse_message(text, expect(name))
    assert found.tool_calls == []
    assert found.content.strip() == text.replace(CALLS_BEGIN + "nothing", "nothing").strip()


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Bo', '{"city": "Bo'),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": 1}, oops</tool_call>', '{"city": 1}'),
        ("hermes", '<tool_call>{"arguments": {"city": 1}, "name": "weather"}</tool_call>', '{"city": 1}'),
        ("hermes", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": 1}"}</tool_call>', '{"city": 1}'),
        ("hermes", '<tool_call>{"name": "weather", "x": [1, "}"], "arguments": {}}</tool_call>', "{}"),
        ("hermes", '<tool_call>{"name": "weather"}</tool_call>', "{}"),
        ("deepseek_v31", f"{CALLS_BEGIN}{CALL_BEGIN}weather{SEPARATOR}{{", "{"),
    ],
)
def test_calls_that_are_cut_off_or_odd(name, text, arguments):
    (call,) = parse_message(text, expect(name)).tool_calls
    assert (call.name, call.arguments) == ("weather", arguments)


@pytest.mark.parametrize(
    ("reasoning", "text", "thought", "content"),
    [
        (THINK, "<think>\na < b\n</think>\n\nYes. </think>", "a < b", "Yes. </think>"),
        (THINK, "\n<think>x</think>y", "x", "y"),
        (THINK, "Yes <think>x</think>", "", "Yes <think>x</think>"),
        (THINK, "<thin", "", "<thin"),
        (THINK, "<think>never ends\n", "never ends", ""),
        (ReasoningText(start="<think>", end="</think>", is_open=True), "\nx</think>\ny", "x", "y"),
        (ReasoningText(start="<think>", end="</think>", is_open=True), "<think>\nx</think>\ny", "x", "y"),
        (None, "<think>x</think>", "", "<think>x</think>"),
    ],
)
def test_reasoning(reasoning, text, thought, content):
    found = parse_message(text, expect(reasoning=reasoning))
    assert (found.reasoning, found.content) == (thought, content)
    hidden = parse_message(text, expect(reasoning=reasoning, shows_reasoning=False))
    assert (hidden.reasoning, hidden.content) == ("", content)


def in_pieces(text, cuts, expected):
    borders = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)] or [""]
    parser = ChatParser(expected)
    whole = MessageDelta()
    for at, piece in enumerate(pieces):
        delta = parser.push(piece, is_last=at == len(pieces) - 1)
        whole.reasoning += delta.reasoning
        whole.content += delta.content
        whole.tool_calls = merge_calls([*whole.tool_calls, *delta.tool_calls])
    return whole


def plain(found: MessageDelta):
    return found.reasoning, found.content, [(call.index, call.name, call.arguments) for call in found.tool_calls]


PARTS = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "\n",
        " ",
        "text {",
        '{"name": "weather", "arguments": ',
        '{"name": "time", "parameters": ',
        '{"city": "a\\"b"}',
        "}",
        ";",
        '"',
        "<|python_tag|>",
        "<function=weather>",
        "</function>",
        "<parameter=city>",
        "</parameter>",
        CALLS_BEGIN,
        CALL_BEGIN,
        "function",
        SEPARATOR,
        "weather\n```json\n",
        "\n```",
        CALL_END,
        CALLS_END,
    ]
)


@settings(max_examples=400)
@given(
    name=st.sampled_from(sorted(WRITTEN)),
    is_open=st.booleans(),
    is_parallel=st.booleans(),
    before=st.lists(PARTS, max_size=10),
    has_calls=st.booleans(),
    after=st.lists(PARTS, max_size=4),
    cuts=st.lists(st.integers(0, 10_000), max_size=40),
)
def test_the_message_does_not_depend_on_where_the_text_is_cut(
    name, is_open, is_parallel, before, has_calls, after, cuts
):
    text = "".join([*before, WRITTEN[name] * has_calls, *after])
    reasoning = ReasoningText(start="<think>", end="</think>", is_open=is_open)
    expected = expect(name, reasoning=reasoning, is_parallel=is_parallel)
    whole = plain(parse_message(text, expected))
    assert plain(in_pieces(text, cuts, expected)) == whole
    assert plain(in_pieces(text, range(len(text)), expected)) == whole


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "deepseek_v3", "deepseek_v31"])
def test_arguments_stream_while_they_are_written(name):
    parser = ChatParser(expect(name))
    text = WRITTEN[name]
    begin = text.index(WEATHER)
    parser.push(text[: begin + 1], is_last=False)
    for char in WEATHER[1:]:
        (call,) = parser.push(char, is_last=False).tool_calls
        assert (call.index, call.name, call.arguments) == (0, None, char)
