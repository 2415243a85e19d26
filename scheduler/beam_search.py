"""Beam search, as vLLM offers it: each step asks the engine for one token of every beam, and its best alternatives.

The engine knows nothing of beams: a step is as many requests for one token, on prompts that end with what the beam has
so far. Without a prefix cache each of them computes its prompt again; with one, its last tokens.

A beam's score is its cumulative log-probability divided by the number of its tokens, without an end-of-sequence, to
the power of ``length_penalty``.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from xllm_compile.runtime.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from xllm_compile.runtime.sampling_params import MAX_LOGPROBS, RequestOutputKind, SamplingParams
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.engine_client import ServiceTokenizer
from xllm_compile.scheduler.service import Service

MAX_BEAM_WIDTH = MAX_LOGPROBS // 2
"""A step looks at twice as many alternatives of each beam: half of them may be ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamSearchParams:
    """Raises ValueError, naming field, value and limit, on a bad value."""

    beam_width: int
    max_tokens: int
    n: int = 1
    """Beams that are answered."""
    length_penalty: float = 1.0
    """Above 1 favours long answers, below 1 short ones."""
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    priority: int = 0
    offline: bool = False
    """Of every step's requests, as in SamplingParams."""
    logprobs: int | None = None
    """Shown with each token: of the token itself and of this many most probable ones; None shows none."""

    def __post_init__(self) -> None:
        if not 1 <= self.beam_width <= MAX_BEAM_WIDTH:
            raise ValueError(f"beam_width={self.beam_width} must be in [1, {MAX_BEAM_WIDTH}]")
        if not 1 <= self.n <= self.beam_width:
            raise ValueError(f"n={self.n} must be in [1, {self.beam_width}], the width of the beam")
        if not -10 <= self.length_penalty <= 10:
            raise ValueError(f"length_penalty={self.length_penalty} must be in [-10, 10]")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Beam:
    """A continuation of the prompt."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[dict[int, Logprob], ...] = ()
    cumulative_logprob: float = 0.0
    is_ended: bool = False
    """The last token is an end-of-sequence."""

    def score(self, length_penalty: float) -> float:
        return score(self.cumulative_logprob, len(self.tokens) - self.is_ended, length_penalty)

    def extended(self, token_id: int, step: dict[int, Logprob], *, is_end: bool) -> "Beam":
        return Beam(
            tokens=(*self.tokens, token_id),
            logprobs=(*self.logprobs, step),
            cumulative_logprob=self.cumulative_logprob + step[token_id].logprob,
            is_ended=is_end,
        )


def score(cumulative_logprob: float, num_tokens: int, length_penalty: float) -> float:
    divisor: float = float(max(1, num_tokens)) ** length_penalty
    return cumulative_logprob / divisor


@dataclass(kw_only=True, slots=True)
class BeamSearch:
    """The beams after some steps; no engine and no clock."""

    params: BeamSearchParams
    eos_token_ids: frozenset[int]
    running: list[Beam] = field(default_factory=lambda: [Beam()])
    ended: list[Beam] = field(default_factory=list)

    def advance(self, steps: Sequence[dict[int, Logprob]]) -> None:
        """``steps``: of each running beam, its most probable next tokens."""
        grown: list[Beam] = []
        for beam, step in zip(self.running, steps, strict=True):
            for token_id in step:
                is_end = token_id in self.eos_token_ids and not self.params.ignore_eos
                longer = beam.extended(token_id, step, is_end=is_end)
                (self.ended if is_end else grown).append(longer)
        self.running = self._ranked(grown)[: self.params.beam_width]
        self.ended = self._ranked(self.ended)[: self.params.beam_width]

    @property
    def is_done(self) -> bool:
        """Whether no step can change the answer: enough have ended, and nothing that runs can come to beat them."""
        if not self.running or len(self.running[0].tokens) == self.params.max_tokens:
            return True
        if len(self.ended) < self.params.n:
            return False
        worst = self.ended[self.params.n - 1].score(self.params.length_penalty)
        return all(self._best_possible(beam) <= worst for beam in self.running)

    def best(self) -> list[Beam]:
        return self._ranked([*self.ended, *self.running])[: self.params.n]

    def _best_possible(self, beam: Beam) -> float:
        # Probabilities only fall; what divides them is largest at the greatest length, or at the present one.
        num_tokens = self.params.max_tokens if self.params.length_penalty > 0 else max(1, len(beam.tokens))
        return score(beam.cumulative_logprob, num_tokens, self.params.length_penalty)

    def _ranked(self, beams: list[Beam]) -> list[Beam]:
        return sorted(beams, key=lambda beam: beam.score(self.params.length_penalty), reverse=True)


async def beam_search(
    service: Service, request_id: str, token_ids: list[int], params: BeamSearchParams
) -> AsyncGenerator[RequestOutput, None]:
    """One output with the n best beams, the best first, as Service.generate gives them. Raises ApiError."""
    search = BeamSearch(params=params, eos_token_ids=service.tokenizer.eos_token_ids)
    metrics: RequestMetrics | None = None
    for step in range(params.max_tokens):
        found = await _next_tokens(service, f"{request_id}-{step}", token_ids, search.running, params)
        metrics = _added(metrics, [output.metrics for output in found])
        search.advance([_alternatives(output) for output in found])
        if search.is_done:
            break
    assert metrics is not None
    yield RequestOutput(
        request_id=request_id,
        prompt=None,
        prompt_token_ids=token_ids,
        outputs=[
            _completion(index, beam, token_ids, service.tokenizer, params) for index, beam in enumerate(search.best())
        ],
        finished=True,
        metrics=metrics,
    )


async def _next_tokens(
    service: Service, request_id: str, prompt: list[int], beams: Sequence[Beam], params: BeamSearchParams
) -> list[RequestOutput]:
    one_token = SamplingParams(
        temperature=0,
        max_tokens=1,
        ignore_eos=True,
        logprobs=2 * params.beam_width,
        priority=params.priority,
        offline=params.offline,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    async def ask(index: int, beam: Beam) -> RequestOutput:
        outputs = service.generate(f"{request_id}.{index}", [*prompt, *beam.tokens], one_token, is_measured=False)
        async with aclosing(outputs):
            async for output in outputs:
                if output.outputs[0].finish_reason != "abort":
                    return output
        raise errors.ApiError(errors.UNAVAILABLE, "The server ended this request early.", code="aborted")

    tasks = [asyncio.create_task(ask(index, beam)) for index, beam in enumerate(beams)]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _alternatives(output: RequestOutput) -> dict[int, Logprob]:
    (step,) = output.outputs[0].logprobs or [{}]
    return step


def _added(total: RequestMetrics | None, step: Sequence[RequestMetrics]) -> RequestMetrics:
    """Times from the first step to the last, counts of all."""
    result = total or RequestMetrics(
        arrival_s=step[0].arrival_s, scheduled_s=step[0].scheduled_s, first_token_s=step[0].first_token_s
    )
    for metrics in step:
        result.last_token_s = metrics.last_token_s
        result.num_preemptions += metrics.num_preemptions
        result.graph_steps.update(metrics.graph_steps)
    return result


def _completion(
    index: int, beam: Beam, prompt: list[int], tokenizer: ServiceTokenizer, params: BeamSearchParams
) -> CompletionOutput:
    shown = beam.tokens[: len(beam.tokens) - beam.is_ended]
    before = tokenizer.decode(prompt, skip_special_tokens=params.skip_special_tokens)
    whole = tokenizer.decode([*prompt, *shown], skip_special_tokens=params.skip_special_tokens)
    # Decoded by themselves, tokens of some tokenizers lose a space in front.
    is_apart = whole.startswith(before)
    text = whole[len(before) :] if is_apart else tokenizer.decode(shown, params.skip_special_tokens)
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=list(beam.tokens),
        logprobs=None if params.logprobs is None else _shown_logprobs(beam, params.logprobs),
        cumulative_logprob=beam.cumulative_logprob,
        finish_reason="stop" if beam.is_ended else "length",
    )


def _shown_logprobs(beam: Beam, count: int) -> list[dict[int, Logprob]]:
    return [
        {token_id: step[token_id]} | {other: logprob for other, logprob in step.items() if logprob.rank <= count}
        for token_id, step in zip(beam.tokens, beam.logprobs, strict=True)
    ]
