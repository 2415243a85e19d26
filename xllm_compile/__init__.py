"""xllm-compile: ahead-of-time compiled LLM inference.

``from xllm_compile import LLM, SamplingParams`` is the offline interface. Its names are resolved on first use, so
importing the package costs nothing and the build half never loads with the serving half.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xllm_compile.llm import LLM
    from xllm_compile.runtime.beam_search import BeamSearchParams
    from xllm_compile.runtime.pooling import PoolingParams
    from xllm_compile.runtime.sampling_params import SamplingParams
    from xllm_compile.runtime.structured_output import StructuredOutput

__version__ = "0.1.0"
__all__ = ["LLM", "BeamSearchParams", "PoolingParams", "SamplingParams", "StructuredOutput", "__version__"]

_MODULES = {
    "LLM": "llm",
    "BeamSearchParams": "runtime.beam_search",
    "PoolingParams": "runtime.pooling",
    "SamplingParams": "runtime.sampling_params",
    "StructuredOutput": "runtime.structured_output",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"xllm_compile.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
