import socket
from pathlib import Path

import click
import pytest

from xllm_compile import model_cache
from xllm_compile.scheduler.artifact_source import cached_artifact, find_artifact
from xllm_compile.scheduler.member import check_registry
from xllm_compile.scheduler.process import bind_socket, process_age_s
from xllm_compile.scheduler.serve import command


def test_the_system_picks_a_port_and_a_taken_one_is_an_error():
    with bind_socket("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port}.*--port"):
            bind_socket("127.0.0.1", port)


def test_nobody_connects_before_the_model_is_there():
    with bind_socket("127.0.0.1", 0) as bound, pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound.getsockname())


def test_the_age_of_this_process_is_positive_and_grows():
    first = process_age_s()
    assert 0 < first <= process_age_s()


def test_an_artifact_is_served_as_it_is(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    assert find_artifact(tmp_path, {"use_compile": False}) == tmp_path


def test_a_model_directory_is_compiled_only_when_asked(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"Compile it once \(about 2 min.*xllm-compile"):
        find_artifact(tmp_path, {"use_compile": False})


@pytest.mark.parametrize("max_model_len", [None, 64])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("root", [None, "/somewhere"])
def test_the_offline_interface_finds_the_same_artifact(monkeypatch, tmp_path, max_model_len, kv_cache_dtype, root):
    if root is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", root)
    expected = model_cache.cached_artifact(tmp_path, max_model_len=max_model_len, kv_cache_dtype=kv_cache_dtype)
    assert cached_artifact(Path(tmp_path), max_model_len, kv_cache_dtype) == expected


def test_the_role_that_no_model_has_yet_is_refused_by_name():
    with pytest.raises(click.BadParameter, match=r"images.*gateway, mix, prefill, decode"):
        command.main(["model.xllm", "--role", "encode"], standalone_mode=False)


@pytest.mark.parametrize(("role", "is_said"), [("decode", True), ("gateway", False), (None, False)])
def test_an_instance_that_no_gateway_will_find_says_so(caplog, role, is_said):
    check_registry({"role": role, "registry": None})
    assert ["--role decode without --registry" in record.getMessage() for record in caplog.records] == [True] * is_said
