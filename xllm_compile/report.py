"""What the passes did to each region, as a page to look at and as entries of the manifest."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from xllm_compile.graph_passes.region import PassReport
from xllm_compile.models.config import DecoderConfig

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
td, th {{ border: 1px solid #ccc; padding: .25rem .6rem; text-align: left; }}
pre {{ background: #f6f6f6; overflow-x: auto; padding: 1rem; font-size: 12px; }} .none {{ color: #999; }}
</style><h1>{title}</h1>{body}</html>
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionReport:
    region: str
    passes: Sequence[PassReport]
    ops_before: dict[str, int]
    ops_after: dict[str, int]
    captured: str
    final: str

    def to_json(self) -> list[dict[str, Any]]:
        """For the manifest, which is the same for the same inputs: no times, no programs."""
        return [
            {key: value for key, value in asdict(report).items() if key not in ("seconds", "program")}
            for report in self.passes
        ]


def write_report(path: Path, config: DecoderConfig, reports: Sequence[RegionReport]) -> None:
    """A page with, per region, every pass's matches and skips, operators before and after, and both programs."""
    title = f"Passes on {config.architecture}: {config.num_layers} layers of {config.hidden_size}"
    path.write_text(_PAGE.format(title=escape(title), body="".join(map(_section, reports))))


def _section(report: RegionReport) -> str:
    passes = "".join(
        f"<tr{'' if entry.matches else ' class=none'}><td>{entry.name}<td>{entry.matches}"
        f"<td>{escape(', '.join(f'{reason}: {count}' for reason, count in entry.skips.items()))}"
        for entry in report.passes
    )
    names = sorted({*report.ops_before, *report.ops_after})
    ops = "".join(
        f"<tr><td>{escape(name)}<td>{report.ops_before.get(name, 0)}<td>{report.ops_after.get(name, 0)}"
        for name in names
    )
    return (
        f"<h2>{escape(report.region)}</h2>"
        f"<table><tr><th>pass<th>matches<th>skipped{passes}</table>"
        f"<table><tr><th>operator<th>captured<th>after passes{ops}"
        f"<tr><th>all<th>{sum(report.ops_before.values())}<th>{sum(report.ops_after.values())}</table>"
        f"<details><summary>program as captured</summary><pre>{escape(report.captured)}</pre></details>"
        f"<details open><summary>program after the passes</summary><pre>{escape(report.final)}</pre></details>"
    )
