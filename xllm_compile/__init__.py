"""xllm-compile: ahead-of-time compiled LLM inference.

``from xllm_compile import LLM, SamplingParams, StructuredOutput`` is the offline interface. The names are
resolved on first use, so importing the package costs nothing and the build half never loads with the serving half.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xllm_compile.llm import LLM
    from xllm_compile.runtime.sampling_params import SamplingParams
    from xllm_compile.runtime.structured_output import StructuredOutput

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "StructuredOutput", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from xllm_compile.llm import LLM

        return LLM
    if name == "SamplingParams":
        from xllm_compile.runtime.sampling_params import SamplingParams

        return SamplingParams
    if name == "StructuredOutput":
        from xllm_compile.runtime.structured_output import StructuredOutput

        return StructuredOutput
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
