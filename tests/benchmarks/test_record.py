"""The record form: bars compute what they claim, files are whole, strangers are refused."""

import json
from dataclasses import replace

import pytest

from xllm_compile.benchmarks.record import Bar, Record, RecordError, make_record, read_record, read_records


def a_record(**changes) -> Record:
    bars = (Bar(what="cold", value=90.5, unit="s", bar="<= 180"), Bar(what="graphs", value=13, unit=""))
    record = make_record("compile_time", ["xllm-bench", "compile"], seed=1, raw={"seconds": [90.5]}, bars=bars)
    return replace(record, **changes)


@pytest.mark.parametrize(
    ("value", "bar", "met"),
    [
        (180, "<= 180", True),
        (180.01, "<= 180", False),
        (1, "> 1", False),
        (1.01, "> 1", True),
        (0.5, ">= 0.5", True),
        (0.49, ">= 0.5", False),
        (3.9, "< 4", True),
        (-1, "< -0.5", True),
        (7, "", None),
    ],
)
def test_a_bar_is_met_by_its_own_sign(value, bar, met):
    assert Bar(what="x", value=value, unit="s", bar=bar).met is met


@pytest.mark.parametrize("bar", ["180", "<=180", "== 180", "<= fast", "<= "])
def test_a_bar_that_says_nothing_is_refused(bar):
    with pytest.raises(RecordError, match="must be one of"):
        Bar(what="x", value=1, unit="s", bar=bar)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_refused(value):
    with pytest.raises(RecordError, match="finite"):
        Bar(what="x", value=value, unit="s")


def test_a_record_comes_back_as_it_was_written(tmp_path):
    record = a_record()
    path = record.write(tmp_path)
    assert path.name == "compile_time.json"
    assert read_record(path) == record
    assert [found.name for found in read_records(tmp_path)] == ["compile_time"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_write_replaces_the_first(tmp_path):
    a_record().write(tmp_path)
    path = a_record(seed=2).write(tmp_path)
    assert read_record(path).seed == 2


def test_a_value_json_cannot_hold_leaves_the_old_record(tmp_path):
    path = a_record().write(tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        a_record(raw={"seconds": float("nan")}).write(tmp_path)
    assert read_record(path) == a_record(created=read_record(path).created)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["", "../elsewhere", "a/b"])
def test_a_name_that_is_a_path_is_refused(name):
    with pytest.raises(RecordError, match="plain file name"):
        a_record(name=name)


def test_two_bars_of_one_name_are_refused():
    with pytest.raises(RecordError, match="two bars are called 'cold'"):
        a_record(bars=(Bar(what="cold", value=1, unit="s"), Bar(what="cold", value=2, unit="s")))


def test_a_record_that_claims_what_its_value_does_not_is_refused(tmp_path):
    path = a_record().write(tmp_path)
    values = json.loads(path.read_text())
    values["bars"][0]["value"] = 500
    path.write_text(json.dumps(values))
    with pytest.raises(RecordError, match=r"compile_time\.json .* met is True"):
        read_record(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x"}'])
def test_a_file_that_is_no_record_names_itself(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"other\.json is no benchmark record"):
        read_record(path)


def test_a_record_says_where_it_was_made():
    record = a_record()
    assert record.machine["cores"] >= 1
    assert record.machine["memory_bytes"] > 1 << 28
    assert "torch" in record.versions
    assert set(record.commit) == {"hash", "is_dirty"}
