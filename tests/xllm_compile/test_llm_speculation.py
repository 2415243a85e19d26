"""LLM with speculative decoding, on compiled graphs."""

from pathlib import Path
from typing import Any

import pytest

from xllm_compile.llm import LLM
from xllm_compile.runtime.sampling_params import SamplingParams

PROMPTS = ["import os\nimport sys\nimport os\n", "def read_lines(path):\n    "]


def outputs(demo_artifact: Path, **options: Any) -> list[Any]:
    llm = LLM(demo_artifact, max_num_seqs=2, **options)
    params = [SamplingParams(temperature=temperature, seed=2, max_tokens=40) for temperature in (0.0, 0.7)]
    found = llm.generate(PROMPTS, params, use_tqdm=False)
    llm.engine.close()
    return found


def test_outputs_are_those_without_speculation(demo_artifact: Path) -> None:
    plain = outputs(demo_artifact)
    # The model drafts for itself: most of it is accepted.
    for options in ({"speculative": "ngram"}, {"speculative": "draft", "draft_model": demo_artifact}):
        found = outputs(demo_artifact, **options)
        assert [output.outputs for output in found] == [output.outputs for output in plain]
        drafted = sum(output.metrics.num_draft_tokens for output in found)
        accepted = sum(output.metrics.num_accepted_tokens for output in found)
        assert 0 < accepted <= drafted
    assert found[0].metrics.num_accepted_tokens == found[0].metrics.num_draft_tokens


def test_a_draft_model_needs_its_method(demo_artifact: Path) -> None:
    with pytest.raises(ValueError, match="needs speculative='draft'"):
        LLM(demo_artifact, draft_model=demo_artifact)
    with pytest.raises(ValueError, match="needs a draft model"):
        LLM(demo_artifact, speculative="draft")
