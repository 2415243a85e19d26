"""A serialised GE graph as plain data, and the check of one against the plan of the passes.

Knows neither torch nor protobuf: compile_region.py reads the proto into this.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Positions of the cache among the inputs of the operators that may read or write it.
_WRITER, _WRITTEN = "ScatterNdUpdate", 0
_READER, _READ = "FusedInferAttentionScore", (1, 2)
_VIEW = "Reshape"


class GeGraphError(RuntimeError):
    """A GE graph is not what the passes planned; names region, operator and what differs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeOp:
    """``inputs`` are "operator:output"; an operator that only has to come first has output -1, an absent one is ""."""

    name: str
    type: str
    inputs: tuple[str, ...] = ()
    stream: str | None = None
    cube_cores: str | None = None
    vector_cores: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedOp:
    """What must be in the graph: an operator of this type on this stream with these limits. None: no label."""

    type: str
    stream: str | None = None
    cube_cores: str | None = None
    vector_cores: str | None = None


def check_graph(
    region: str,
    ops: Sequence[GeOp],
    plan: Iterable[PlannedOp],
    caches: Iterable[str],
    scopes: Iterable[PlannedOp] = (),
) -> None:
    """Raise GeGraphError unless

    - there are as many of each planned operator as planned, on the planned streams and cores, and no others;
    - no other operator is on a stream or limited where neither the plan nor ``scopes``, which have no type, say so;
    - ``caches`` (names of inputs) are written and read in place: no operator but the scatter, views of them for the
      attention and the attention itself takes a value of a cache's size, and the scatter writes the input itself.
    """
    _check_plan(region, ops, plan, scopes)
    for cache in caches:
        _check_cache(region, ops, cache)


def _check_plan(region: str, ops: Sequence[GeOp], plan: Iterable[PlannedOp], scopes: Iterable[PlannedOp]) -> None:
    wanted = Counter(plan)
    types = {planned.type for planned in wanted}
    found = Counter(_placed(op) for op in ops if op.type in types)
    for planned in sorted({*wanted, *found}, key=repr):
        if wanted[planned] != found[planned]:
            raise GeGraphError(
                f"region {region}: the passes planned {wanted[planned]} x {_text(planned)},"
                f" the GE graph has {found[planned]}"
            )
    places = {(planned.stream, planned.cube_cores, planned.vector_cores) for planned in [*wanted, *scopes]}
    for op in ops:
        place = (op.stream, op.cube_cores, op.vector_cores)
        if place != (None, None, None) and place not in places:
            raise GeGraphError(f"region {region}: {op.name} is {_text(_placed(op))}, which no pass planned")


def _placed(op: GeOp) -> PlannedOp:
    return PlannedOp(type=op.type, stream=op.stream, cube_cores=op.cube_cores, vector_cores=op.vector_cores)


def _text(planned: PlannedOp) -> str:
    stream = f"stream {planned.stream!r}" if planned.stream is not None else "the main stream"
    if planned.cube_cores is None and planned.vector_cores is None:
        return f"{planned.type} on {stream}"
    return f"{planned.type} on {stream} with {planned.cube_cores} cube and {planned.vector_cores} vector cores"


def _check_cache(region: str, ops: Sequence[GeOp], cache: str) -> None:
    by_name = {op.name: op for op in ops}
    if cache not in by_name:
        raise GeGraphError(f"region {region}: the GE graph has no input {cache}")
    if by_name[cache].type != "RefData":
        raise GeGraphError(f"region {region}: {cache} is {by_name[cache].type}, not RefData: the write would be lost")
    whole = {cache}
    """Names of operators whose first output is as large as the cache."""
    num_writes = 0
    # Operators are listed in topological order.
    for op in ops:
        for position, source in enumerate(op.inputs):
            name, _, output = source.rpartition(":")
            if name not in whole or output == "-1":
                continue
            if op.type == _WRITER and position == _WRITTEN:
                if name != cache:
                    raise GeGraphError(
                        f"region {region}: {op.name} writes {cache} through {name}: the whole cache is copied"
                    )
                num_writes += 1
                whole.add(op.name)
            elif op.type == _VIEW and position == 0:
                whole.add(op.name)
            elif not (op.type == _READER and position in _READ):
                raise GeGraphError(f"region {region}: {op.type} {op.name} copies the whole of {cache}")
    if num_writes != 1:
        raise GeGraphError(f"region {region}: {cache} is written {num_writes} times, planned is once")
