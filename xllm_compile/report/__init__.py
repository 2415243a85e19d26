"""What the build did, as one page to look at (``report/index.html``) and as entries of the manifest."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from xllm_compile.graph_passes.memory_plan import Lifetimes
from xllm_compile.graph_passes.region import PassReport, RegionGraph
from xllm_compile.report.charts import Block, Span, histogram_chart, memory_chart, timeline_chart

INDEX = "index.html"


def manifest_entry(report: PassReport) -> dict[str, Any]:
    return {key: value for key, value in asdict(report).items() if key not in ("seconds", "program")}


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionReport:
    region: str
    layers: tuple[int, ...]
    passes: Sequence[PassReport]
    ops_before: dict[str, int]
    ops_after: dict[str, int]
    captured: str
    final: str
    graph: RegionGraph
    """After the passes: what it costs is predicted from it."""
    unlowered: RegionGraph
    """Before the passes that steps in halves run after the split; ``graph`` where there are none."""
    lifetimes: Sequence[Lifetimes]
    """Of each piece that is run, in order: the memory plan is made from them."""

    def to_json(self) -> list[dict[str, Any]]:
        """For the manifest, which is the same for the same inputs: no times, no programs."""
        return [manifest_entry(report) for report in self.passes]

    @property
    def num_runs(self) -> int:
        """How often a step runs it."""
        return max(1, len(self.layers))

    @property
    def runs(self) -> str:
        if not self.layers:
            return "Runs once per step."
        return f"Runs {len(self.layers)} times per step, with the weights of each layer; compiled once."

    @property
    def operators(self) -> list[str]:
        return sorted({*self.ops_before, *self.ops_after})

    @property
    def diffs(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Of every pass that changed the program: its name and the lines, each marked "add", "del" or ""."""
        before = self.captured
        for report in self.passes:
            if report.program:
                yield report.name, list(_diff(before, report.program))
                before = report.program


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketReport:
    tokens: tuple[int, ...]
    logits: tuple[int, ...]
    reason: str
    histogram: Mapping[int, float]
    """Weight of each step size; empty where the buckets were given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportPage:
    title: str
    facts: Mapping[str, str]
    regions: Sequence[RegionReport]
    buckets: BucketReport
    timelines: Sequence[tuple[str, Sequence[Span]]] = ()
    memory: Sequence[tuple[str, Sequence[Block]]] = ()

    pool_bytes: int = 0
    """Of the pool that the graphs share, for the largest step."""
    halves: Sequence[PassReport] = ()
    """What was decided for each bucket about steps in two halves, and what the passes did to the regions."""
    halved_buckets: Sequence[int] = ()

    @property
    def graph_bytes(self) -> list[int]:
        """What each graph of the memory plan needs by itself."""
        return [max(block.offset + block.size for block in blocks) for _, blocks in self.memory if blocks]


def write_report(path: Path, page: ReportPage) -> None:
    """One self-contained HTML file: no script, no font and no image from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("xllm_compile.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    charts: dict[str, Any] = {
        "histogram_chart": histogram_chart,
        "timeline_chart": timeline_chart,
        "memory_chart": memory_chart,
    }
    path.write_text(environment.get_template("page.html.j2").render(page=page, **charts), encoding="utf-8")


def _diff(before: str, after: str) -> Iterator[tuple[str, str]]:
    for line in difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=1):
        if not line.startswith(("---", "+++", "@@")):
            yield {"+": "add", "-": "del"}.get(line[:1], ""), line
