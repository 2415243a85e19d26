"""The graphs of an artifact: which there are, and the key each is known by."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from xllm_compile.graph_store import graph_key
from xllm_compile.runtime.isa import isa_features
from xllm_compile.runtime.program import RegionProgram
from xllm_compile.targets.cpu import inductor_options


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphJob:
    """One graph to have: compiled unless a file with its key exists."""

    program: RegionProgram
    sizes: dict[str, int]
    key: str

    @property
    def file(self) -> str:
        axis = "R" if "R" in self.sizes else "T"
        return f"graphs/{self.program.name}-{f'{axis}{self.sizes[axis]}' if self.sizes else 'dynamic'}.so"


def list_jobs(
    programs: Sequence[RegionProgram], token_buckets: Sequence[int], logits_buckets: Sequence[int], compiler: str
) -> list[GraphJob]:
    """Every graph of the artifact: the dynamic one of each region, and one per bucket where shapes matter."""
    jobs = []
    for program in programs:
        if program.is_eager:
            continue
        if program.name == "head":
            sizes: list[dict[str, int]] = [{"R": rows} for rows in logits_buckets]
        elif program.name == "embed":
            sizes = []
        else:
            sizes = [bucket_sizes(program, tokens) for tokens in token_buckets]
        jobs += [graph_job(program, fixed, compiler) for fixed in [{}, *sizes]]
    return jobs


def bucket_sizes(program: RegionProgram, num_tokens: int) -> dict[str, int]:
    """The symbols that the graph of a bucket fixes: a step has at most as many sequences as tokens.

    A piece of a partial graph fixes the tokens only: attention, the reader of the sequences, is not in it.
    """
    if program.is_piece:
        return {"T": num_tokens}
    return {"T": num_tokens, "S": num_tokens, "S1": num_tokens + 1}


def graph_job(program: RegionProgram, sizes: Mapping[str, int], compiler: str) -> GraphJob:
    """The job of one graph. ``compiler``: build_key.compiler_version()."""
    parts = [
        program.content_hash(),
        json.dumps(dict(sizes), sort_keys=True),
        repr(isa_features()),
        torch.__version__,
        compiler,
        json.dumps(inductor_options(), sort_keys=True, default=str),
    ]
    return GraphJob(program=program, sizes=dict(sizes), key=graph_key(parts))
