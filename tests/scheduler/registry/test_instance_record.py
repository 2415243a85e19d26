import json

import pytest

from tests.scheduler.registry.instances import instance
from xllm_compile.scheduler.cluster.state import Role
from xllm_compile.scheduler.registry.instance_record import from_json, to_json

INFO = instance("p0", "42", Role.PREFILL, transfers=("shm:/x", "tcp:h:1"), model_names=("qwen3",), weights_key="w")


def test_what_is_written_is_read():
    assert from_json(to_json(INFO)) == INFO


def test_keys_of_a_newer_version_are_left_out_and_optional_ones_may_be_missing():
    values = json.loads(to_json(INFO))
    del values["transfers"]
    info = from_json(json.dumps({**values, "num_npus": 8}).encode())
    assert (info.name, info.transfers) == ("p0", ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"role": "prefil"}, "role='prefil' must be one of mix, prefill, decode, encode"),
        ({"role": 3}, "role=3 must be one of mix"),
        ({"name": ""}, "name must not be empty"),
        ({"address": None}, "address=None must be a string"),
        ({"max_model_len": "128"}, "max_model_len='128' must be a whole number of at least 0"),
        ({"max_num_seqs": True}, "max_num_seqs=True must be a whole number"),
        ({"kv_tokens_total": -1}, "kv_tokens_total=-1 must be a whole number of at least 0"),
        ({"transfers": "tcp:h:1"}, "transfers='tcp:h:1' must be a list of strings"),
        ({"model_names": [1]}, r"model_names=\[1\] must be a list of strings"),
    ],
)
def test_a_wrong_value_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        from_json(json.dumps({**json.loads(to_json(INFO)), **change}).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b'"x"', b"3"])
def test_what_is_no_object_is_refused(data):
    with pytest.raises(ValueError, match=r"no JSON|a JSON object is needed"):
        from_json(data)


def test_a_missing_field_is_named():
    values = json.loads(to_json(INFO))
    del values["incarnation"]
    with pytest.raises(ValueError, match="incarnation is missing"):
        from_json(json.dumps(values).encode())
