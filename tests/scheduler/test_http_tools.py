"""Tools, reasoning and structured output over HTTP. The model answers with the text that the test gave it."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jsonschema
import pytest

from tests.scheduler.service_fixtures import ScriptedRunner, byte_tokenizer, counting_engine
from tests.scheduler.test_http_completions import events_of
from xllm_compile.runtime.async_engine import AsyncEngine
from xllm_compile.runtime.engine_config import EngineConfig
from xllm_compile.scheduler import serve
from xllm_compile.scheduler.chat_formats import ChatFormats
from xllm_compile.scheduler.http_api import build_app
from xllm_compile.scheduler.reasoning import FORMATS as REASONING_FORMATS
from xllm_compile.scheduler.service import Service
from xllm_compile.scheduler.tool_formats import FORMATS as TOOL_FORMATS

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }}:{{ call.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}<assistant>"
    "{% if enable_thinking is defined %}<think>{% if not enable_thinking %}</think>{% endif %}{% endif %}"
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"enum": [1, 2]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn", "days": 1}}\n</tool_call>'
USER = {"role": "user", "content": "hi"}


class Chat:
    def __init__(self, client: httpx.AsyncClient, runner: ScriptedRunner, service: Service) -> None:
        self.client = client
        self.runner = runner
        self.service = service

    async def post(self, text: str, **body):
        """The model answers with the text."""
        self.runner.text = text
        return await self.client.post("/v1/chat/completions", json={"messages": [USER]} | body)

    async def choice(self, text: str, **body):
        response = await self.post(text, **body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    async def refused(self, **body):
        response = await self.post("x", **body)
        assert response.status_code == 400, response.text
        return response.json()["error"]

    async def stream(self, text: str, **body):
        """The deltas joined to a message, and the reason of the end."""
        chunks = events_of(await self.post(text, stream=True, **body))
        message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
        for chunk in chunks:
            (choice,) = chunk["choices"]
            delta = choice["delta"]
            for name in ("content", "reasoning_content"):
                message[name] += delta.get(name) or ""
            for call in delta.get("tool_calls", []):
                if call["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append([call["id"], call["function"]["name"], ""])
                message["tool_calls"][call["index"]][2] += call["function"]["arguments"]
        return message, choice["finish_reason"]


@pytest.fixture
async def chat() -> AsyncIterator[Chat]:
    runner = ScriptedRunner()
    engine = AsyncEngine(
        counting_engine(runner, EngineConfig(async_scheduling=True), byte_tokenizer(template=TEMPLATE))
    )
    service = Service(
        engine=engine,
        tokenizer=engine.engine.tokenizer,
        model_names=("scripted",),
        max_model_len=runner.max_model_len,
        version="1",
        chat_formats=ChatFormats.choose(TEMPLATE, tool_call_parser="hermes"),
    )
    transport = httpx.ASGITransport(app=build_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield Chat(client, runner, service)
    engine.shutdown()


async def test_a_call_in_an_answer(chat):
    choice = await chat.choice(f"I look.\n{CALL}", tools=[WEATHER, TIME])
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Bonn", "days": 1}
    assert call["id"].startswith("call_")
    assert choice["message"]["content"] == "I look."
    assert choice["finish_reason"] == "tool_calls"
    assert (await chat.choice(CALL, tools=[WEATHER]))["message"]["content"] is None


async def test_without_tools_or_with_none_chosen_the_text_is_left_as_it_is(chat):
    for body in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = await chat.choice(CALL, **body)
        assert choice["message"] == {"role": "assistant", "content": CALL, "refusal": None}
        assert choice["finish_reason"] == "stop"


async def test_a_streamed_answer_is_the_same_message(chat):
    text = f"<think>\nHm.\n</think>\n\nI look.\n{CALL}\n{CALL}"
    message, reason = await chat.stream(text, tools=[WEATHER])
    whole = (await chat.choice(text, tools=[WEATHER]))["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "I look.")
    assert (whole["reasoning_content"], whole["content"]) == ("Hm.", "I look.")
    assert [call[1:] for call in message["tool_calls"]] == [
        [call["function"]["name"], call["function"]["arguments"]] for call in whole["tool_calls"]
    ]
    assert len({call[0] for call in message["tool_calls"]}) == 2
    assert reason == "tool_calls"


async def test_n_choices_are_parsed_each_for_itself(chat):
    response = await chat.post(CALL, tools=[WEATHER], n=3, stream=True)
    pieces = dict.fromkeys(range(3), "")
    for chunk in events_of(response):
        (choice,) = chunk["choices"]
        for call in choice["delta"].get("tool_calls", []):
            assert call["index"] == 0
            pieces[choice["index"]] += call["function"]["arguments"]
    assert set(pieces.values()) == {'{"city": "Bonn", "days": 1}'}


async def test_logprobs_of_tokens_that_the_parser_keeps_back_are_sent(chat):
    response = await chat.post(CALL, tools=[WEATHER], stream=True, logprobs=True)
    tokens = [
        entry["token"]
        for chunk in events_of(response)
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert "".join(tokens) == CALL + "<eos>"


@pytest.mark.parametrize("is_parallel", [True, False])
async def test_a_required_call_is_written_whatever_the_model_wants(chat, is_parallel):
    choice = await chat.choice(
        "no",
        tools=[WEATHER, TIME],
        tool_choice="required",
        parallel_tool_calls=is_parallel,
        temperature=1,
        seed=3,
        max_tokens=1000,
        chat_template_kwargs={"enable_thinking": False},
    )
    assert choice["finish_reason"] == "tool_calls"
    calls = choice["message"]["tool_calls"]
    assert calls and (is_parallel or len(calls) == 1)
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "weather":
            jsonschema.validate(arguments, WEATHER["function"]["parameters"])
        else:
            assert (call["function"]["name"], arguments) == ("time", {})


@pytest.mark.parametrize("name", sorted(set(TOOL_FORMATS) - {"llama3_json"}))
async def test_a_named_call_in_every_format_after_the_reasoning(chat, name):
    chat.service.chat_formats = ChatFormats.choose("<think>", tool_call_parser=name)
    named = {"type": "function", "function": {"name": "weather"}}
    choice = await chat.choice("<think>so</think>oh", tools=[TIME, WEATHER], tool_choice=named)
    assert choice["message"]["reasoning_content"] == "so"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER["function"]["parameters"])


async def test_a_named_call_of_llama(chat):
    chat.service.chat_formats = ChatFormats.choose("", tool_call_parser="llama3_json")
    choice = await chat.choice("oh", tools=[WEATHER], tool_choice="required")
    (call,) = choice["message"]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER["function"]["parameters"])


def tool(parameters):
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
@pytest.mark.parametrize(
    "parameters",
    [
        # As clients derive them from types.
        {"properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"], "$defs": {"A": {"enum": [1, 2]}}},
        {"properties": {"a": {"enum": [1, 2]}}, "required": ["a"]},
    ],
)
async def test_forced_arguments_are_an_object_that_fits(chat, name, parameters):
    chat.service.chat_formats = ChatFormats.choose("", tool_call_parser=name)
    asked = tool(parameters | {"additionalProperties": False})
    choice = await chat.choice("no", tools=[asked], tool_choice="required", parallel_tool_calls=False)
    (call,) = choice["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert isinstance(arguments, dict)
    jsonschema.validate(arguments, parameters)


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"type": "string"}, "tool 'f' cannot be enforced: 'type' must be 'object', not 'string'"),
        ({"properties": None}, "'properties' must be an object of JSON schemas"),
        ({"properties": []}, "'properties' must be an object of JSON schemas"),
        ({"properties": {"a": 5}}, "'properties' must be an object of JSON schemas"),
        ({"required": 5}, "'required' must be an array of strings"),
        ({"properties": {"a": {"enum": 5}}}, "enum must be an array"),
        ({"properties": {"a": {"type": "string", "maxLength": "x"}}}, "'maxLength', got \"x\""),
    ],
)
async def test_parameters_that_are_no_schema_are_refused_by_every_format(chat, name, parameters, message):
    chat.service.chat_formats = ChatFormats.choose("", tool_call_parser=name)
    assert message in (await chat.refused(tools=[tool(parameters)], tool_choice="required"))["message"]


async def test_a_form_for_the_answer_leaves_calls_possible(chat):
    body = {"tools": [WEATHER], "response_format": {"type": "json_object"}}
    assert (await chat.choice(CALL, **body))["finish_reason"] == "tool_calls"
    choice = await chat.choice('{"a": 1} and more', **body)
    assert (choice["message"]["content"], choice["finish_reason"]) == ('{"a": 1}', "stop")
    choice = await chat.choice('{"a":1} and more', structured_outputs={"disable_any_whitespace": True}, **body)
    assert (choice["message"]["content"], choice["finish_reason"]) == ('{"a":1}', "stop")
    choice = await chat.choice('{"a": 1}', structured_outputs={"disable_any_whitespace": True}, **body)
    assert " " not in choice["message"]["content"]


@pytest.mark.parametrize(
    ("kwargs", "text", "reasoning", "content"),
    [
        ({}, "<think>a</think>b", "a", "b"),
        ({}, "b", None, "b"),
        ({"enable_thinking": True}, "a</think>b", "a", "b"),
        ({"enable_thinking": True}, "a", "a", None),
        ({"enable_thinking": False}, "a</think>b", None, "a</think>b"),
    ],
)
async def test_what_the_prompt_ends_with_says_whether_the_model_is_thinking(chat, kwargs, text, reasoning, content):
    message = (await chat.choice(text, chat_template_kwargs=kwargs))["message"]
    assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)
    hidden = (await chat.choice(text, chat_template_kwargs=kwargs, include_reasoning=False))["message"]
    assert "reasoning_content" not in hidden


async def test_the_form_of_an_answer_begins_after_the_reasoning(chat):
    schema = {"name": "s", "strict": True, "schema": {"enum": [["x"]]}}
    body = {"response_format": {"type": "json_schema", "json_schema": schema}}
    message = (await chat.choice("<think>free {text</think>\n\nno", **body))["message"]
    assert message["reasoning_content"] == "free {text"
    assert json.loads(message["content"]) == ["x"]
    message = (await chat.choice("no", chat_template_kwargs={"enable_thinking": False}, **body))["message"]
    assert json.loads(message["content"]) == ["x"]


@pytest.mark.parametrize(
    ("body", "answers"),
    [
        ({"guided_choice": ["red", "blue"]}, {"red", "blue"}),
        ({"guided_regex": "(ab){3}"}, {"ababab"}),
        ({"guided_json": {"const": 7}}, {"7"}),
        ({"guided_json": '{"const": 7}'}, {"7"}),
        ({"guided_grammar": 'root ::= "x" "y"'}, {"xy"}),
        ({"structured_outputs": {"choice": ["red"]}}, {"red"}),
        ({"structured_outputs": {"regex": "q", "json": None}}, {"q"}),
        ({"structured_outputs": {"grammar": 'start: "z"'}}, {"z"}),
        ({"structured_outputs": {"json": {"const": None}}}, {"null"}),
        ({"structured_outputs": {"json": {"const": [1, 2]}, "disable_any_whitespace": True}}, {"[1,2]"}),
        ({"structured_outputs": {"json_object": True, "disable_any_whitespace": False}, "max_tokens": 1}, {"{"}),
        ({"structured_outputs": {"disable_any_whitespace": False}}, {"free"}),
        ({"response_format": {"type": "text"}}, {"free"}),
    ],
)
async def test_vllms_ways_to_ask_in_chat_and_completions(chat, body, answers):
    choice = await chat.choice("free", chat_template_kwargs={"enable_thinking": False}, **body)
    assert choice["message"]["content"] in answers
    completion = await chat.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 100} | body)
    assert completion.json()["choices"][0]["text"] in answers


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, None),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        (
            {"structured_outputs": {"json_object": False, "disable_any_whitespace": True}},
            "structured_outputs.json_object",
        ),
        (
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
        ),
        ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs.disable_any_whitespace"),
        ({"guided_json": {}, "structured_outputs": {"disable_any_whitespace": 1}}, None),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TIME, TIME]}, "tools"),
        ({"tools": [TIME] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [TIME], "guided_regex": "a"}, "tools"),
    ],
)
async def test_bad_requests_name_the_field(chat, body, param):
    error = await chat.refused(**body)
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"guided_regex": "(?=a)b"}, "look-around"),
        ({"guided_regex": "((a{0,100}){0,100}){0,100}"}, "too many expressions"),
        ({"guided_json": {"type": "strin"}}, "Invalid type: strin"),
        ({"guided_grammar": "start: x"}, "unknown name"),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_what_cannot_be_compiled_is_an_error_and_no_step_runs(chat, body, message, is_streamed):
    num_steps = chat.runner.num_steps
    assert message in (await chat.refused(stream=is_streamed, **body))["message"]
    assert chat.runner.num_steps == num_steps


@pytest.mark.parametrize(
    ("parser", "shown"), [("hermes", '{"zone": "UTC"}'), ("deepseek_v3", r'"{\"zone\": \"UTC\"}"')]
)
async def test_the_template_sees_tools_and_earlier_calls(chat, parser, shown):
    chat.service.chat_formats = ChatFormats.choose("", tool_call_parser=parser)
    arguments = {"name": "time", "arguments": '{"zone": "UTC"}'}
    messages = [
        USER,
        {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": arguments}]},
        {"role": "tool", "tool_call_id": "a", "content": "12:00"},
    ]
    response = await chat.post("x", messages=messages, tools=[TIME], return_token_ids=True, max_tokens=1)
    prompt = bytes(response.json()["prompt_token_ids"]).decode()
    body = {"messages": messages, "tools": [TIME]}
    tokens = (await chat.client.post("/tokenize", json=body)).json()["tokens"]
    assert tokens == response.json()["prompt_token_ids"]
    assert prompt.startswith('<tools>[{"type": "function", "function": {"name": "time"}}]</tools><user>hi<assistant>')
    assert prompt.endswith(f"<call>time:{shown}<tool>12:00<assistant>")


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("{{ '<tool_call>' }} <think>", "hermes", "qwen3"),
        ("<function=example_function_name> <tool_call>", "qwen3_coder", None),
        ("<|python_tag|>", "llama3_json", None),
        ('{"name": f, "parameters": p} Environment: ipython "parameters"', "llama3_json", None),
        ("<｜tool▁calls▁begin｜> ```json </think>", "deepseek_v3", "qwen3"),  # noqa: RUF001
        ("<｜tool▁calls▁begin｜> <think>", "deepseek_v31", "qwen3"),  # noqa: RUF001
        ("", None, None),
    ],
)
def test_formats_are_read_from_the_template(template, tools, reasoning):
    formats = ChatFormats.choose(template)
    assert formats.tools is (TOOL_FORMATS[tools] if tools else None)
    assert formats.reasoning is (REASONING_FORMATS[reasoning] if reasoning else None)
    assert ChatFormats.choose(template, tool_call_parser="none", reasoning_parser="none") == ChatFormats()


def test_the_command_line_knows_every_format():
    assert set(serve.TOOL_CALL_PARSERS) == set(TOOL_FORMATS)
    assert set(serve.REASONING_PARSERS) == set(REASONING_FORMATS)
