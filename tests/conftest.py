"""Fixtures that every part of the suite shares."""

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

CACHE = Path(__file__).resolve().parents[1] / ".cache"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden dumps instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    # torch.export traces at DEBUG by the thousand; a failing test would show nothing else.
    config.option.log_level = config.option.log_level or "INFO"
    # As does a line for every poll of a server.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Compiled graphs are kept between runs in the checkout and nowhere else: a fresh clone starts cold.
    os.environ["XDG_CACHE_HOME"] = str(CACHE)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # How long an example takes is up to what else the machine does.
    settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("untimed")


@pytest.fixture(scope="session")
def kernels() -> Path:
    """The native kernels of this checkout, loaded into the process."""
    from tests.helpers import kernel_library
    from xllm_compile.runtime.ops import native

    with _one_session_at_a_time("kernels"):
        path = kernel_library()
    native.load_kernels(path)
    return path


@pytest.fixture(scope="session")
def tiny_model_dir() -> Callable[..., Path]:
    """tiny_model_dir("qwen3", dtype="float32", **config): a random checkpoint of the family with those changes."""
    from tests.helpers import FAMILIES, model_directory

    def make(family: str = "qwen3", *, dtype: str = "float32", shards: str = "100GB", **config: Any) -> Path:
        return model_directory(CACHE / "tests" / "models", FAMILIES[family] | config, dtype=dtype, shards=shards)

    return make


@pytest.fixture(scope="session")
def demo_artifact() -> Path:
    """models/demo/demo-code compiled for bfloat16 with few buckets."""
    from tests.helpers import DEMO_MODEL

    options = ("--dtype", "bfloat16", "--buckets", "1,4", "--max-num-batched-tokens", "64", "--max-model-len", "512")
    return _compiled(DEMO_MODEL, "demo-code", *options)


@pytest.fixture(scope="session")
def family_artifact(tiny_model_dir: Callable[..., Path]) -> Callable[[str], Path]:
    """family_artifact("qwen2"): the family's tiny model compiled for float32, with one bucket."""
    from tests.helpers import COMPILE_OPTIONS

    return cache(lambda family: _compiled(tiny_model_dir(family), family, *COMPILE_OPTIONS))


@pytest.fixture(scope="session")
def int8_kv_artifact(tiny_model_dir: Callable[..., Path]) -> Path:
    """The tiny qwen3 of family_artifact with an int8 KV cache."""
    from tests.helpers import COMPILE_OPTIONS

    return _compiled(tiny_model_dir("qwen3"), "qwen3-int8-kv", *COMPILE_OPTIONS, "--kv-cache-dtype", "int8")


def _compiled(model_dir: Path, name: str, *options: str) -> Path:
    from tests.helpers import compile_model

    output = CACHE / "tests" / f"{name}.xllm"
    with _one_session_at_a_time(name):
        done = compile_model(model_dir, "-o", output, *options)
    assert done.returncode == 0, done.stderr
    return output


@contextmanager
def _one_session_at_a_time(name: str) -> Iterator[None]:
    """Two test sessions in one checkout share the cache; the second waits for what the first makes."""
    folder = CACHE / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.session-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
