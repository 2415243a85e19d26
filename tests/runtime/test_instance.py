"""Bounds of an instance: what follows where none are given, and what is refused before anything is opened."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from xllm_compile.runtime import instance
from xllm_compile.runtime.artifact import read_manifest
from xllm_compile.runtime.instance import open_instance
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.policies.state import Limits
from xllm_compile.runtime.shared_models import open_models

TOO_MUCH = 1 << 60


@pytest.fixture
def artifact(family_artifact: Callable[[str], Path]) -> Path:
    return family_artifact("llama")


@pytest.fixture
def unopened(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact of which nothing but the manifest may be read."""

    def touch(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the artifact was opened")

    monkeypatch.setattr(instance, "check_artifact", touch)
    monkeypatch.setattr(native, "load_kernels", touch)
    return artifact


def test_small_steps_have_as_many_sequences(artifact: Path) -> None:
    opened = open_instance(artifact, InstanceConfig(max_num_batched_tokens=8))
    assert opened.engine.limits == Limits(max_num_seqs=8, max_num_batched_tokens=8)
    opened.engine.close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            InstanceConfig(max_num_seqs=9, max_num_batched_tokens=8),
            "max_num_batched_tokens=8 must be at least max_num_seqs=9.* raise the one or lower the other",
        ),
        (
            InstanceConfig(kv_memory_bytes=TOO_MUCH),
            rf"^kv_memory_bytes={TOO_MUCH} are more than the \d+ bytes of memory that there are; lower them$",
        ),
        (
            InstanceConfig(kv_memory_bytes=1 << 24, kv_host_bytes=TOO_MUCH, kv_swap_bytes=TOO_MUCH),
            rf"^kv_memory_bytes={1 << 24} and kv_host_bytes={TOO_MUCH} and kv_swap_bytes={TOO_MUCH} are more than",
        ),
    ],
)
def test_what_cannot_be_is_refused_first(unopened: Path, config: InstanceConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_instance(unopened, config)


def test_a_disk_tier_that_is_no_folder_names_the_next_step(artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    config = InstanceConfig(kv_memory_bytes=1 << 24, kv_host_bytes=1 << 20, kv_disk=file)
    with pytest.raises(ValueError, match=rf"^kv_disk={file} cannot be used: Not a directory; give a folder"):
        open_instance(artifact, config)


def test_memory_of_several_models_that_the_machine_has_not(unopened: Path) -> None:
    with pytest.raises(ValueError, match=rf"^memory_bytes={TOO_MUCH} are more than the \d+ bytes of memory"):
        open_models({"a": unopened, "b": unopened}, InstanceConfig(), TOO_MUCH)


@pytest.mark.parametrize(
    ("asked", "world_size", "num_colocated", "expected"),
    [
        (None, 1, 1, 12),
        (None, 4, 1, 3),
        (None, 2, 3, 2),
        # More processes than CPUs.
        (None, 4, 4, 1),
        (5, 4, 1, 5),
        (13, 1, 1, 13),
    ],
)
def test_processes_share_the_cpus(
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: int | None,
    world_size: int,
    num_colocated: int,
    expected: int,
) -> None:
    used: list[int] = []
    monkeypatch.setattr(instance, "num_cpus", lambda: 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(native, "set_num_threads", used.append)
    manifest = replace(read_manifest(artifact), tensor_parallel_size=world_size)
    instance._use_threads(manifest, InstanceConfig(num_threads=asked, num_colocated=num_colocated))
    assert used == [expected, expected]
    assert ["13 threads on 12 CPUs take turns" in each for each in caplog.messages] == [True] * (asked == 13)


def test_torch_may_want_fewer_threads_than_there_are_cpus(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OMP_NUM_THREADS, or two CPUs of a core."""
    used: list[int] = []
    monkeypatch.setattr(instance, "num_cpus", lambda: 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(native, "set_num_threads", used.append)
    instance._use_threads(read_manifest(artifact), InstanceConfig())
    assert used == [6, 6]


def test_features_that_the_compiling_cpu_lacked_are_said(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = read_manifest(artifact)
    instance._say_unused(artifact, manifest, native.cpu_features())
    assert not caplog.messages
    instance._say_unused(artifact, manifest, (*native.cpu_features(), "avx512_next", "amx_next"))
    assert "compiled on a CPU without avx512_next, amx_next, which this one has" in caplog.text
