"""Workloads: fixed lengths, traces of two formats, and what is wrong with a trace."""

import pytest

from xllm_compile.benchmarks.workloads import all_at_once, fixed_requests, prompt_of, trace_requests

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,396,109
2023-11-16 18:15:51.6805900,9000,55
2023-11-16 18:15:52.6805900,91,16
"""
MOONCAKE = """{"timestamp": 27000, "input_length": 100, "output_length": 5, "hash_ids": [0]}
{"timestamp": 30000, "input_length": 200, "output_length": 6, "hash_ids": [0, 1]}
"""


def write(path, text: str):
    path.write_text(text)
    return path


def test_fixed_requests_arrive_at_once_or_at_a_rate():
    assert [request.arrival_s for request in fixed_requests(3, 8, 2, rate=None, seed=0)] == [0, 0, 0]
    many = fixed_requests(2000, 8, 2, rate=50.0, seed=0)
    assert many[-1].arrival_s == pytest.approx(40, rel=0.1)
    assert many == fixed_requests(2000, 8, 2, rate=50.0, seed=0)


def test_an_azure_trace_keeps_its_gaps_and_loses_what_does_not_fit(tmp_path):
    found = trace_requests(write(tmp_path / "a.csv", AZURE), limit=10, max_model_len=4096, speedup=2.0)
    assert [request.prompt_tokens for request in found] == [374, 396, 91]
    assert [request.arrival_s for request in found] == pytest.approx([0, 2, 3])
    assert {request.arrival_s for request in all_at_once(found)} == {0}


def test_a_mooncake_trace_starts_at_its_first_request(tmp_path):
    found = trace_requests(write(tmp_path / "m.jsonl", MOONCAKE), limit=10, max_model_len=4096)
    assert [(request.arrival_s, request.output_tokens) for request in found] == [(0, 5), (3, 6)]
    assert len(trace_requests(tmp_path / "m.jsonl", limit=1, max_model_len=4096)) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", AZURE.replace("ContextTokens", "Context"), "row 2: needs ContextTokens"),
        ("t.jsonl", MOONCAKE + "nonsense\n", "row 3: needs input_length"),
        ("t.jsonl", "", "holds no request"),
        ("t.txt", "", "must be a .csv or .jsonl"),
        ("t.csv", "ContextTokens,GeneratedTokens\n1,2\n", "no arrival times"),
        ("t.csv", AZURE.replace("91,16", "9100,16").replace("374", "9999").replace("396", "9999"), "at most 4096"),
    ],
)
def test_a_bad_trace_says_what_is_wrong(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        trace_requests(write(tmp_path / name, text), limit=10, max_model_len=4096)


def test_prompts_differ_between_requests_and_not_between_runs():
    (request,) = fixed_requests(1, 16, 2, rate=None, seed=0)
    first = prompt_of(request, 0, vocab_size=50, seed=1)
    assert len(first) == 16
    assert max(first) < 50
    assert first == prompt_of(request, 0, vocab_size=50, seed=1)
    assert first != prompt_of(request, 1, vocab_size=50, seed=1)
