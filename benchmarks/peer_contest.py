"""Engines at one precision, measured in turns, case by case: all stay loaded, the others are stopped meanwhile.

The machine's bandwidth changes within minutes. Engines that run a case one after the other have the same of it, so what
is compared is their rates of the same round.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.bench_latency import Case, LimitedRates, prompts_of
from xllm_compile.benchmarks.bench_precisions import WIDE, rates_of
from xllm_compile.benchmarks.checkpoints import Shape
from xllm_compile.benchmarks.console import say
from xllm_compile.benchmarks.contestants import OFFLINE, RUN, Contestant
from xllm_compile.benchmarks.engine_process import EngineProcess, TokenIds
from xllm_compile.benchmarks.limits import Limits, measure_limits
from xllm_compile.benchmarks.load import ForeignLoad, process_tree, wait_quiet
from xllm_compile.benchmarks.offline_workload import OfflineWorkload
from xllm_compile.benchmarks.server_process import process_memory
from xllm_compile.benchmarks.timing import summarise

Call = Callable[[EngineProcess], dict[str, float]]
"""What an engine does, and its tok/s by case."""


@dataclass(kw_only=True, slots=True)
class Found:
    """What one contestant did."""

    rates: dict[str, LimitedRates] = field(default_factory=dict)
    """By case. Of the offline requests prompt and output tokens count alike."""
    first_tokens: float = 0.0
    """Share of prompts whose first token is the reference's."""
    peak_bytes: int = 0
    """Most resident memory that its process ever had."""

    def median(self, case: str) -> float:
        return summarise(self.rates[case].tokens_per_s).median

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens_per_s": {case: rates.to_json() for case, rates in self.rates.items()},
            "first_tokens_equal": self.first_tokens,
            "peak_resident_bytes": self.peak_bytes,
        }

    def add(self, case: str, rate: float, load: ForeignLoad) -> None:
        self.rates.setdefault(case, LimitedRates()).add(rate, load)

    def add_limits(self, before: Limits, after: Limits) -> None:
        """Measured around all rates that have none yet."""
        for rates in self.rates.values():
            rates.add_limits(before, after)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """Prompts, and the first token that the reference generates for each."""

    prompts: list[TokenIds]
    first_tokens: list[int]


def compete(
    engines: Sequence[Contestant],
    shape: Shape,
    limits_of: Path,
    workload: OfflineWorkload,
    checked: Checked,
    *,
    rounds: int,
    offline_rounds: int,
    seed: int,
) -> dict[str, Found]:
    """By contestant's name. limits_of: an artifact, whose kernels measure the machine."""
    prompts = prompts_of(RUN, shape, seed)
    found = {engine.name: Found() for engine in engines}
    with ExitStack() as stack:
        processes = {}
        for engine in engines:
            process = stack.enter_context(
                EngineProcess(engine.name, engine.module, engine.arguments, python=engine.python)
            )
            # Before the process ends itself, it must run again.
            stack.callback(_signal, process.pid, signal.SIGCONT)
            say(f"loading and warming up {engine.name}")
            process.wait_ready()
            for case in (case for case in engine.cases if case is not WIDE):
                process.generate(prompts[case.name], 1 if case.is_prefill else 4)
            found[engine.name].first_tokens = _share_equal(process, checked)
            _signal(process.pid, signal.SIGSTOP)
            processes[engine.name] = process
        before = measure_limits(limits_of)
        for index in range(max(rounds, offline_rounds)):
            calls: dict[str, Call] = {}
            if index < rounds:
                # The prompts of WIDE take as long as all else in a round.
                cases = [case for case in RUN if case is not WIDE or index % 2 == 0]
                calls |= {case.name: partial(_generate, case, prompts[case.name]) for case in cases}
            if index < offline_rounds:
                calls[OFFLINE] = partial(_complete, workload)
            for name, call in calls.items():
                takers = [engine for engine in engines if name in engine.calls]
                for engine in takers if index % 2 == 0 else reversed(takers):
                    _measure(call, processes[engine.name], found[engine.name])
                after = measure_limits(limits_of)
                for engine in takers:
                    found[engine.name].add_limits(before, after)
                did = ", ".join(f"{one.name} {found[one.name].rates[name].tokens_per_s[-1]:.1f}" for one in takers)
                say(
                    f"round {index + 1} of {max(rounds, offline_rounds)}, {name}, tok/s: {did}; read"
                    f" {before.read_gb_per_s:.0f} then {after.read_gb_per_s:.0f} GB/s"
                )
                before = after
        for engine in engines:
            found[engine.name].peak_bytes = _peak_bytes(processes[engine.name].pid)
    return found


def _measure(call: Call, process: EngineProcess, found: Found) -> None:
    wait_quiet()
    with _running(process.pid), ForeignLoad() as load:
        rates = call(process)
    for case, rate in rates.items():
        found.add(case, rate, load)


def _generate(case: Case, prompts: list[TokenIds], process: EngineProcess) -> dict[str, float]:
    return rates_of(case, process.generate(prompts, 1 + case.num_tokens))


def _complete(workload: OfflineWorkload, process: EngineProcess) -> dict[str, float]:
    done = process.complete(workload.prompts, workload.lengths)
    return {OFFLINE: (workload.num_prompt_tokens + workload.num_output_tokens) / done.seconds}


def _share_equal(process: EngineProcess, checked: Checked) -> float:
    first = [process.generate([prompt], 1).token_ids[0][0] for prompt in checked.prompts]
    return [ours == theirs for ours, theirs in zip(first, checked.first_tokens, strict=True)].count(True) / len(first)


@contextmanager
def _running(pid: int) -> Iterator[None]:
    _signal(pid, signal.SIGCONT)
    try:
        yield
    finally:
        _signal(pid, signal.SIGSTOP)


def _signal(pid: int, number: signal.Signals) -> None:
    """Send it to the process and its descendants; one that has ended needs none."""
    for one in process_tree(pid):
        try:
            os.kill(one, number)
        except ProcessLookupError:
            continue


def _peak_bytes(pid: int) -> int:
    return sum(process_memory(one).get("rss_peak", 0) for one in process_tree(pid))
