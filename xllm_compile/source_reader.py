"""Reads and checks everything about a model but the values of its weights."""

from pathlib import Path

from xllm_compile.build_config import BuildConfig
from xllm_compile.build_key import tokenizer_files
from xllm_compile.build_plan import Source
from xllm_compile.graph_passes.quantisation import SCHEMES, Quantisation
from xllm_compile.models.checkpoint import FLOAT_DTYPES, Checkpoint, CheckpointError
from xllm_compile.models.config import DecoderConfig, read_hf_config
from xllm_compile.models.decoder import EMBED_WEIGHT, checkpoint_shapes
from xllm_compile.models.registry import read_model_config
from xllm_compile.models.stored_quantisation import StoredQuantisation, is_stored, read_stored_quantisation
from xllm_compile.models.tensor_parallel import rank_shape

# Where AutoGPTQ and AutoAWQ wrote what is in config.json today.
_OLD_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def read_source(config: BuildConfig) -> Source:
    """Read and check everything about the model but the values of its weights."""
    hf_config = read_hf_config(config.model_dir)
    model = read_model_config(hf_config)
    rank_shape(model, config.tensor_parallel_size)
    limit = model.max_position_embeddings
    # Rotary scaling stretches the trained length; max_position_embeddings already says so for all but "dynamic".
    reach = int(limit * model.rope.factor) if model.rope.rope_type == "dynamic" else limit
    max_model_len = config.max_model_len or limit
    if max_model_len > reach:
        raise ValueError(f"max_model_len={max_model_len} is above the model's limit of {reach} positions; lower it")
    if "tokenizer.json" not in tokenizer_files(config.model_dir):
        raise ValueError(
            f"{config.model_dir} has no tokenizer.json; save it there with"
            " AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    stored = read_stored_quantisation(hf_config)
    checkpoint = Checkpoint(config.model_dir)
    _check_checkpoint(checkpoint, model, stored)
    dtype = config.dtype
    if dtype == "auto":
        is_float32 = checkpoint.tensor(EMBED_WEIGHT).dtype == FLOAT_DTYPES["F32"]
        dtype = "float32" if is_float32 else "bfloat16"
    return Source(
        hf_config=hf_config,
        config=model,
        checkpoint=checkpoint,
        checkpoint_hash=checkpoint.content_hash(),
        dtype=dtype,
        kv_cache_dtype=dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        max_model_len=max_model_len,
        tensor_parallel_size=config.tensor_parallel_size,
        stored=stored,
        quantisation=_quantisation(config, stored),
    )


def _check_checkpoint(checkpoint: Checkpoint, model: DecoderConfig, stored: StoredQuantisation | None) -> None:
    shapes = checkpoint_shapes(model)
    matrices = {name: shape for name, shape in shapes.items() if stored and is_stored(name) and len(shape) == 2}
    if stored is not None:
        stored.check(checkpoint, matrices)
    try:
        checkpoint.check({name: shape for name, shape in shapes.items() if name not in matrices})
    except CheckpointError as err:
        if hint := _quantisation_hint(checkpoint.model_dir, stored):
            raise CheckpointError(f"{err}; {hint}") from err
        raise


def _quantisation_hint(model_dir: Path, stored: StoredQuantisation | None) -> str:
    """What quantisation may have to do with a tensor that is not as a plain checkpoint has it."""
    if stored is not None:
        return f"with quant_method={stored.method!r} only products of layers may be quantised, not the head"
    for name, method in _OLD_CONFIGS.items():
        if (model_dir / name).is_file():
            return (
                f"{name} says that it is quantised, and config.json has no quantization_config, which older versions"
                f' did not write: add it there, with what {name} has and "quant_method": "{method}"'
            )
    return ""


def _quantisation(config: BuildConfig, stored: StoredQuantisation | None) -> Quantisation | None:
    asked = config.quantisation
    if stored is None:
        if asked is not None and asked.scheme == "none":
            raise ValueError(
                f"--quantize-head needs --quantize {', '.join(SCHEMES[:-1])} or {SCHEMES[-1]}, or a checkpoint whose"
                " layers are quantised already"
            )
        return asked
    if asked is not None and asked.scheme != "none":
        raise ValueError(
            f"--quantize {asked.scheme}: {config.model_dir} is quantised already (quant_method {stored.method!r});"
            " leave --quantize out, or give the unquantised checkpoint"
        )
    group_size = stored.group_size if stored.has_groups else None
    has_head = asked is not None and asked.has_head
    return Quantisation(scheme=stored.scheme, group_size=group_size, has_head=has_head, stored_by=stored.method)
