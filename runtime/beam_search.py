"""Beam search, as vLLM offers it: each step asks for one token of every beam, and its best alternatives.

The engine knows nothing of beams: a step is as many requests for one token, on prompts that end with what the beam has
so far. Without a prefix cache each of them computes its prompt again; with one, its last tokens. `LLM.beam_search` and
scheduler/beam_search.py ask; what is here decides, without engine and clock.

A beam's score is its cumulative log-probability divided by the number of its tokens, without an end-of-sequence, to
the power of ``length_penalty``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from xllm_compile.runtime.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from xllm_compile.runtime.sampling_params import MAX_LOGPROBS, RequestOutputKind, SamplingParams

MAX_BEAM_WIDTH = MAX_LOGPROBS // 2
"""A step looks at twice as many alternatives of each beam: half of them may be ends."""


class BeamTokenizer(Protocol):
    """What beams need of a tokenizer."""

    eos_token_ids: frozenset[int]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


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


def one_token_params(params: BeamSearchParams) -> SamplingParams:
    """Of a step's requests."""
    return SamplingParams(
        temperature=0,
        max_tokens=1,
        ignore_eos=True,
        logprobs=2 * params.beam_width,
        priority=params.priority,
        offline=params.offline,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


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
    """The beams of one prompt after some steps."""

    params: BeamSearchParams
    prompt: list[int]
    tokenizer: BeamTokenizer
    running: list[Beam] = field(default_factory=lambda: [Beam()])
    ended: list[Beam] = field(default_factory=list)
    metrics: RequestMetrics | None = None
    """Times from the first step to the last, counts of all."""

    def prompts(self) -> list[list[int]]:
        """Of each running beam: what one_token_params are to go on with."""
        return [[*self.prompt, *beam.tokens] for beam in self.running]

    def take(self, outputs: Sequence[RequestOutput]) -> None:
        """The answers to `prompts`."""
        for output in outputs:
            self._count(output.metrics)
        self.advance([(output.outputs[0].logprobs or [{}])[0] for output in outputs])

    def _count(self, step: RequestMetrics) -> None:
        if self.metrics is None:
            self.metrics = RequestMetrics(
                arrival_s=step.arrival_s, scheduled_s=step.scheduled_s, first_token_s=step.first_token_s
            )
        self.metrics.last_token_s = step.last_token_s
        self.metrics.num_preemptions += step.num_preemptions
        self.metrics.graph_steps.update(step.graph_steps)

    def advance(self, steps: Sequence[dict[int, Logprob]]) -> None:
        """``steps``: of each running beam, its most probable next tokens."""
        grown: list[Beam] = []
        for beam, step in zip(self.running, steps, strict=True):
            for token_id in step:
                is_end = token_id in self.tokenizer.eos_token_ids and not self.params.ignore_eos
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

    def output(self, request_id: str) -> RequestOutput:
        """The n best beams, the best first."""
        assert self.metrics is not None, "a step comes first"
        return RequestOutput(
            request_id=request_id,
            prompt=None,
            prompt_token_ids=self.prompt,
            outputs=[
                _completion(index, beam, self.prompt, self.tokenizer, self.params)
                for index, beam in enumerate(self.best())
            ],
            finished=True,
            metrics=self.metrics,
        )

    def _best_possible(self, beam: Beam) -> float:
        # Probabilities only fall; what divides them is largest at the greatest length, or at the present one.
        num_tokens = self.params.max_tokens if self.params.length_penalty > 0 else max(1, len(beam.tokens))
        return score(beam.cumulative_logprob, num_tokens, self.params.length_penalty)

    def _ranked(self, beams: list[Beam]) -> list[Beam]:
        return sorted(beams, key=lambda beam: beam.score(self.params.length_penalty), reverse=True)


def _completion(
    index: int, beam: Beam, prompt: list[int], tokenizer: BeamTokenizer, params: BeamSearchParams
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
