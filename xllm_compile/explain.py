"""xllm-compile --explain: the pass catalogue and what each pass does to this model, without compiling."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from xllm_compile.bucket_plan import read_workload
from xllm_compile.build import plan_buckets, plan_halves
from xllm_compile.build_config import BuildConfig
from xllm_compile.device import choose_device
from xllm_compile.pass_catalogue import PassRow, pass_rows
from xllm_compile.progress import NoProgress
from xllm_compile.region_programs import make_programs
from xllm_compile.report import RegionReport
from xllm_compile.source_reader import read_source


def explain_passes(config: BuildConfig) -> None:
    """Print to stdout: the catalogue with matches and operator counts per region, what was not run and why, what was
    left alone and why, operators by name, and the buckets."""
    source = read_source(config)
    _, reports = make_programs(source, config, NoProgress())
    device = choose_device(config.target, config.device_spec)
    _, buckets = plan_buckets(config, read_workload(config), device, reports)
    split = plan_halves(config, source, reports, buckets.tokens, device)
    rows = pass_rows(config, reports, split)
    regions = [report.region for report in reports]
    console = Console()
    console.print(
        _passes_run(rows, regions, f"Passes on {source.config.architecture}: matches (operators before -> after)")
    )
    console.print(_passes_not_run(rows))
    left_alone = _left_alone(rows)
    if left_alone.row_count:
        console.print(left_alone)
    console.print(_operators(reports))
    console.print(f"Token buckets {list(buckets.tokens)}, logits buckets {list(buckets.logits)} ({buckets.reason}).")
    if split.buckets:
        console.print(f"Steps in the buckets {list(split.buckets)} run in halves.")
    if config.graph_mode == "eager":
        console.print("With --graph-mode eager no graph is compiled: steps run operator by operator.")
    else:
        console.print("Each layer region runs once per layer; its graphs are compiled once.")


def _passes_run(rows: Sequence[PassRow], regions: Sequence[str], title: str) -> Table:
    table = _table(title, "pass", "what it does")
    for region in regions:
        table.add_column(region, justify="right")
    for row in rows:
        if not row.reason:
            table.add_row(row.name, row.summary, *(_cell(row, region) for region in regions))
    return table


def _cell(row: PassRow, region: str) -> str:
    before, after = row.operators(region)
    return f"{row.matches(region)} ({before} -> {after})" if row.matches(region) else "-"


def _passes_not_run(rows: Sequence[PassRow]) -> Table:
    table = _table("Passes not run", "pass", "what it does", "why not")
    for row in rows:
        if row.reason:
            table.add_row(row.name, row.summary, row.reason)
    return table


def _left_alone(rows: Sequence[PassRow]) -> Table:
    table = _table("Left alone", "pass", "region", "why")
    table.add_column("times", justify="right")
    for row in rows:
        for region, reports in row.reports.items():
            for report in reports:
                for reason, count in report.skips.items():
                    table.add_row(row.name, region, reason, str(count))
    return table


def _operators(reports: Sequence[RegionReport]) -> Table:
    table = _table("Operators per run of a region, captured -> after the passes", "operator")
    for report in reports:
        table.add_column(report.region, justify="right")
    for name in sorted({op for report in reports for op in report.operators}):
        table.add_row(
            name, *(_arrow(report.ops_before.get(name, 0), report.ops_after.get(name, 0)) for report in reports)
        )
    table.add_section()
    table.add_row("all", *(_arrow(sum(r.ops_before.values()), sum(r.ops_after.values())) for r in reports))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0)
    return table


def _arrow(before: int, after: int) -> str:
    return "" if before == after == 0 else f"{before} -> {after}"
