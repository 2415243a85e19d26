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
SAMPLED_FREE, SAMPLED_SCHEMA = "free, sampled", "JSON schema, sampled"
# Likewise where tokens that the schema forces have a step of their own.
SLOW_SCHEMA, SLOW_SAMPLED_SCHEMA = "JSON schema, no jumps", "JSON schema, sampled, no jumps"
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
    """Seconds from token to token, free and under a schema, in rounds."""

    tpot_s: dict[str, Summary]
    forced_share: dict[str, float]
    """Of the tokens, those without a step of their own."""

    @property
    def share(self) -> float:
        """What the schema adds to greedy requests, the median of rounds."""
        return self.share_of(FREE, SCHEMA)

    @property
    def sampled_share(self) -> float:
        """Likewise to requests at temperature 1."""
        return self.share_of(SAMPLED_FREE, SAMPLED_SCHEMA)

    def share_of(self, free: str, schema: str) -> float:
        """What the second way adds to the first."""
        pairs = zip(self.tpot_s[free].values, self.tpot_s[schema].values, strict=True)
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
    overheads, foreign = {}, {}
    for name, artifact in artifacts.items():
        wait_quiet()
        with ForeignLoad() as load:
            overheads[name] = _measure(artifact, output_tokens, seed=seed, rounds=rounds)
        foreign[name] = load.cores
    _show(overheads)
    raw = {
        "shape": shape.hf_config(),
        "batch": _BATCH,
        "prompt_tokens": _PROMPT_TOKENS,
        "output_tokens": output_tokens,
        "foreign_cores": foreign,
        "schema": _ENDLESS,
        "tpot_s": {
            name: {mode: each.tpot_s[mode].to_json() for mode in each.tpot_s} for name, each in overheads.items()
        },
        "forced_share": {name: each.forced_share for name, each in overheads.items()},
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


def _measure(artifact: Path, output_tokens: int, *, seed: int, rounds: int) -> Overhead:
    schema = StructuredOutput.json_schema(_ENDLESS)
    # Greedy and sampled, side by side: free, under the schema, and likewise without jumps.
    groups: list[dict[str, tuple[bool, float, StructuredOutput | None]]] = [
        {FREE: (True, 0.0, None), SCHEMA: (True, 0.0, schema), SLOW_SCHEMA: (False, 0.0, schema)},
        {
            SAMPLED_FREE: (True, 1.0, None),
            SAMPLED_SCHEMA: (True, 1.0, schema),
            SLOW_SAMPLED_SCHEMA: (False, 1.0, schema),
        },
    ]
    tpot_s: dict[str, list[float]] = {mode: [] for group in groups for mode in group}
    forced_share: dict[str, float] = {}
    rng = random.Random(seed)
    prompts = [[rng.randrange(100, 1000) for _ in range(_PROMPT_TOKENS)] for _ in range(_BATCH)]
    for group in groups:
        # One that is ahead of the others may end later than they do.
        engines = [_open(artifact, _PROMPT_TOKENS + 2 * output_tokens, jumps=jumps) for jumps, *_ in group.values()]
        # The first round is the warm-up.
        for _ in range(1 + rounds):
            players = {mode: DecodeTurns(engine) for mode, engine in zip(group, engines, strict=True)}
            for mode, player in players.items():
                _, temperature, structured = group[mode]
                params = SamplingParams(
                    temperature=temperature,
                    seed=seed,
                    ignore_eos=True,
                    max_tokens=2 * output_tokens,
                    structured=structured,
                    output_kind=RequestOutputKind.DELTA,
                )
                player.begin(prompts, params)
            take_turns(players.values(), _BATCH * _TURN_TOKENS, num_turns=output_tokens // _TURN_TOKENS)
            for mode, player in players.items():
                tpot_s[mode].append(_BATCH * player.seconds_per_token)
                forced_share[mode] = player.forced_share
                player.stop()
        for engine in engines:
            engine.close()
    return Overhead(tpot_s={mode: summarise(values[1:]) for mode, values in tpot_s.items()}, forced_share=forced_share)


def _show(overheads: Mapping[str, Overhead]) -> None:
    rows = [
        (
            f"{name}, {way}",
            *(f"{each.tpot_s[mode].median * 1e3:.3f}" for mode in (free, schema, slow)),
            f"{each.forced_share[schema]:.0%}",
            f"{each.share_of(free, schema):+.1%}",
            f"{each.share_of(free, slow):+.1%}",
        )
        for name, each in overheads.items()
        for way, free, schema, slow in (
            ("greedy", FREE, SCHEMA, SLOW_SCHEMA),
            ("sampled", SAMPLED_FREE, SAMPLED_SCHEMA, SLOW_SAMPLED_SCHEMA),
        )
    ]
    headings = ("model", "free, ms", "schema, ms", "no jumps, ms", "forced", "more", "no jumps, more")
    show_table(f"TPOT at batch {_BATCH}", headings, rows)


def _bars(overheads: Mapping[str, Overhead], validity: Validity) -> list[Bar]:
    bars = [
        Bar(what=f"{name}, batch {_BATCH}: a JSON schema adds to TPOT", value=each.share * 100, unit="%", bar="<= 5")
        for name, each in overheads.items()
    ]
    bars += [
        Bar(what=f"{name}, batch {_BATCH}, temperature 1: likewise", value=each.sampled_share * 100, unit="%")
        for name, each in overheads.items()
    ]
    bars += [
        Bar(
            what=f"{name}, batch {_BATCH}{way}: a JSON schema without jumps",
            value=each.share_of(free, slow) * 100,
            unit="%",
        )
        for name, each in overheads.items()
        for way, free, slow in (
            ("", FREE, SLOW_SCHEMA),
            (", temperature 1", SAMPLED_FREE, SLOW_SAMPLED_SCHEMA),
        )
    ]
    share = validity.num_valid / validity.num_schemas * 100
    return [
        *bars,
        Bar(what=f"{validity.num_schemas} random schemas: valid outputs", value=share, unit="%", bar=">= 100"),
        Bar(what="random schemas: median compile", value=validity.compile_s.median * 1e3, unit="ms"),
    ]
