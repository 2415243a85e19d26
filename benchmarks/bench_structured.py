"""Structured output: what a JSON schema costs per token at batch 8, and whether every output fits its schema."""

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.artifacts import artifact_of_demo, artifact_of_shape
from xllm_compile.benchmarks.checkpoints import Shape
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.decode_turns import DecodeTurns, take_turns
from xllm_compile.benchmarks.load import ForeignLoad, wait_quiet
from xllm_compile.benchmarks.random_schemas import random_schema
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.timing import Summary, summarise
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.instance import open_instance
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams
from xllm_compile.runtime.structured_output import StructuredOutput

FREE, SCHEMA = "free", "JSON schema"
# Tokens that the schema forces have a step of their own.
SLOW_SCHEMA = "JSON schema, no jumps"
_TEMPERATURES = {"greedy": 0.0, "temperature 1": 1.0}
_BATCH = 8
_PROMPT_TOKENS = 64
_TURN_TOKENS = 16
"""Of each sequence, before it is the next way's turn."""
# Of one random document; the longest need some hundreds.
_MAX_TOKENS = 1900
# More than fits into any context: the answer never ends before max_tokens.
_ENDLESS = {
    "type": "array",
    "minItems": 10_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "amount": {"type": "number", "multipleOf": 0.01},
            "tags": {"type": "array", "items": {"enum": ["new", "old", "sold"]}, "maxItems": 3},
            "when": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
        },
        "required": ["name", "amount", "tags", "when"],
        "additionalProperties": False,
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Overhead:
    """Of one model at one temperature, by mode: free or under the schema."""

    tpot_s: dict[str, Summary]
    """Seconds from token to token, in rounds."""
    forced_share: dict[str, float]
    """Of the tokens, those without a step of their own."""

    def share(self, mode: str) -> float:
        """What the mode adds to free text, the median of rounds."""
        pairs = zip(self.tpot_s[FREE].values, self.tpot_s[mode].values, strict=True)
        return summarise([with_schema / without - 1 for without, with_schema in pairs]).median


@dataclass(frozen=True, kw_only=True, slots=True)
class Validity:
    num_schemas: int
    num_valid: int
    compile_s: Summary
    num_tokens: int
    failures: list[dict[str, Any]]
    """Seed of the schema, the reason, and the text."""


def run_structured(
    shape: Shape,
    work_dir: Path,
    results: Path,
    command: Sequence[str],
    *,
    seed: int,
    rounds: int,
    output_tokens: int,
    num_schemas: int,
) -> None:
    """Measure demo-code and the shape, write structured_output.json."""
    say(f"compiling demo-code and {shape.name}")
    demo = artifact_of_demo(work_dir)
    artifacts = {"demo-code": demo, shape.name: artifact_of_shape(shape, work_dir, seed=seed)[0]}
    say(f"{num_schemas} random schemas on demo-code")
    validity = check_schemas(_open(demo, _PROMPT_TOKENS + _MAX_TOKENS), num_schemas, seed=seed)
    overheads: dict[tuple[str, str], Overhead] = {}
    foreign = {}
    for name, artifact in artifacts.items():
        wait_quiet()
        with ForeignLoad() as load:
            for way, temperature in _TEMPERATURES.items():
                overheads[name, way] = _measure(artifact, temperature, output_tokens, seed=seed, rounds=rounds)
        foreign[name] = load.cores
    _show(overheads)
    raw = {
        "shape": shape.hf_config(),
        "batch": _BATCH,
        "prompt_tokens": _PROMPT_TOKENS,
        "output_tokens": output_tokens,
        "foreign_cores": foreign,
        "schema": _ENDLESS,
        "found": {
            f"{name}, {way}": {
                "tpot_s": {mode: seconds.to_json() for mode, seconds in each.tpot_s.items()},
                "forced_share": each.forced_share,
            }
            for (name, way), each in overheads.items()
        },
        "validity": {
            "num_schemas": validity.num_schemas,
            "num_valid": validity.num_valid,
            "num_tokens": validity.num_tokens,
            "median_compile_s": validity.compile_s.median,
            "longest_compile_s": validity.compile_s.max,
            "failures": validity.failures,
        },
    }
    finish(make_record("structured_output", command, seed=seed, raw=raw, bars=_bars(overheads, validity)), results)


def check_schemas(engine: Engine, num_schemas: int, *, seed: int) -> Validity:
    """Sample a document for each schema, half of them greedily, and validate it."""
    import jsonschema

    rng = random.Random(seed)
    schemas = {str(at): random_schema(seed + at) for at in range(num_schemas)}
    waiting = list(schemas)
    compile_s, failures, num_tokens = [], [], 0
    while waiting or engine.has_work:
        while waiting and engine.num_waiting == 0:
            name = waiting.pop()
            params = SamplingParams(
                temperature=int(name) % 2,
                seed=int(name),
                max_tokens=_MAX_TOKENS,
                structured=StructuredOutput.json_schema(schemas[name]),
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            began = time.perf_counter()
            engine.add_request(name, [rng.randrange(100, 1000) for _ in range(8)], params)
            compile_s.append(time.perf_counter() - began)
        for output in engine.step():
            (completion,) = output.outputs
            num_tokens += len(completion.token_ids)
            try:
                if completion.finish_reason != "stop":
                    raise ValueError(f"ended by {completion.finish_reason}: {completion.stop_reason}")
                jsonschema.validate(json.loads(completion.text), schemas[output.request_id])
            except (ValueError, jsonschema.ValidationError) as err:
                failure = {"seed": seed + int(output.request_id), "reason": str(err)[:300], "text": completion.text}
                failures.append(failure)
    return Validity(
        num_schemas=num_schemas,
        num_valid=num_schemas - len(failures),
        compile_s=summarise(compile_s),
        num_tokens=num_tokens,
        failures=failures,
    )


def _open(artifact: Path, max_len: int, *, jumps: bool = True) -> Engine:
    return open_instance(
        artifact,
        InstanceConfig(max_model_len=max_len, max_num_seqs=_BATCH, async_scheduling=True, jump_forward=jumps),
    ).engine


def _measure(artifact: Path, temperature: float, output_tokens: int, *, seed: int, rounds: int) -> Overhead:
    """All modes side by side."""
    schema = StructuredOutput.json_schema(_ENDLESS)
    modes = {FREE: None, SCHEMA: schema, SLOW_SCHEMA: schema}
    # One that is ahead of the others may end later than they do.
    max_len = _PROMPT_TOKENS + 2 * output_tokens
    engines = {mode: _open(artifact, max_len, jumps=mode != SLOW_SCHEMA) for mode in modes}
    tpot_s: dict[str, list[float]] = {mode: [] for mode in modes}
    forced_share: dict[str, float] = {}
    rng = random.Random(seed)
    prompts = [[rng.randrange(100, 1000) for _ in range(_PROMPT_TOKENS)] for _ in range(_BATCH)]
    # The first round is the warm-up.
    for _ in range(1 + rounds):
        players = {mode: DecodeTurns(engine) for mode, engine in engines.items()}
        for mode, player in players.items():
            params = SamplingParams(
                temperature=temperature,
                seed=seed,
                ignore_eos=True,
                max_tokens=2 * output_tokens,
                structured=modes[mode],
                output_kind=RequestOutputKind.DELTA,
            )
            player.begin(prompts, params)
        take_turns(players.values(), _BATCH * _TURN_TOKENS, num_turns=output_tokens // _TURN_TOKENS)
        for mode, player in players.items():
            tpot_s[mode].append(_BATCH * player.seconds_per_token)
            forced_share[mode] = player.forced_share
            player.stop()
    for engine in engines.values():
        engine.close()
    return Overhead(tpot_s={mode: summarise(values[1:]) for mode, values in tpot_s.items()}, forced_share=forced_share)


def _show(overheads: Mapping[tuple[str, str], Overhead]) -> None:
    rows = [
        (
            f"{name}, {way}",
            *(f"{seconds.median * 1e3:.3f}" for seconds in each.tpot_s.values()),
            f"{each.forced_share[SCHEMA]:.0%}",
            f"{each.share(SCHEMA):+.1%}",
            f"{each.share(SLOW_SCHEMA):+.1%}",
        )
        for (name, way), each in overheads.items()
    ]
    headings = ("model", "free, ms", "schema, ms", "no jumps, ms", "forced", "more", "no jumps, more")
    show_table(f"TPOT at batch {_BATCH}", headings, rows)


def _bars(overheads: Mapping[tuple[str, str], Overhead], validity: Validity) -> list[Bar]:
    """The bar is for greedy requests."""
    bars = [
        Bar(
            what=f"{name}, batch {_BATCH}, {way}: {mode} adds to TPOT",
            value=each.share(mode) * 100,
            unit="%",
            bar="<= 5" if mode == SCHEMA and _TEMPERATURES[way] == 0 else "",
        )
        for mode in (SCHEMA, SLOW_SCHEMA)
        for (name, way), each in overheads.items()
    ]
    share = validity.num_valid / validity.num_schemas * 100
    return [
        *bars,
        Bar(what=f"{validity.num_schemas} random schemas: valid outputs", value=share, unit="%", bar=">= 100"),
        Bar(what="random schemas: median compile", value=validity.compile_s.median * 1e3, unit="ms"),
    ]
