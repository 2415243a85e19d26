"""The CPU kernels built for every instruction set that this CPU can run."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from xllm_compile.runtime.ops import native

AVX512 = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")
DOT_PRODUCTS = (*AVX512, "avx512_bf16", "avx512_vnni")
VARIANTS = {"machine": None, "avx512_dot": DOT_PRODUCTS, "avx512": AVX512, "avx2": ("avx2", "fma"), "portable": ()}


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds a variant on first use."""
    folder = tmp_path_factory.mktemp("kernels")

    def path_of(variant: str) -> Path:
        path = folder / f"{variant}.so"
        if not path.exists():
            native.build_kernels(path, VARIANTS[variant])
        return path

    return path_of


@pytest.fixture(scope="session", params=list(VARIANTS))
def ops(request: pytest.FixtureRequest, build: Callable[[str], Path]) -> native.Kernels:
    missing = set(VARIANTS[request.param] or ()) - set(native.cpu_features())
    if missing:
        pytest.skip(f"this CPU lacks {sorted(missing)}")
    path = build(request.param)
    kernels = native.Kernels(path)
    # Small cases should not wait for threads on a busy machine; tests of sharing ask for them.
    kernels.set_num_threads(1)
    return kernels


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_threads(ops: native.Kernels) -> Iterator[None]:
    ops.set_num_threads(2)
    yield
    ops.set_num_threads(1)
