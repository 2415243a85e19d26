from pathlib import Path
from typing import Any

import pytest

from xllm_compile.runtime.outputs import EngineStats, SpeculationStats
from xllm_compile.runtime.speculative.config import SpeculativeConfig
from xllm_compile.scheduler.instance_options import speculative_config
from xllm_compile.scheduler.limits import StreamLimiter
from xllm_compile.scheduler.metrics import ServiceMetrics, render


def options(**given: Any) -> dict[str, Any]:
    defaults = {"speculative": None, "draft_model": None, "num_speculative_tokens": 8, "use_compile": False}
    return defaults | given


def test_options_become_the_configuration(tmp_path: Path) -> None:
    assert speculative_config(options()) is None
    assert speculative_config(options(speculative="ngram", num_speculative_tokens=4)) == SpeculativeConfig(
        method="ngram", num_speculative_tokens=4
    )
    (tmp_path / "manifest.json").write_text("{}")
    config = speculative_config(options(speculative="draft", draft_model=tmp_path))
    assert config is not None and config.draft_model == tmp_path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"draft_model": Path("draft.xllm")}, "--speculative draft"),
        ({"speculative": "draft"}, "--draft-model ARTIFACT"),
        ({"speculative": "suffix", "draft_model": Path("draft.xllm")}, "leave it out"),
        ({"speculative": "draft", "draft_model": Path("nowhere.xllm")}, "nowhere.xllm does not exist"),
        ({"speculative": "suffix", "num_speculative_tokens": 0}, r"num_speculative_tokens=0 must be in \[1, 32\]"),
        ({"speculative": "oracle"}, "'oracle' is unknown; choose one of suffix, ngram, draft"),
    ],
)
def test_options_that_do_not_go_together_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        speculative_config(options(**given))


def test_metrics_have_what_was_drafted_and_accepted() -> None:
    stats = EngineStats(
        num_forced_tokens=3,
        speculation=SpeculationStats(
            num_drafts=5, drafted_by_position=[5, 4], accepted_by_position=[4, 1], draft_length=1.8
        ),
    )
    text = render({"m": ServiceMetrics(lambda: stats, StreamLimiter(1))}).decode()
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    expected = {
        "xllm_spec_drafts_total": 5,
        "xllm_spec_draft_tokens_total": 9,
        "xllm_spec_accepted_tokens_total": 5,
        'xllm_spec_draft_tokens_per_pos_total{position="1"}': 4,
        'xllm_spec_accepted_tokens_per_pos_total{position="0"}': 4,
        "xllm_spec_draft_length": 1.8,
    }
    assert {name: float(samples[name]) for name in expected} == expected
    assert "xllm_forced_tokens_total 3.0" in text
    without = render({"m": ServiceMetrics(lambda: EngineStats(), StreamLimiter(1))}).decode()
    assert "xllm_spec" not in without
