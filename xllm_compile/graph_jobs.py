"""The graphs of an artifact: which there are, and the key each is known by."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xllm_compile.graph_store import graph_key
from xllm_compile.runtime.ops import SCHEMAS
from xllm_compile.runtime.program import RegionProgram
from xllm_compile.targets import Lowering


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphJob:
    """One graph to have: compiled unless a file with its key exists."""

    program: RegionProgram
    sizes: dict[str, int]
    key: str
    suffix: str

    @property
    def file(self) -> str:
        axis = "R" if "R" in self.sizes else "T"
        return f"graphs/{self.program.name}-{f'{axis}{self.sizes[axis]}' if self.sizes else 'dynamic'}{self.suffix}"


def list_jobs(
    programs: Sequence[RegionProgram], token_buckets: Sequence[int], logits_buckets: Sequence[int], lowering: Lowering
) -> list[GraphJob]:
    """Every graph of the artifact."""
    return [
        graph_job(program, sizes, lowering)
        for program in programs
        if not program.is_eager
        for sizes in lowering.graph_sizes(program, token_buckets, logits_buckets)
    ]


def bucket_sizes(program: RegionProgram, num_tokens: int) -> dict[str, int]:
    """The symbols that the graph of a bucket fixes: a step has at most as many sequences as tokens.

    A piece of a partial graph fixes the tokens only: attention, the reader of the sequences, is not in it.
    """
    if program.is_piece:
        return {"T": num_tokens}
    return {"T": num_tokens, "S": num_tokens, "S1": num_tokens + 1}


def graph_job(program: RegionProgram, sizes: Mapping[str, int], lowering: Lowering) -> GraphJob:
    """The job of one graph. Its key covers program, sizes, the operators' interface and what the target depends on."""
    # The text of a call does not tell the C types that compiled code passes.
    schemas = {name: schema for name, schema in SCHEMAS.items() if f"ops.xllm.{name}." in program.code}
    parts = [program.content_hash(), json.dumps(dict(sizes), sort_keys=True), json.dumps(schemas, sort_keys=True)]
    key = graph_key([*parts, *lowering.environment()])
    return GraphJob(program=program, sizes=dict(sizes), key=key, suffix=lowering.graph_suffix)
