import json
from typing import Any

import pytest

from tests.scheduler.batches.batch_fixtures import COMPLETIONS, jsonl, line
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.batches.input_file import MAX_ERRORS, InputRules, check_input, read_request


def rules(**changes: Any) -> InputRules:
    def check_model(name):
        if name != "counter":
            raise errors.model_not_found(name, "counter")

    default: dict[str, Any] = {"endpoint": COMPLETIONS, "max_lines": 10, "max_line_bytes": 300}
    return InputRules(**default | {"check_model": check_model} | changes)


@pytest.fixture
def check(tmp_path):
    def check(content, **changes):
        path = tmp_path / "in.jsonl"
        path.write_bytes(content)
        return path, check_input(path, rules(**changes))

    return check


def test_lines_are_found_where_they_are(check):
    lines = [line("a", prompt="größe"), line("b", prompt="x" * 100), line("c")]
    content = b"\n".join([json.dumps(lines[0], ensure_ascii=False).encode(), b"", b"  \r", jsonl(lines[1:])])
    path, found = check(content[:-1])
    assert found.errors == []
    assert [(each.number, each.custom_id) for each in found.lines] == [(1, "a"), (4, "b"), (5, "c")]
    for each, expected in zip(found.lines, lines, strict=True):
        assert json.loads(read_request(path, each)) == expected["body"] | {"offline": True}


def test_a_byte_order_mark_and_line_ends_of_windows(check):
    path, found = check(b"\xef\xbb\xbf" + jsonl([line("a"), line("b")]).replace(b"\n", b"\r\n"))
    assert found.errors == []
    assert [json.loads(read_request(path, each))["prompt"] for each in found.lines] == ["a", "a"]


GOOD = line("a")


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"[]", "invalid_json_line", None),
        (b"\xff", "invalid_json_line", None),
        (b"[" * 200, "invalid_json_line", None),
        ({key: value for key, value in GOOD.items() if key != "custom_id"}, "missing_required_parameter", "custom_id"),
        ({key: value for key, value in GOOD.items() if key != "body"}, "missing_required_parameter", "body"),
        (GOOD | {"custom_id": 5}, "invalid_value", "custom_id"),
        (GOOD | {"custom_id": ""}, "invalid_value", "custom_id"),
        (GOOD | {"custom_id": "a\nb"}, "invalid_value", "custom_id"),
        (GOOD | {"custom_id": "\ud800"}, "invalid_value", "custom_id"),
        (GOOD | {"method": "GET"}, "invalid_method", "method"),
        (GOOD | {"url": "/v1/embeddings"}, "mismatched_url", "url"),
        (GOOD | {"body": []}, "invalid_type", "body"),
        (GOOD | {"id": 5}, "unknown_parameter", "id"),
        (line("a", stream=True), "invalid_value", "body.stream"),
        (line("a", model="gpt-4"), "model_not_found", "body.model"),
        (line("a", prompt="x" * 300), "line_too_long", None),
    ],
)
def test_bad_lines(check, bad, code, param):
    content = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    _, found = check(jsonl([line("first", model="counter")]) + content + b"\n" + jsonl([line("last")]))
    (error,) = found.errors
    assert (error.code, error.line, error.param) == (code, 2, param)
    assert [each.custom_id for each in found.lines] == ["first", "last"]


def test_a_line_without_end_is_not_read_whole(check):
    _, found = check(jsonl([line("a")]) + b"x" * 1_000_000 + b"\n" + b"{\n")
    assert [(error.code, error.line) for error in found.errors] == [("line_too_long", 2), ("invalid_json_line", 3)]


def test_duplicates_name_the_first(check):
    _, found = check(jsonl([line("a"), line("b"), line("a")]))
    (error,) = found.errors
    assert (error.code, error.line) == ("duplicate_custom_id", 3) and "line 1" in error.message


def test_errors_are_bounded(check):
    _, found = check(b"{\n" * (MAX_ERRORS + 50))
    assert len(found.errors) == MAX_ERRORS


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_files(check, content):
    _, found = check(content)
    (error,) = found.errors
    assert (error.code, error.line) == ("empty_file", None)


def test_the_limit_of_lines(check):
    assert check(jsonl([line(str(number)) for number in range(10)]))[1].errors == []
    (error,) = check(jsonl([line(str(number)) for number in range(11)]))[1].errors
    assert (error.code, error.line) == ("too_many_requests", 11)
