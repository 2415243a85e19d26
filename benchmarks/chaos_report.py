"""What became of every request while a service was disturbed, and how long its streams stood still for it."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xllm_compile.benchmarks.chaos_faults import Fault
from xllm_compile.benchmarks.openai_client import StreamResult
from xllm_compile.benchmarks.record import Bar
from xllm_compile.benchmarks.timing import percentile

_MAX_ERRORS = 20
# Times the usual gap between a stream's tokens.
_PAUSE = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    token_ids: list[int]
    num_tokens: int
    text: str
    """The right answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One try of a client's request at one gateway."""

    prompt: Prompt
    gateway: str
    result: StreamResult


@dataclass(kw_only=True, slots=True)
class Disturbance:
    fault: Fault
    at_s: float
    """On the clock of the answers' times."""
    over_s: float = math.inf
    """When everybody was back."""


@dataclass(slots=True)
class Tally:
    answers: list[Answer] = field(default_factory=list)
    disturbances: list[Disturbance] = field(default_factory=list)
    num_unanswered: int = 0
    """Requests whose client gave up trying."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Every try, under the one of these that it was."""

    good: list[Answer]
    wrong: list[Answer]
    """Whole, with another text."""
    cut: list[Answer]
    """Their connection ended with their gateway's process."""
    refused: list[Answer]
    """Not begun, and told when to come back."""
    lost: list[Answer]

    @classmethod
    def of(cls, tally: Tally) -> "Outcome":
        found = cls(good=[], wrong=[], cut=[], refused=[], lost=[])
        for answer in tally.answers:
            if answer.result.error is None:
                (found.good if answer.result.text == answer.prompt.text else found.wrong).append(answer)
            elif answer.result.retry_after_s is not None:
                found.refused.append(answer)
            else:
                (found.cut if _is_cut(answer, tally) else found.lost).append(answer)
        return found


def _is_cut(answer: Answer, tally: Tally) -> bool:
    """Whether its gateway was killed under it, or was not there: drained or killed, and not back yet."""
    is_refused = "ConnectionRefusedError" in (answer.result.error or "")
    for each in tally.disturbances:
        if answer.gateway not in each.fault.targets or not _ends_it(each.fault, is_refused=is_refused):
            continue
        if answer.result.sent <= each.over_s and each.at_s <= answer.result.ended:
            return True
    return False


def _ends_it(fault: Fault, *, is_refused: bool) -> bool:
    return fault.action == "kill" or (fault.action == "drain" and is_refused)


def recoveries_s(tally: Tally, kind: str) -> list[float]:
    """Of each stream that such a fault stopped: from the fault to its next token.

    A stream that it did not touch goes on at once, and one that stood still before stands still for another reason:
    only gaps far above the usual ones are counted, of streams that were going on when the fault came.
    """
    found = []
    for disturbance in tally.disturbances:
        if disturbance.fault.kind != kind:
            continue
        for answer in tally.answers:
            times = answer.result.token_times
            if times and times[0] < disturbance.at_s < times[-1]:
                after = next(time_s for time_s in times if time_s > disturbance.at_s)
                before = max(time_s for time_s in times if time_s <= disturbance.at_s)
                usual = sorted(answer.result.itl_s)[len(times) // 2] if len(times) > 2 else 0.0
                if after - before > _PAUSE * usual and disturbance.at_s - before <= _PAUSE * usual:
                    found.append(after - disturbance.at_s)
    return found


def bars_of(tally: Tally, at_rest: Mapping[str, Mapping[str, float]]) -> list[Bar]:
    """at_rest: by part, what it still holds when nothing runs."""
    outcome = Outcome.of(tally)
    held = sum(value for metrics in at_rest.values() for value in metrics.values())
    bars = [
        Bar(what="requests answered", value=len(outcome.good), unit=""),
        Bar(what="requests that failed", value=len(outcome.lost) + tally.num_unanswered, unit="", bar="<= 0"),
        Bar(what="answers with a wrong token", value=len(outcome.wrong), unit="", bar="<= 0"),
        Bar(what="pages, tokens, streams and reservations held at rest", value=held, unit="", bar="<= 0"),
        Bar(what="requests refused with Retry-After", value=len(outcome.refused), unit=""),
        Bar(what="connections cut with their gateway", value=len(outcome.cut), unit=""),
    ]
    for kind in sorted(_kinds(tally)):
        if pauses := sorted(recoveries_s(tally, kind)):
            bars.append(Bar(what=f"{kind}: pause of its streams, median", value=percentile(pauses, 50), unit="s"))
            bars.append(Bar(what=f"{kind}: pause of its streams, p99", value=percentile(pauses, 99), unit="s"))
    return bars


def raw_of(tally: Tally, at_rest: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    outcome = Outcome.of(tally)
    began_s = min((each.at_s for each in tally.disturbances), default=0.0)
    return {
        "num_faults": _kinds(tally),
        "faults": [
            {
                "after_s": round(each.at_s - began_s, 2),
                "kind": each.fault.kind,
                "targets": list(each.fault.targets),
                "lasts_s": round(each.fault.lasts_s, 2),
                "over_after_s": round(each.over_s - began_s, 2),
                "cuts": [f"{source} > {target}" for source, target in each.fault.cuts],
            }
            for each in tally.disturbances
        ],
        "errors": Counter(each.result.error for each in outcome.lost).most_common(_MAX_ERRORS),
        "recoveries_s": {kind: sorted(recoveries_s(tally, kind)) for kind in sorted(_kinds(tally))},
        "at_rest": {name: dict(metrics) for name, metrics in at_rest.items()},
    }


def _kinds(tally: Tally) -> dict[str, int]:
    return dict(Counter(each.fault.kind for each in tally.disturbances))
