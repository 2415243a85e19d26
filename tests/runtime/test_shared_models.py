from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_compile.runtime import shared_models
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.shared_models import plan_models
from xllm_compile.runtime.speculative.config import SpeculativeConfig

MIB = 1 << 20


@dataclass(frozen=True)
class Model:
    name: str = "m"
    num_layers: int = 8
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "bfloat16"
    max_model_len: int = 4096
    kv_bytes_per_token: int = 32768


def manifest_of(weights_mib: int, *, ranks: int = 1) -> Any:
    """As far as the plan reads it. 63 tokens, which are padded, to a page of 2 MiB."""
    return SimpleNamespace(
        model=Model(),
        weights=[SimpleNamespace(num_bytes=weights_mib * MIB - 1)],
        tensor_parallel_size=ranks,
        max_num_batched_tokens=512,
        model_config={"rope": {"rope_type": "default"}},
    )


@pytest.fixture
def manifests(monkeypatch: pytest.MonkeyPatch) -> dict[Path, Any]:
    found = {Path("a"): manifest_of(100), Path("b"): manifest_of(300)}
    monkeypatch.setattr(shared_models, "read_manifest", found.__getitem__)
    return found


def plan(memory_mib: int | None, config: InstanceConfig | None = None, *, may_sleep: bool = False) -> Any:
    artifacts = {"a": Path("a"), "b": Path("b")}
    memory_bytes = None if memory_mib is None else memory_mib * MIB
    return plan_models(artifacts, config or InstanceConfig(), memory_bytes, may_sleep=may_sleep)


@pytest.mark.usefixtures("manifests")
def test_what_weights_leave_is_for_a_sequence_of_each() -> None:
    plans = plan(500)
    assert [plan.num_weight_pages for plan in plans.values()] == [50, 150]
    # 100 MiB are left, 25 pages of 63 tokens for each.
    assert [plan.kv.max_model_len for plan in plans.values()] == [1575, 1575]
    assert all(plan.kv.num_pages == 250 and plan.kv.page_size == 2 * MIB for plan in plans.values())
    # The artifact's own limit is enough where there is more.
    assert [plan.kv.max_model_len for plan in plan(10_000).values()] == [4096, 4096]


@pytest.mark.usefixtures("manifests")
def test_models_that_take_turns_may_have_all_that_their_weights_leave() -> None:
    plans = plan(320, may_sleep=True)
    assert [plan.kv.max_model_len for plan in plans.values()] == [4096, 630]


@pytest.mark.usefixtures("manifests")
@pytest.mark.parametrize(
    ("memory_mib", "config", "may_sleep", "message"),
    [
        (
            500,
            InstanceConfig(max_model_len=4096),
            False,
            "the models need 664 MiB to be served together, memory is 500",
        ),
        (320, InstanceConfig(), False, "the models need 404 MiB .* memory is 320 MiB: 'a' 102 MiB"),
        (300, InstanceConfig(), True, "model 'b' needs 300 MiB for its weights and some for KV; memory is 300 MiB"),
        (310, InstanceConfig(max_model_len=4096), True, "model 'b' needs 300 MiB .* 132 MiB for one sequence"),
        (500, InstanceConfig(max_model_len=5000), False, "max_model_len=5000 is above the 4096"),
        (500, InstanceConfig(kv_memory_bytes=1 << 30), False, "kv_memory_bytes=.* models share their memory"),
        (500, InstanceConfig(kv_pretouch=True), False, "kv_pretouch=True cannot be combined"),
        (
            500,
            InstanceConfig(speculative=SpeculativeConfig(method="draft", draft_model=Path("d"))),
            False,
            "draft_model=d cannot be combined",
        ),
    ],
)
def test_what_the_memory_does_not_hold_is_refused_with_numbers(
    memory_mib: int, config: InstanceConfig, may_sleep: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(memory_mib, config, may_sleep=may_sleep)


def test_an_artifact_of_several_ranks_is_served_alone(manifests: dict[Path, Any]) -> None:
    manifests[Path("b")] = manifest_of(300, ranks=2)
    with pytest.raises(ValueError, match="model 'b' is compiled for 2 ranks"):
        plan(500)


@pytest.mark.usefixtures("manifests")
def test_without_a_budget_it_is_half_of_what_weights_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_models, "available_memory_bytes", lambda: 800 * MIB)
    assert plan(None)["a"].kv.num_pages == 300
    # But no more than all sequences could use.
    one = InstanceConfig(max_num_seqs=1, max_model_len=64)
    assert plan(None, replace(one, max_num_seqs=2))["a"].kv.num_pages < 212
