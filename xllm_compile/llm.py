"""The offline interface: ``LLM(path).generate(prompts, SamplingParams(...))``, in vLLM's shape."""

import os
from pathlib import Path

from xllm_compile.model_cache import artifact_of
from xllm_compile.runtime.instance import open_instance
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.llm import LLMBase
from xllm_compile.runtime.speculative.config import SpeculativeConfig


class LLM(LLMBase):
    """A model or an artifact, opened for offline generation.

    model: an artifact, or a Hugging Face model directory, which is compiled into the user's cache on first use
    (with a progress bar on a terminal). dtype: auto, bfloat16 or float32; kv_cache_dtype: auto or int8; an artifact
    has its own.
    max_model_len, max_num_seqs and kv_memory_bytes bound the instance as in runtime.instance_config.InstanceConfig;
    prefix_cache keeps the KV of what was computed for prompts that start alike.
    speculative (suffix, ngram or draft, with draft_model) guesses tokens as runtime.speculative.config has it.
    Raises ValueError, OSError and the build's errors, each naming the next step.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        kv_memory_bytes: int | None = None,
        prefix_cache: bool = True,
        enforce_eager: bool = False,
        speculative: str | None = None,
        draft_model: str | os.PathLike[str] | None = None,
        num_speculative_tokens: int = 8,
    ) -> None:
        root = artifact_of(Path(model), dtype=dtype, kv_cache_dtype=kv_cache_dtype, max_model_len=max_model_len)
        config = None
        if speculative is not None:
            draft = None if draft_model is None else artifact_of(Path(draft_model), max_model_len=max_model_len)
            config = SpeculativeConfig(
                method=speculative, draft_model=draft, num_speculative_tokens=num_speculative_tokens
            )
        elif draft_model is not None:
            raise ValueError(f"draft_model={str(draft_model)!r} needs speculative='draft'; add it, or leave it out")
        instance = open_instance(
            root,
            InstanceConfig(
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                kv_memory_bytes=kv_memory_bytes,
                kv_cache_dtype=kv_cache_dtype,
                prefix_cache=prefix_cache,
                enforce_eager=enforce_eager,
                speculative=config,
            ),
        )
        super().__init__(instance.engine)
        self.instance = instance
