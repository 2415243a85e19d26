"""The soak in short: the real runner of a compiled model, promotion on, shapes at random."""

import pytest

from xllm_compile.benchmarks.bench_soak import soak
from xllm_compile.machine import cache_dir


@pytest.mark.integration
def test_random_shapes_leave_nothing_unexplained_and_grow_nothing(family_artifact, kernels):
    """Promoted graphs stay in the session's store, so only the first run waits for a compiler."""
    result = soak(family_artifact("qwen3"), cache_dir() / "graphs", num_steps=1500, seed=3)
    assert result.num_counted == result.steps == 1500
    assert result.num_eager == 0 and result.num_nonfinite == 0
    assert not any(reason == "graph_failed" for _, _, reason in result.graphs.choices)
    outcomes = result.graphs.by_outcome()
    assert outcomes["exact"] and outcomes["padded"] and outcomes["dynamic"]
    assert result.graphs.choices["layers", "exact", "promoted"]
    assert result.graphs.promotions["loaded"] >= 1
    assert result.rss_growth_bytes < 16 << 20
