"""xllm-compile --explain: the pass catalogue and what each pass does to this model, without compiling."""

from rich.console import Console
from rich.table import Table

from xllm_compile.bucket_plan import read_workload
from xllm_compile.build import make_programs, plan_buckets, read_source
from xllm_compile.build_config import BuildConfig
from xllm_compile.device import choose_device
from xllm_compile.progress import NoProgress
from xllm_compile.targets import lowering_for


def explain_passes(config: BuildConfig) -> None:
    """Print the catalogue, matches per region, operator counts before and after, and the buckets, to stdout."""
    source = read_source(config)
    _, reports = make_programs(source, config, NoProgress())
    matches = Table(title=f"Passes on {source.config.architecture}", title_justify="left")
    matches.add_column("pass")
    matches.add_column("what it does")
    for report in reports:
        matches.add_column(report.region, justify="right")
    passes = lowering_for(config.target).pipeline(
        tied_weights=frozenset(),
        max_model_len=source.max_model_len,
        disabled=config.disabled_passes,
        quantisation=config.quantisation,
    )
    summaries = {step.name: step.summary for step in passes}
    for index, (name, summary) in enumerate(summaries.items()):
        found = [report.passes[index] for report in reports]
        cells = [str(entry.matches) if entry.matches else "-" for entry in found]
        matches.add_row(name, summary, *cells)
    operators = Table(title="Operators per run of a region, captured -> after the passes", title_justify="left")
    operators.add_column("operator")
    for report in reports:
        operators.add_column(report.region, justify="right")
    for name in sorted({op for report in reports for op in {**report.ops_before, **report.ops_after}}):
        operators.add_row(
            name, *(_arrow(report.ops_before.get(name, 0), report.ops_after.get(name, 0)) for report in reports)
        )
    operators.add_section()
    operators.add_row("all", *(_arrow(sum(r.ops_before.values()), sum(r.ops_after.values())) for r in reports))
    device = choose_device(config.target, config.device_spec)
    _, buckets = plan_buckets(config, read_workload(config), device, reports)
    console = Console()
    console.print(matches)
    console.print(operators)
    console.print(f"Token buckets {list(buckets.tokens)}, logits buckets {list(buckets.logits)} ({buckets.reason}).")
    console.print("Each layer region runs once per layer; its graphs are compiled once.")


def _arrow(before: int, after: int) -> str:
    return "" if before == after == 0 else f"{before} -> {after}"
