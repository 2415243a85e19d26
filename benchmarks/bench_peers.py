"""Other CPU engines and ours on one checkpoint and workload, in one run, the machine's limits around each.

By precision: all engines with the settings that suit each best, in turns (peer_contest.py). Random weights say nothing
of quality; how many first tokens are those of transformers in float32 stands beside the speeds all the same, as a
wrong result is quickly computed.
"""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from xllm_compile.benchmarks.artifacts import artifact_of_shape
from xllm_compile.benchmarks.bench_precisions import LONG
from xllm_compile.benchmarks.checkpoints import Shape, checkpoint
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.contestants import CASES, KV_GIB, OFFLINE, OURS, Contestant, contestants
from xllm_compile.benchmarks.engine_process import EngineProcess
from xllm_compile.benchmarks.load import wait_quiet
from xllm_compile.benchmarks.offline_workload import random_workload, read_workload
from xllm_compile.benchmarks.openai_client import stream_completion
from xllm_compile.benchmarks.peer_chart import ratio_picture
from xllm_compile.benchmarks.peer_contest import Checked, Found, compete
from xllm_compile.benchmarks.peer_models import OPENVINO, VLLM, find_peers
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.server_process import ServerProcess
from xllm_compile.benchmarks.timing import summarise

SERVE = "xllm-serve"
_ALL_CASES = (*(case.name for case in CASES), OFFLINE)
_START_TOKENS = 32

Results = Mapping[str, Mapping[str, Found]]
"""By precision, then by contestant."""


def run_peers(
    shape: Shape,
    work_dir: Path,
    results: Path,
    command: Sequence[str],
    *,
    seed: int,
    rounds: int,
    offline_rounds: int,
    starts: int,
    num_checked: int,
    precisions: Sequence[str],
    pythons: Mapping[str, Path],
    num_requests: int,
    workload: Path | None,
) -> None:
    """Measure and write peers_SHAPE.json and .svg; with some precisions only, their names are added."""
    peers = find_peers(pythons)
    requests = (
        random_workload(num_requests, shape.num_words, seed=seed)
        if workload is None
        else read_workload(workload, num_requests, shape.vocab_size)
    )
    engines = {precision: contestants(shape, precision, peers, work_dir, seed=seed) for precision in precisions}
    limits_of, _ = artifact_of_shape(shape, work_dir, seed=seed)
    checked = _reference(shape, work_dir, seed=seed, num_prompts=num_checked)
    found: dict[str, dict[str, Found]] = {}
    for precision in precisions:
        say(f"comparing at {precision}")
        found[precision] = compete(
            engines[precision],
            shape,
            limits_of,
            requests,
            checked,
            rounds=rounds,
            offline_rounds=offline_rounds,
            seed=seed,
        )
    start_s = _starts(engines[precisions[0]], shape, starts, seed=seed)
    for precision, of in found.items():
        _show(shape, precision, of)
    bars = make_bars(found, engines, start_s)
    raw = {
        "shape": shape.hf_config(),
        "kv_gib": KV_GIB,
        "peers": dict(peers.versions),
        "cases": [asdict(case) for case in CASES],
        "offline": {
            "num_requests": len(requests.lengths),
            "prompt_tokens": requests.num_prompt_tokens,
            "output_tokens": requests.num_output_tokens,
        },
        "num_first_tokens_checked": num_checked,
        "engines": {
            precision: {
                engine.name: {"arguments": _arguments(engine), **found[precision][engine.name].to_json()}
                for engine in engines[precision]
            }
            for precision in precisions
        },
        "start_to_first_token_s": {name: summarise(values).to_json() for name, values in start_s.items()},
    }
    name = "_".join(["peers", shape.record_name, *(precisions if len(precisions) < 3 else ())])
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.svg").write_text(ratio_picture(shape.name, ratios(found, engines)))
    finish(make_record(name, command, seed=seed, raw=raw, bars=bars), results)


def ratios(found: Results, engines: Mapping[str, Sequence[Contestant]]) -> dict[str, dict[str, dict[str, float]]]:
    """Ours against each peer, by precision and case; above 1 ours is faster. Of each engine its best setting.

    Medians of the rounds' ratios, not ratios of medians: in a round both ran at about the same time.
    """
    table = {}
    for precision, of in found.items():
        best: dict[str, dict[str, Found]] = {}
        for engine in engines[precision]:
            one = of[engine.name]
            for case in one.rates:
                by_engine = best.setdefault(case, {})
                other = by_engine.setdefault(engine.engine, one)
                if one.median(case) > other.median(case):
                    by_engine[engine.engine] = one
        table[precision] = {
            case: {
                peer: _median_ratio(best[case][OURS], other, case) for peer, other in best[case].items() if peer != OURS
            }
            for case in _ALL_CASES
            if case in best
        }
    return table


def _median_ratio(ours: Found, other: Found, case: str) -> float:
    pairs = zip(ours.rates[case].tokens_per_s, other.rates[case].tokens_per_s, strict=True)
    return summarise([mine / theirs for mine, theirs in pairs]).median


def make_bars(
    found: Results, engines: Mapping[str, Sequence[Contestant]], start_s: Mapping[str, Sequence[float]]
) -> list[Bar]:
    """A bar that needs an engine which was not given is left out."""
    bars = []
    for precision, cases in ratios(found, engines).items():
        for case, against in cases.items():
            if case == LONG.name and OPENVINO in against:
                what = f"{precision}, {case}: against {OPENVINO} at its best KV setting"
                bars.append(Bar(what=what, value=against[OPENVINO], unit="x", bar=">= 1"))
            if against:
                peer = min(against, key=lambda name: against[name])
                bar = ">= 1.3" if case == OFFLINE else ""
                what = f"{precision}, {case}: against the best peer"
                bars.append(Bar(what=f"{what} ({peer})", value=against[peer], unit="x", bar=bar))
        bars += _memory_bars(precision, engines[precision], found[precision])
        bars += [
            Bar(what=f"{precision}, {engine}: first tokens equal to float32", value=one.first_tokens, unit="share")
            for engine, one in found[precision].items()
        ]
    seconds = {name: summarise(values).median for name, values in start_s.items()}
    if SERVE in seconds:
        bars.append(Bar(what=f"{SERVE}: start to first token", value=seconds[SERVE], unit="s", bar="<= 2"))
    if OPENVINO in seconds:
        what = f"{OURS}: start to first token, against {OPENVINO}'s"
        bars.append(Bar(what=what, value=seconds[OURS] / seconds[OPENVINO], unit="x", bar="< 1"))
    return bars


def _memory_bars(precision: str, engines: Sequence[Contestant], found: Mapping[str, Found]) -> list[Bar]:
    whole = [engine for engine in engines if engine.is_whole]
    ours, peers = (
        {engine.name: found[engine.name].peak_bytes for engine in whole if (engine.engine == OURS) is is_ours}
        for is_ours in (True, False)
    )
    if not peers:
        return []
    least = min(peers, key=lambda name: peers[name])
    what = f"{precision}: peak resident memory, against the peer with the least ({least})"
    return [Bar(what=what, value=min(ours.values()) / peers[least], unit="x", bar="<= 1.05")]


def _reference(shape: Shape, work_dir: Path, *, seed: int, num_prompts: int) -> Checked:
    say("first tokens of transformers in float32")
    rng = random.Random(seed)
    prompts = [[rng.randrange(shape.num_words) for _ in range(rng.randrange(8, 65))] for _ in range(num_prompts)]
    arguments = [str(checkpoint(shape, work_dir, seed=seed)), "eager", "--dtype", "float32"]
    with EngineProcess("transformers", "engine_transformers", arguments) as engine:
        engine.wait_ready()
        first = [engine.generate([prompt], 1).token_ids[0][0] for prompt in prompts]
    return Checked(prompts=prompts, first_tokens=first)


def _starts(engines: Sequence[Contestant], shape: Shape, count: int, *, seed: int) -> dict[str, list[float]]:
    """Seconds from the start of a process to its first token, in turns; the first round warms the disk cache."""
    rng = random.Random(seed)
    prompt = [rng.randrange(shape.num_words) for _ in range(_START_TOKENS)]
    # vLLM compiles for half a minute at each start, its caches notwithstanding.
    whole = [engine for engine in engines if engine.is_whole and engine.engine != VLLM]
    found: dict[str, list[float]] = {SERVE: [], **{engine.name: [] for engine in whole}}
    for index in range(-1, count):
        wait_quiet()
        seconds = {SERVE: _serve_start(Path(whole[0].arguments[0]), prompt)}
        seconds |= {engine.name: _library_start(engine, prompt) for engine in whole}
        say("start to first token: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
        for name, value in seconds.items():
            if index >= 0:
                found[name].append(value)
    return found


def _library_start(engine: Contestant, prompt: list[int]) -> float:
    with EngineProcess(engine.name, engine.module, engine.arguments, python=engine.python) as process:
        process.wait_ready()
        process.generate([prompt], 1)
        return time.monotonic() - process.started


def _serve_start(artifact: Path, prompt: list[int]) -> float:
    with ServerProcess(artifact) as server:
        server.wait_ready()
        result = asyncio.run(stream_completion(server.host, server.port, prompt, 4))
        if result.error is not None:
            raise RuntimeError(f"the first request failed: {result.error}")
        return result.token_times[0] - server.started


def _show(shape: Shape, precision: str, found: Mapping[str, Found]) -> None:
    rows = [
        (f"{case}, tok/s", *(f"{one.median(case):.1f}" if case in one.rates else "" for one in found.values()))
        for case in _ALL_CASES
        if any(case in one.rates for one in found.values())
    ]
    rows.append(("peak resident memory, MiB", *(f"{one.peak_bytes / 2**20:.0f}" for one in found.values())))
    rows.append(("first tokens equal to float32", *(f"{one.first_tokens:.2f}" for one in found.values())))
    show_table(f"{shape.name}, {precision}", ("", *found), rows)


def _arguments(engine: Contestant) -> list[str]:
    """Without the folders of this machine."""
    return [Path(word).name if Path(word).is_absolute() else word for word in engine.arguments]
