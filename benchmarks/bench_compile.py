"""Compile time: cold, with twice the layers, with 8 buckets, with nothing changed, with one pass switched off."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.artifacts import compile_model
from xllm_compile.benchmarks.checkpoints import Shape, checkpoint
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.load import ForeignLoad, wait_quiet
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.timing import summarise
from xllm_compile.runtime.artifact import read_manifest

DISABLED_PASS = "silu_mul"
EIGHT_BUCKETS = "1,2,4,8,16,64,256,512"


@dataclass(kw_only=True, slots=True)
class _Case:
    what: str
    seconds: list[float] = field(default_factory=list)
    foreign_cores: list[float] = field(default_factory=list)

    def run(self, model_dir: Path, output: Path, env: dict[str, str], options: Sequence[str] = ()) -> None:
        wait_quiet()
        with ForeignLoad() as load:
            self.seconds.append(compile_model(model_dir, output, options, env))
        self.foreign_cores.append(load.cores)
        say(f"{self.what}: {self.seconds[-1]:.1f} s (others used {load.cores:.2f} cores)")

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "seconds": summarise(self.seconds).to_json(), "foreign_cores": self.foreign_cores}


def run_compile(
    shape: Shape, work_dir: Path, results: Path, command: Sequence[str], *, seed: int, repeats: int
) -> None:
    """Measure and write compile_time.json."""
    deeper = shape.with_layers(2 * shape.num_layers)
    models = {each.num_layers: checkpoint(each, work_dir, seed=seed) for each in (shape, deeper)}
    cold, deep = (_Case(what=f"cold, {layers} layers") for layers in models)
    eight = _Case(what=f"cold, {shape.num_layers} layers, 8 buckets")
    pass_seconds = []
    unchanged = _Case(what="nothing changed")
    switched = _Case(what=f"one pass off ({DISABLED_PASS})")
    graphs = {}
    for index in range(repeats):
        say(f"round {index + 1} of {repeats}")
        scratch = Path(tempfile.mkdtemp(prefix="compile-", dir=work_dir))
        try:
            for case, (layers, model_dir) in zip((cold, deep), models.items(), strict=True):
                case.run(model_dir, scratch / f"{layers}.xllm", cold_environment(scratch / f"cold-{layers}"))
            environment, output = cold_environment(scratch / "cold-eight"), scratch / "eight.xllm"
            eight.run(models[shape.num_layers], output, environment, ["--buckets", EIGHT_BUCKETS])
            pass_seconds.append(read_manifest(output).pass_seconds)
            # What a user sees in the same shell as the first build.
            warm, output = cold_environment(scratch / f"cold-{shape.num_layers}"), scratch / f"{shape.num_layers}.xllm"
            unchanged.run(models[shape.num_layers], output, warm)
            graphs = {entry.file.path: entry.key for entry in read_manifest(output).graphs}
            switched.run(models[shape.num_layers], output, warm, ["--disable-pass", DISABLED_PASS])
            after = {entry.file.path: entry.key for entry in read_manifest(output).graphs}
        finally:
            shutil.rmtree(scratch)
    cases = (cold, deep, unchanged, switched, eight)
    medians = [summarise(case.seconds).median for case in cases]
    num_changed = len(set(after.values()) - set(graphs.values()))
    raw = {
        "shape": shape.hf_config(),
        "cases": [case.to_json() for case in cases],
        "pass_seconds": pass_seconds,
        "num_graphs": len(graphs),
        "num_graphs_changed_by_the_pass": num_changed,
    }
    bars = [
        Bar(what=f"cold compile, {shape.num_layers} layers", value=medians[0], unit="s", bar="<= 180"),
        Bar(
            what=f"cold compile, {deeper.num_layers} layers against {shape.num_layers}",
            value=medians[1] / medians[0],
            unit="x",
            bar="<= 1.3",
        ),
        Bar(what="compile with nothing changed", value=medians[2], unit="s", bar="<= 5"),
        Bar(what="cold compile, 8 buckets, all passes", value=medians[4], unit="s", bar="<= 240"),
        Bar(
            what="passes of a cold compile with 8 buckets",
            value=max(pass_seconds) / medians[4],
            unit="share",
            bar="<= 0.1",
        ),
        Bar(what=f"compile with {num_changed} of {len(graphs)} graphs changed", value=medians[3], unit="s"),
    ]
    rows = [
        (case.what, f"{median:.1f}", f"{min(case.seconds):.1f}", f"{max(case.seconds):.1f}")
        for case, median in zip(cases, medians, strict=True)
    ]
    show_table(f"xllm-compile, {shape.name}", ("case", "median s", "min s", "max s"), rows)
    finish(make_record("compile_time", command, seed=seed, raw=raw, bars=bars), results)


def cold_environment(folder: Path) -> dict[str, str]:
    """Every place where torch or this project keeps compiled code, moved to ``folder``."""
    caches = {"XDG_CACHE_HOME": "xdg", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TMPDIR": "tmp"}
    for name in caches.values():
        (folder / name).mkdir(parents=True, exist_ok=True)
    return {variable: str(folder / name) for variable, name in caches.items()}
