"""From the configuration to a speculator that fits the opened artifact."""

from functools import partial
from pathlib import Path

import torch

from xllm_compile.runtime.artifact import ArtifactMismatchError, Manifest, check_artifact, cpu_kernels, read_manifest
from xllm_compile.runtime.isa import isa_features
from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.memory.cpu_memory import HUGE_PAGE_BYTES
from xllm_compile.runtime.model_runner import CompiledModelRunner
from xllm_compile.runtime.speculative.adaptive import StepSeconds
from xllm_compile.runtime.speculative.config import MAX_SPECULATIVE_TOKENS, SpeculativeConfig
from xllm_compile.runtime.speculative.draft_model import DraftModel
from xllm_compile.runtime.speculative.proposer import Proposer
from xllm_compile.runtime.speculative.speculator import Speculator
from xllm_compile.runtime.speculative.suffix import SuffixProposer
from xllm_compile.runtime.weights import map_weights


def read_draft_manifest(config: SpeculativeConfig, target: Manifest) -> Manifest | None:
    """Of the draft model, if there is one. Raises ArtifactMismatchError when it cannot draft for the target."""
    root = config.draft_model
    if root is None:
        return None
    draft = read_manifest(root)
    if draft.model.vocab_size != target.model.vocab_size:
        raise ArtifactMismatchError(
            f"draft model {root} has vocab_size={draft.model.vocab_size}, the model has {target.model.vocab_size};"
            " drafts are token ids: choose a draft model with the same tokenizer"
        )
    if draft.tensor_parallel_size != 1:
        raise ArtifactMismatchError(
            f"draft model {root} is compiled for tensor_parallel_size={draft.tensor_parallel_size}; compile it for 1"
        )
    kernels, ours = cpu_kernels(root, draft), target.kernels
    if ours is None or kernels.digest != ours.digest:
        raise ArtifactMismatchError(
            f"draft model {root} brings other kernels than the model; compile both with this version of xllm-compile"
        )
    return draft


def open_speculator(
    config: SpeculativeConfig | None,
    target: Manifest,
    draft: Manifest | None,
    kv_config: KVCacheConfig,
    *,
    enforce_eager: bool = False,
    warm_up: bool = False,
) -> Speculator:
    """For a target with this KV cache; without a configuration it drafts what grammars force.

    Its kernels must be loaded; warm_up runs the draft model's graphs once. Raises what opening an artifact raises.
    """
    step_seconds = StepSeconds(target.step_times["T"].of, graph_rows=partial(_graph_rows, target))
    if config is None:
        return Speculator(None, max_length=0, step_seconds=step_seconds)
    proposer: Proposer
    if draft is not None:
        assert config.draft_model is not None
        runner, kv_cache = _open_draft_model(config.draft_model, draft, kv_config, enforce_eager=enforce_eager)
        if warm_up:
            runner.warm_up()
        proposer = DraftModel(runner, kv_cache)
    else:
        proposer = SuffixProposer(max_shared_tokens=config.max_shared_tokens if config.method == "suffix" else 0)
    return Speculator(proposer, max_length=config.num_speculative_tokens, step_seconds=step_seconds)


def _graph_rows(target: Manifest, num_rows: int) -> int:
    """Of the graph that runs a step of so many: its bucket's, or its own on the dynamic-shape graph."""
    return target.step_times["T"].bucket_for(num_rows, target.token_buckets) or num_rows


def _open_draft_model(
    root: Path, draft: Manifest, kv_config: KVCacheConfig, *, enforce_eager: bool
) -> tuple[CompiledModelRunner, KVCache]:
    check_artifact(root, draft, isa_features(), verify_weights=False)
    model = draft.model
    kv_cache = KVCache(
        KVCacheConfig(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=getattr(torch, model.kv_cache_dtype),
            max_model_len=min(model.max_model_len, kv_config.max_model_len),
            num_slots=kv_config.num_slots,
            # The target has room for all texts; a draft that was refused may take some more here, and pages of another
            # size are filled otherwise.
            kv_memory_bytes=(kv_config.total_tokens + kv_config.num_slots * MAX_SPECULATIVE_TOKENS)
            * model.kv_bytes_per_token
            * 9
            // 8
            + kv_config.num_slots * HUGE_PAGE_BYTES,
            prefix_cache=False,
        )
    )
    runner = CompiledModelRunner(
        root,
        draft,
        map_weights(root / draft.weights[0].path),
        kv_cache.layers,
        max_model_len=kv_cache.config.max_model_len,
        max_num_seqs=kv_config.num_slots,
        max_num_batched_tokens=draft.max_num_batched_tokens,
        enforce_eager=enforce_eager,
    )
    return runner, kv_cache
