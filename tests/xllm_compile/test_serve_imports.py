"""Serving an artifact loads no compiler: import time is start-up time."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
from xllm_compile import LLM, SamplingParams
llm = LLM(sys.argv[1])
outputs = llm.generate(["def add(a, b):", [5]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
import xllm_compile.scheduler.startup
print(json.dumps({
    "tokens": [len(output.outputs[0].token_ids) for output in outputs],
    "modules": sorted(sys.modules),
    "steps": llm.engine.stats().graph_cache.by_outcome(),
}))
"""
FORBIDDEN = (
    "torch._dynamo",
    "torch._inductor",
    "transformers",
    "opentelemetry",
    "sympy",
    "torch._functorch.aot_autograd",
)
BUILD_HALF = ("build", "capture", "cli", "targets", "workers", "graph_passes.pipeline", "models.decoder")


@pytest.mark.integration
def test_generating_from_an_artifact(demo_artifact):
    done = subprocess.run([sys.executable, "-c", SCRIPT, demo_artifact], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == [4, 4]
    assert found["steps"]["padded"] and not found["steps"]["eager"]
    loaded = set(found["modules"])
    assert loaded & {*FORBIDDEN, *(f"xllm_compile.{name}" for name in BUILD_HALF)} == set()
