"""Traces of every format, and what is said of a bad one."""

import json

import pytest

from xllm_compile.request_trace import MAX_DRAWN_REQUESTS, TraceError, TraceRequest, has_times, read_rates, read_trace

# Two rows of the Azure LLM inference trace 2023 (CC-BY-4.0), later first.
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:46.6805900,374,44
"""
WINDOWS = "0,2.0,0.57,Gamma,3.08,0.36\n600,0,0,,0,0\n1200,1.0,0.76,Weibull,1.33,1.19\n"


def lengths(**changes):
    entry = {
        "text_tokens": "{100: 0.5, 300: 0.5}",
        "image_tokens": "{1000: 1.0}",
        "image_count": "{0: 0.5, 2: 0.5}",
        "output_tokens": "{7: 1.0}",
    }
    return json.dumps({"0": {**entry, **changes}})


def test_azure_rows_come_by_arrival(tmp_path):
    (tmp_path / "a.csv").write_text(AZURE)
    found = read_trace(tmp_path / "a.csv")
    assert [(request.prompt_tokens, request.output_tokens) for request in found] == [(374, 44), (396, 109)]
    assert has_times(found) and (found[1].arrival_s or 0) - (found[0].arrival_s or 0) == pytest.approx(4.314579)


def test_mooncake_rows(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"timestamp": 2500, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n')
    assert read_trace(path) == [TraceRequest(2.5, 6758, 500)]


def test_lengths_without_times(tmp_path):
    (tmp_path / "w.csv").write_text("ContextTokens,GeneratedTokens\n10,20\n30,40\n")
    (tmp_path / "w.jsonl").write_text(
        '{"input_length": 10, "output_length": 20}\n{"input_length": 30, "output_length": 40}\n'
    )
    for name in ("w.csv", "w.jsonl"):
        found = read_trace(tmp_path / name)
        assert not has_times(found) and [(r.prompt_tokens, r.output_tokens) for r in found] == [(10, 20), (30, 40)]


def test_servegen_windows_are_drawn_at_their_rates(tmp_path):
    for client in "01":
        (tmp_path / f"chunk-{client}-trace.csv").write_text(WINDOWS)
        (tmp_path / f"chunk-{client}-dataset.json").write_text(lengths())
    both, one = read_trace(tmp_path), read_trace(tmp_path / "chunk-0-trace.csv")
    assert both == read_trace(tmp_path)
    arrivals = [request.arrival_s or 0.0 for request in both]
    assert arrivals == sorted(arrivals) and arrivals[-1] < 1800
    assert not [at for at in arrivals if 600 <= at < 1200]
    alone = [request.arrival_s or 0.0 for request in one]
    assert sum(at < 600 for at in alone) == pytest.approx(1200, rel=0.1)
    assert sum(at >= 1200 for at in alone) == pytest.approx(600, rel=0.1)
    assert len(both) == pytest.approx(2 * len(one), rel=0.1)
    assert {r.prompt_tokens for r in both} == {100, 300, 2100, 2300} and {r.output_tokens for r in both} == {7}
    assert sum(r.prompt_tokens for r in both) / len(both) == pytest.approx(1200, rel=0.1)


def test_the_rates_of_a_day_are_those_of_all_clients(tmp_path):
    (tmp_path / "a-trace.csv").write_text(WINDOWS)
    (tmp_path / "b-trace.csv").write_text("0,0.5,1,Gamma,1,1\n600,0.25,1,Gamma,1,1\n1200,0,0,,0,0\n")
    alone, both = read_rates(tmp_path / "a-trace.csv"), read_rates(tmp_path)
    assert alone == [2.0, 0.0, 1.0] and both == [2.5, 0.25, 1.0]


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        ("0,1,0,,0,0\n", "windows of one width, two at least"),
        ("", "windows of one width, two at least"),
        ("0,1,0,,0,0\n600,1,0,,0,0\n700,1,0,,0,0\n", "windows of one width"),
        ("0,0,0,,0,0\n600,0,0,,0,0\n", "every window's rate is 0"),
    ],
)
def test_windows_that_make_no_day(tmp_path, windows, said):
    (tmp_path / "x-trace.csv").write_text(windows)
    with pytest.raises(TraceError, match=said):
        read_rates(tmp_path)


def test_clients_of_other_days_make_none_together(tmp_path):
    (tmp_path / "a-trace.csv").write_text("0,1,0,,0,0\n600,1,0,,0,0\n")
    (tmp_path / "b-trace.csv").write_text("0,1,0,,0,0\n300,1,0,,0,0\n")
    with pytest.raises(TraceError, match="the same for all clients"):
        read_rates(tmp_path)


def test_drawing_ends(tmp_path):
    (tmp_path / "x-trace.csv").write_text("0,1000,0,,0,0\n")
    (tmp_path / "x-dataset.json").write_text(lengths())
    assert len(read_trace(tmp_path)) == MAX_DRAWN_REQUESTS


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("w.txt", "", "must be a .csv or .jsonl file"),
        ("w.csv", None, "does not exist"),
        ("w.csv", "ContextTokens,GeneratedTokens\n", "holds no request"),
        ("w.csv", "ContextTokens\n1\n", "row 2: needs ContextTokens, GeneratedTokens"),
        ("w.csv", AZURE + "yesterday,1,2\n", "row 4: needs .* ISO TIMESTAMP"),
        ("w.csv", AZURE + "2023-11-16 18:15:50.9951690,0,2\n", "row 4: 0 prompt and 2 output tokens"),
        ("w.csv", AZURE + ",1,2\n", "row 4: some requests have a time and some have none"),
        ("w.jsonl", '{"input_length": 1, "output_length": 2}\n{"input_length": "many"}\n', "row 2: needs input_length"),
        ("w.jsonl", "not json\n", "row 1: needs"),
        ("w.jsonl", "[1, 2]\n", "row 1: needs"),
        ("w.jsonl", '{"timestamp": NaN, "input_length": 1, "output_length": 2}\n', "row 1: .*timestamp nan"),
        ("w.jsonl", '{"input_length": 1e400, "output_length": 2}\n', "row 1: needs .*infinity"),
        ("w.jsonl", '{"input_length": 1.5, "output_length": 2}\n', "row 1: needs .*1.5 is no whole number"),
        ("w.jsonl", '{"input_length": 1700159750995, "output_length": 2}\n', "row 1: .*at most 10000000"),
        ("w.jsonl", '{"input_length": 1, "output_length": 2}\n\x9b\n', "row 2: needs input_length"),
        ("w.csv", AZURE + "2023-11-16 18:15:50.9951690,\x9b,2\n", "row 4: needs ContextTokens"),
        ("w.csv", AZURE + ",1," + "2" * 200_000 + "\n", "row 4: field larger than field limit"),
    ],
)
def test_bad_traces_name_file_and_row(tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(TraceError, match=said) as error:
        read_trace(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    ("windows", "dataset", "said"),
    [
        (WINDOWS + "1800,1,1\n", lengths(), "row 4: needs start, rate"),
        (WINDOWS + "1800,1,1,Zipf,1,1\n", lengths(), "row 4: .*'Zipf'"),
        (WINDOWS + "1200,1,1,,1,1\n", lengths(), "row 4: windows must ascend"),
        ("0,nan,0,,0,0\n", lengths(), "row 1: .*rate nan"),
        ("0,1,0,Weibull,0.001,0\n", lengths(), "row 1: .*shape 0.001"),
        ("0,1,0,\x9b,1,0\n", lengths(), "row 1: .*x9b"),
        ("0,0,0,,0,0\n", lengths(), "every window's rate is 0"),
        (WINDOWS, None, "No such file"),
        (WINDOWS, "{}", "holds no distribution"),
        (WINDOWS, '{"0": {}}', "needs, by second of the day, text_tokens"),
        (WINDOWS, lengths(text_tokens="{}"), "no probabilities"),
        (WINDOWS, lengths(text_tokens="{1e400: 1.0}"), "infinity"),
        (WINDOWS, lengths(text_tokens="{-5: 1.0}"), r"must be in \[0, 10000000\], not -5 to -5"),
        (WINDOWS, lengths(image_count="{1700159750: 1.0}"), r"must be in \[0, 1000\]"),
        (WINDOWS, lengths(text_tokens="__import__('os')"), "needs, by second"),
    ],
)
def test_bad_servegen_files(tmp_path, windows, dataset, said):
    (tmp_path / "x-trace.csv").write_bytes(windows.encode("latin-1"))
    if dataset is not None:
        (tmp_path / "x-dataset.json").write_text(dataset)
    with pytest.raises(TraceError, match=said):
        read_trace(tmp_path)


def test_a_folder_without_traces(tmp_path):
    with pytest.raises(TraceError, match=r"holds no \*-trace.csv"):
        read_trace(tmp_path)
