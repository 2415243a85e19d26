"""The manifest of a finished artifact."""

from datetime import UTC, datetime
from pathlib import Path

from xllm_compile.build_key import hash_json
from xllm_compile.build_plan import BuildPlan
from xllm_compile.memory_layout import plan_graphs
from xllm_compile.models.rope import rope_constants
from xllm_compile.models.tensor_parallel import rank_shape
from xllm_compile.runtime import artifact
from xllm_compile.runtime.artifact import GraphEntry, Manifest, ModelInfo
from xllm_compile.targets import lowering_for
from xllm_compile.weight_builder import num_bytes, weights_key


def describe(root: Path, plan: BuildPlan) -> Manifest:
    """Of the artifact whose files are already in ``root``."""
    config, source, buckets = plan.config, plan.source, plan.buckets
    lowering = lowering_for(config.target)
    ranks = source.tensor_parallel_size
    model = ModelInfo(
        name=config.model_dir.resolve().name,
        architecture=source.config.architecture,
        vocab_size=source.config.vocab_size,
        hidden_size=source.config.hidden_size,
        num_layers=source.config.num_layers,
        num_kv_heads=rank_shape(source.config, ranks).num_kv_heads,
        head_dim=source.config.head_dim,
        dtype=source.dtype,
        kv_cache_dtype=source.kv_cache_dtype,
        max_model_len=source.max_model_len,
    )
    return Manifest(
        schema_version=artifact.SCHEMA_VERSION,
        build_key=plan.key,
        model=model,
        model_config=source.config.to_json(),
        config_hash=hash_json(source.hf_config),
        target=config.target,
        target_features=lowering.features(),
        versions={**artifact.runtime_versions(), "compiler": plan.compiler},
        passes=(*(entry for report in plan.reports for entry in report.to_json()), *plan.split.passes_json()),
        graph_mode=config.graph_mode,
        token_buckets=buckets.tokens,
        logits_buckets=buckets.logits,
        buckets_reason=buckets.reason,
        step_times=plan.step_times,
        device_spec=plan.device.to_json(),
        max_num_batched_tokens=config.max_num_batched_tokens,
        tensor_parallel_size=ranks,
        programs=tuple(plan.programs),
        split_buckets=plan.split.buckets,
        split_programs=plan.split.programs,
        graphs=tuple(
            GraphEntry(region=j.program.name, sizes=j.sizes, key=j.key, file=artifact.file_entry(root, j.file))
            for j in plan.jobs
        ),
        kernels=artifact.file_entry(root, artifact.KERNELS) if lowering.has_kernels else None,
        weights=tuple(artifact.file_entry(root, artifact.weights_path(rank, ranks)) for rank in range(ranks)),
        weights_key=weights_key(source.checkpoint_hash, plan.weights, rope_constants(source.config), source.stored),
        memory_plan={
            "weights_bytes": sum(num_bytes(spec) for spec in plan.weights),
            "kv_bytes_per_token": model.kv_bytes_per_token,
            "activation_bytes": plan.activation_bytes,
        },
        graph_plans=tuple(
            layout.to_json()
            for layout in plan_graphs(
                [piece for report in plan.reports for piece in report.lifetimes],
                buckets.tokens,
                buckets.logits,
                config.max_num_batched_tokens,
            )
        ),
        quantisation=source.quantisation.label if source.quantisation else None,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        pass_seconds=round(sum(entry.seconds for report in plan.reports for entry in report.passes), 4),
    )
