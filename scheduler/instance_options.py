"""From the command line's options to opened instances.

Modules of the runtime are imported where they are used: a mistake in the options is told before torch is there.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_compile.scheduler.artifact_source import find_artifact
from xllm_compile.scheduler.member import transfer_options

if TYPE_CHECKING:
    from xllm_compile.runtime.instance import Instance
    from xllm_compile.runtime.instance_config import InstanceConfig
    from xllm_compile.runtime.speculative.config import SpeculativeConfig


def served_names(artifacts: Sequence[Path], given: Sequence[str]) -> list[tuple[str, ...]]:
    """The names of each artifact in the API. Raises ValueError where two would have one name."""
    from xllm_compile.runtime.artifact import read_manifest

    if len(artifacts) == 1 and given:
        return [tuple(given)]
    if given and len(given) != len(artifacts):
        raise ValueError(
            f"--served-model-name is given {len(given)} times for {len(artifacts)} artifacts; give it once for each,"
            " in their order"
        )
    names = list(given) or [read_manifest(root).model.name for root in artifacts]
    for name, root in zip(names, artifacts, strict=True):
        if names.count(name) > 1:
            raise ValueError(
                f"{root} and another artifact would both be served as {name!r}; give --served-model-name once for each"
            )
    return [(name,) for name in names]


@contextmanager
def opened_instances(
    artifacts: Sequence[Path], names: Sequence[tuple[str, ...]], options: Mapping[str, Any]
) -> Iterator[list["Instance"]]:
    """Leaving it ends other ranks. Raises ValueError for a budget that does not hold what was asked for."""
    from xllm_compile.runtime.artifact import read_manifest
    from xllm_compile.runtime.follower import opened_instance
    from xllm_compile.runtime.shared_models import open_models

    config, memory = instance_config(options), options["memory"]
    if len(artifacts) > 1:
        by_name = dict(zip([first for first, *_ in names], artifacts, strict=True))
        instances = list(open_models(by_name, config, memory, may_sleep=options["wake_on_request"]).values())
        try:
            yield instances
        finally:
            for each in instances:
                each.engine.close()
        return
    if memory is not None:
        weights = read_manifest(artifacts[0]).weights[0].num_bytes
        if memory <= weights or config.kv_memory_bytes is not None:
            raise ValueError(
                f"--memory {memory} is for the {weights} bytes of weights and for KV; give more than the weights, and"
                " not --kv-memory as well"
            )
        config = replace(config, kv_memory_bytes=memory - weights)
    with opened_instance(artifacts[0], config) as instance:
        yield [instance]


def instance_config(options: Mapping[str, Any]) -> "InstanceConfig":
    """The one place that turns options into the configuration of instances."""
    from xllm_compile.machine import cache_dir
    from xllm_compile.runtime.instance_config import InstanceConfig
    from xllm_compile.runtime.promotion import PromotionConfig

    names = {
        "threads": "num_threads",
        "max_num_seqs": "max_num_seqs",
        "max_num_batched_tokens": "max_num_batched_tokens",
        "max_model_len": "max_model_len",
        "kv_memory": "kv_memory_bytes",
        "kv_host_memory": "kv_host_bytes",
        "kv_swap_memory": "kv_swap_bytes",
        "kv_disk": "kv_disk",
        "kv_disk_size": "kv_disk_bytes",
        "kv_store": "kv_store",
        "kv_store_size": "kv_store_bytes",
        "max_waiting": "max_waiting",
        "max_waiting_tokens": "max_waiting_tokens",
        "scheduling_policy": "scheduling_policy",
        "ttft_slo_ms": "ttft_slo_ms",
        "tpot_slo_ms": "tpot_slo_ms",
    }
    given = {field: options[option] for option, field in names.items() if options[option] is not None}
    promotion = None
    if options["graph_promotion"]:
        promotion = PromotionConfig(store=cache_dir() / "graphs", max_bytes=options["graph_cache_bytes"])
    return InstanceConfig(
        **given,
        async_scheduling=options["async_scheduling"],
        prefix_cache=options["prefix_cache"],
        kv_cache_dtype=options["kv_cache_dtype"],
        kv_pretouch=options["kv_pretouch"],
        enforce_eager=options["enforce_eager"],
        promotion=promotion,
        warm_up=options["warm_up"],
        num_colocated=options["colocated"],
        slow_down=options["slow_down"],
        speculative=speculative_config(options),
        **transfer_options(options),
    )


def speculative_config(options: Mapping[str, Any]) -> "SpeculativeConfig | None":
    """Raises ValueError where the options do not go together."""
    from xllm_compile.runtime.speculative.config import SpeculativeConfig

    method, draft_model = options["speculative"], options["draft_model"]
    if method is None:
        if draft_model is not None:
            raise ValueError("--draft-model is used with --speculative draft only; add it, or leave the model out")
        return None
    if draft_model is not None and method == "draft":
        draft_model = find_artifact(draft_model, options)
    return SpeculativeConfig(
        method=method, draft_model=draft_model, num_speculative_tokens=options["num_speculative_tokens"]
    )
