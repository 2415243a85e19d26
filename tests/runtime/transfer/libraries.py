"""The libraries that some transfers need."""

import functools
import importlib

import pytest

from tests.runtime.transfer.memory import memory
from xllm_compile.runtime.transfer.connect import open_receiver
from xllm_compile.runtime.transfer.transfer import TransferConfig

MODULES = {"mooncake": "mooncake.engine", "nixl": "nixl_cu12._api"}


def needs_library(scheme: str) -> None:
    """Skips the test where the scheme's library cannot be loaded."""
    if scheme in MODULES and (why := why_missing(scheme)):
        pytest.skip(f"{scheme} is not installed: {why}")


@functools.cache
def why_missing(scheme: str) -> str:
    try:
        importlib.import_module(MODULES[scheme])
    except ImportError as err:
        return str(err)
    # What the library keeps for as long as the process lives is no leak of a test.
    with memory(4096) as region:
        open_receiver([scheme], region, TransferConfig(allow_open_ports=True)).close()
    return ""
