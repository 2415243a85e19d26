"""On the real kernels, in bfloat16: rows verified together are, bit for bit, the rows computed one by one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import DEMO_MODEL, EagerModel, eager_model
from xllm_compile.runtime.artifact import ArtifactMismatchError, FileEntry, write_manifest
from xllm_compile.runtime.llm import LLMBase
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.speculative.adaptive import StepSeconds
from xllm_compile.runtime.speculative.config import SpeculativeConfig
from xllm_compile.runtime.speculative.draft_model import DraftModel
from xllm_compile.runtime.speculative.open_speculator import read_draft_manifest
from xllm_compile.runtime.speculative.proposer import Proposer
from xllm_compile.runtime.speculative.speculator import Speculator
from xllm_compile.runtime.speculative.suffix import SuffixProposer
from xllm_compile.runtime.structured_output import StructuredOutput

PROMPTS = [
    "class Stack:\n    def push(self, item):\n        self.items.append(item)\n\n    def pop(self):\n        return ",
    "def read_lines(path):\n    ",
    "import os\nimport sys\n\n\n",
]
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 5, "top_p": 0.95},
    {"temperature": 0, "repetition_penalty": 1.1, "logprobs": 2},
]


@pytest.fixture(scope="module")
def models(kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, EagerModel]:
    names = ("demo-code", "demo-draft")
    folders = {name: tmp_path_factory.mktemp(name) for name in names}
    return {name: eager_model(DEMO_MODEL.parent / name, folders[name], dtype="bfloat16") for name in names}


class FlatSeconds(StepSeconds):
    """Rows cost nothing, however long the kernels take for them on this machine."""

    def observe(self, num_rows: int, seconds: float) -> None:
        pass


def suffix(models: dict[str, EagerModel]) -> Proposer:
    return SuffixProposer(max_shared_tokens=1000)


def draft_model(models: dict[str, EagerModel]) -> Proposer:
    kv_cache = models["demo-draft"].kv_cache(8)
    return DraftModel(models["demo-draft"].runner(kv_cache.layers), kv_cache)


@pytest.mark.parametrize("make_proposer", [suffix, draft_model])
def test_tokens_and_logprobs_are_bit_identical(
    models: dict[str, EagerModel], make_proposer: Callable[[dict[str, EagerModel]], Proposer]
) -> None:
    torch.manual_seed(0)
    target = models["demo-code"]
    params = [SamplingParams(max_tokens=48, ignore_eos=True, **each) for each in PARAMS]
    expected = LLMBase(target.engine()).generate(PROMPTS, params)
    speculator = Speculator(
        make_proposer(models), max_length=6, step_seconds=StepSeconds(lambda rows: 1 + 0.01 * rows), clock=lambda: 0.0
    )
    engine = target.engine(speculator=speculator)
    found = LLMBase(engine).generate(PROMPTS, params)
    assert [output.outputs for output in found] == [output.outputs for output in expected]
    stats = engine.stats()
    assert stats.speculation is not None and stats.speculation.num_accepted_tokens > 0


def test_what_a_schema_forces_is_bit_identical_with_fewer_steps(models: dict[str, EagerModel]) -> None:
    torch.manual_seed(0)
    target = models["demo-code"]
    item = {
        "type": "object",
        "properties": {"name of it": {"enum": ["one thing", "another"]}, "amount": {"type": "integer", "maximum": 99}},
        "required": ["name of it", "amount"],
        "additionalProperties": False,
    }
    structured = StructuredOutput.json_schema({"type": "array", "items": item, "minItems": 5, "maxItems": 5})
    params = [SamplingParams(max_tokens=200, structured=structured, **each) for each in PARAMS]
    expected = LLMBase(target.engine()).generate(PROMPTS, params)
    speculator = Speculator(None, max_length=0, step_seconds=FlatSeconds(lambda rows: 1.0))
    found = LLMBase(target.engine(speculator=speculator)).generate(PROMPTS, params)
    assert [output.outputs for output in found] == [output.outputs for output in expected]
    assert all(output.metrics.num_forced_tokens > 20 for output in found)


def test_a_draft_model_that_does_not_fit_is_refused(models: dict[str, EagerModel], tmp_path: Path) -> None:
    target, draft = models["demo-code"].manifest, models["demo-draft"].manifest
    config = SpeculativeConfig(method="draft", draft_model=tmp_path)
    misfits = {
        "vocab_size=7, the model has 4096": replace(draft, model=replace(draft.model, vocab_size=7)),
        "tensor_parallel_size=2; compile it for 1": replace(draft, tensor_parallel_size=2),
        "brings other kernels": replace(draft, kernels=FileEntry(path="", num_bytes=0, digest="other")),
    }
    for message, manifest in misfits.items():
        write_manifest(tmp_path, manifest)
        with pytest.raises(ArtifactMismatchError, match=message):
            read_draft_manifest(config, target)
    write_manifest(tmp_path, draft)
    found = read_draft_manifest(config, target)
    assert found is not None and found.model == draft.model
