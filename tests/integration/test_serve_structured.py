"""Structured output and tools of xllm-serve, used through the official OpenAI client."""

import json
import threading
from typing import Any

import jsonschema
import openai
import pytest

from tests.integration.helpers import MESSAGES
from tests.integration.serve_process import ServeProcess
from xllm_compile.benchmarks.random_schemas import random_schema

pytestmark = pytest.mark.integration

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 99}, "why": {"enum": ["fun", "need"]}},
            "required": ["a", "why"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(demo_artifact):
    with ServeProcess(demo_artifact, "--served-model-name", "demo", "--tool-call-parser", "hermes") as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.http}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_many_schemas_at_the_same_time(client):
    schemas = [random_schema(seed) for seed in range(24)]
    answers = [""] * len(schemas)

    def ask(index):
        answer_format = {"type": "json_schema", "json_schema": {"name": "s", "schema": schemas[index], "strict": True}}
        stream = client.chat.completions.create(
            model="demo", messages=MESSAGES, response_format=answer_format, seed=index, stream=True
        )
        answers[index] = "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(schemas))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for schema, answer in zip(schemas, answers, strict=True):
        jsonschema.validate(json.loads(answer), schema)


def test_a_required_call_streamed_and_whole(client):
    body = {"model": "demo", "messages": MESSAGES, "tools": [TOOL], "tool_choice": "required", "temperature": 0}
    body["parallel_tool_calls"] = False
    choice = client.chat.completions.create(**body).choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "add")
    jsonschema.validate(json.loads(call.function.arguments), TOOL["function"]["parameters"])
    with client.chat.completions.stream(**body) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert [each.function.arguments for each in streamed] == [call.function.arguments]


def test_n_choices_each_follow_the_regex(client):
    answer = client.completions.create(
        model="demo", prompt="def", n=4, max_tokens=40, temperature=1, extra_body={"guided_regex": "[a-f]{3}-[0-9]+;"}
    )
    texts = [choice.text for choice in answer.choices]
    assert all(text[3] == "-" and set(text[:3]) <= set("abcdef") for text in texts)
    assert len(set(texts)) > 1


def test_a_regex_that_cannot_be_used_is_the_clients_error(client):
    with pytest.raises(openai.BadRequestError, match="look-around"):
        client.completions.create(model="demo", prompt="x", extra_body={"guided_regex": "(?=a)b"})
