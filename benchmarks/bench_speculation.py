"""Speculative decoding on demo-code at batch 1: tokens per second against plain decoding, in turns.

Text that pays is greedy code continuation that repeats itself, from held-out files whose continuations demo-draft
guesses well (they are named here); text that does not is what the model writes at temperature 2 behind a cross-section
of them. Their greedy and sampled continuations are measured beside them, without a bar. All requests are greedy or
seeded, so every method must give the very same tokens, which is checked.

Each round opens its engines anew: nothing is learnt from outputs of an earlier round. All methods continue a prompt
side by side, some tokens of each in turn.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.artifacts import compile_model
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.decode_turns import DecodeTurns, take_turns
from xllm_compile.benchmarks.load import ForeignLoad, wait_quiet
from xllm_compile.benchmarks.parity import DEMO_MODEL
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.timing import summarise
from xllm_compile.models.demo.corpus import standard_library_files
from xllm_compile.runtime.instance import open_instance
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams
from xllm_compile.runtime.speculative.config import SpeculativeConfig
from xllm_compile.runtime.tokenizer import Tokenizer

PLAIN = "plain"
METHODS = ("suffix", "ngram", "draft")
PAYS, PAYS_NOT = "repetitive code", "temperature 2"
# (held-out file, tokens of it in the prompt)
_PAYS_PROMPTS = (
    ("idlelib/searchbase.py", 200),
    ("ctypes/test/test_values.py", 200),
    ("test/test_gdb/test_cfunction.py", 600),
)
_PROMPT_TOKENS = 200
# What a method generates before it is the next one's turn: some 20 ms.
_TURN_TOKENS = 32
# A graph for every size of a verifying step.
_BUCKETS = ",".join(map(str, (*range(1, 10), 512)))
_LEAST_SPEEDUP, _LEAST_ELSEWHERE = 1.45, 0.97


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    name: str
    prompts: Sequence[Sequence[int]]
    params: SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One case on a fresh engine."""

    seconds_per_token: float
    num_draft_tokens: int
    num_accepted_tokens: int
    tokens: Sequence[Sequence[int]]


def run_speculation(
    work_dir: Path, results: Path, command: Sequence[str], *, rounds: int, output_tokens: int, every: int
) -> None:
    """Measure and write speculation_demo_code.json. ``every``: one in this many held-out files is continued."""
    artifacts = {}
    for name in ("demo-code", "demo-draft"):
        say(f"compiling {name}")
        artifacts[name] = work_dir / "artifacts" / f"{name}-speculation.xllm"
        options = ["--dtype", "bfloat16", "--buckets", _BUCKETS, "--max-num-batched-tokens", "512"]
        compile_model(DEMO_MODEL.parent / name, artifacts[name], options)
    wait_quiet()
    found: dict[str, dict[str, list[Run]]] = {}
    with ForeignLoad() as load:
        for case in _cases(output_tokens, every):
            say(f"{case.name}: {len(case.prompts)} prompts")
            found[case.name] = _measure(case, artifacts, rounds)
    _show(found)
    raw = {
        "output_tokens": output_tokens,
        "prompts_that_pay": [list(prompt) for prompt in _PAYS_PROMPTS],
        "every": every,
        "buckets": _BUCKETS,
        "foreign_cores": load.cores,
        "cases": {
            name: {
                method: {
                    "seconds_per_token": [run.seconds_per_token for run in runs],
                    "speedups": _speedups(by_method, method),
                    "num_draft_tokens": runs[-1].num_draft_tokens,
                    "num_accepted_tokens": runs[-1].num_accepted_tokens,
                }
                for method, runs in by_method.items()
            }
            for name, by_method in found.items()
        },
    }
    finish(make_record("speculation_demo_code", command, seed=0, raw=raw, bars=_bars(found)), results)


def _cases(output_tokens: int, every: int) -> list[Case]:
    tokenizer = Tokenizer.from_directory(DEMO_MODEL)
    files = {str(file.path): file for file in standard_library_files() if file.is_held_out}
    pays = [tokenizer.encode(files[name].text)[:length] for name, length in _PAYS_PROMPTS]
    sample = [tokenizer.encode(file.text)[:_PROMPT_TOKENS] for file in list(files.values())[::every]]

    def params(temperature: float) -> SamplingParams:
        return SamplingParams(
            temperature=temperature,
            seed=1,
            max_tokens=output_tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )

    return [
        Case(name=PAYS, prompts=pays, params=params(0.0)),
        Case(name=PAYS_NOT, prompts=sample, params=params(2.0)),
        Case(name="held-out files, greedy", prompts=sample, params=params(0.0)),
        Case(name="held-out files, temperature 0.8", prompts=sample, params=params(0.8)),
    ]


def _open(artifacts: Mapping[str, Path], method: str) -> DecodeTurns:
    """One method on a fresh engine."""
    config = None
    if method != PLAIN:
        config = SpeculativeConfig(method=method, draft_model=artifacts["demo-draft"] if method == "draft" else None)
    player = DecodeTurns(
        open_instance(artifacts["demo-code"], InstanceConfig(max_num_seqs=1, speculative=config)).engine
    )
    player.warm_up()
    return player


def _measure(case: Case, artifacts: Mapping[str, Path], rounds: int) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {method: [] for method in (PLAIN, *METHODS)}
    # The first round is the warm-up.
    for number in range(1 + rounds):
        for method, run in _round(case, artifacts, number).items():
            runs[method].append(run)
    expected = runs[PLAIN][0].tokens
    for method, found in runs.items():
        if any(run.tokens != expected for run in found):
            raise RuntimeError(
                f"{case.name}: {method} gives other tokens than plain decoding; speculation is not lossless"
            )
    return {method: found[1:] for method, found in runs.items()}


def _round(case: Case, artifacts: Mapping[str, Path], number: int) -> dict[str, Run]:
    """All methods on all prompts of the case, side by side."""
    # Where an engine's memory comes to lie makes a difference of some percent: another one opens first each time.
    order = deque((PLAIN, *METHODS))
    order.rotate(-number)
    players = {method: _open(artifacts, method) for method in order}
    for prompt in case.prompts:
        for player in players.values():
            player.begin([list(prompt)], case.params)
        take_turns(players.values(), _TURN_TOKENS)
    for player in players.values():
        player.engine.close()
    return {
        method: Run(
            seconds_per_token=player.seconds_per_token,
            num_draft_tokens=player.num_draft_tokens,
            num_accepted_tokens=player.num_accepted_tokens,
            tokens=player.tokens,
        )
        for method, player in players.items()
    }


def _speedups(by_method: Mapping[str, Sequence[Run]], method: str) -> list[float]:
    """Of neighbouring runs, round by round."""
    pairs = zip(by_method[PLAIN], by_method[method], strict=True)
    return [plain.seconds_per_token / run.seconds_per_token for plain, run in pairs]


def _bars(found: Mapping[str, Mapping[str, Sequence[Run]]]) -> list[Bar]:
    bars = []
    for name, by_method in found.items():
        limit = {PAYS: f">= {_LEAST_SPEEDUP}", PAYS_NOT: f">= {_LEAST_ELSEWHERE}"}.get(name, "")
        for method in METHODS:
            speedup = summarise(_speedups(by_method, method)).median
            bars.append(Bar(what=f"{name}: {method} against plain", value=speedup, unit="x", bar=limit))
    return bars


def _show(found: Mapping[str, Mapping[str, Sequence[Run]]]) -> None:
    rows: list[tuple[Any, ...]] = []
    for name, by_method in found.items():
        for method, runs in by_method.items():
            rate = summarise([1 / run.seconds_per_token for run in runs]).median
            speedup = summarise(_speedups(by_method, method)).median
            drafted, accepted = runs[-1].num_draft_tokens, runs[-1].num_accepted_tokens
            rows.append((f"{name}: {method}", f"{rate:.0f}", f"{speedup:.2f}", str(drafted), str(accepted)))
    show_table("demo-code, batch 1", ("text: method", "tok/s", "speed-up", "drafted", "accepted"), rows)
