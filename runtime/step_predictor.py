"""What steps will take: the build's predictions, corrected by the steps that were measured.

Seconds of a step are a sum of terms in what decides them (`StepLoad`): the build's table of times by number of tokens,
and terms linear in tokens, sequences, keys and pairs. With prompts of d tokens behind a prefix of p that is
c0 + c1 d + c2 d^2 + c3 d p + c4 p, and for n decodes of context l it is c0 + c1 n + c2 n l: the forms that xLLM fits.

The coefficients are the least squares of relative errors, with forgetting, so that a small step counts as much as a
large one and a machine that got slower is noticed. They are at or above zero: predictions grow with the load, also
where measurements say nothing of a term. One measurement is taken for no further off than usual errors reach: a page
fault or another process is no news.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from xllm_compile.graph_passes.step_cost import StepTimes
from xllm_compile.runtime.policies.chunk import StepLoad

_FORGETTING = 0.98
# How far a coefficient may be off before anything is measured, in units of the variance of a relative error: steps of
# one load differ by about 5 %, and the build may be wrong several times over.
_PRIOR_VARIANCE = 1000.0
# An error counts up to so many times the mean one.
_CLIP = 3.0
_LEAST_ERROR = 0.05
# Rounds of coordinate descent per step; it goes on where the last step left it.
_ROUNDS = 2
# Learning takes some 40 us of a CPU: after the first steps a hundredth of their time, and while predictions are good a
# part of that.
_NUM_FIRST = 32
_LEARN_EVERY_S = 4e-3
_GOOD_ERROR = 0.1
_SOME = 4
_ERROR_DECAY = 0.9
_LEAST_S = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPrior:
    """What is believed before anything is measured. Seconds; the linear ones give their terms a scale too."""

    by_tokens: Callable[[int], float]
    """Of a step of so many tokens, without what attention reads of the KV cache."""
    token_s: float
    sequence_s: float
    key_s: float
    """To read one key with its value."""
    pair_s: float
    """To compute one (query, key) pair."""

    def __post_init__(self) -> None:
        for name in ("token_s", "sequence_s", "key_s", "pair_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


def prior_of(
    times: Mapping[str, StepTimes], *, kv_bytes_per_token: int, weights_bytes: int, max_num_batched_tokens: int
) -> StepPrior:
    """From an artifact's table of step times (Manifest.step_times).

    A step of one token reads all weights, which says how fast memory is, and so what a key costs.
    """
    table = times["T"]
    first_s = table.of(1)
    slope_s = (table.of(max_num_batched_tokens) - first_s) / max(1, max_num_batched_tokens - 1)
    token_s = max(slope_s, first_s * 1e-3)
    key_s = first_s * kv_bytes_per_token / max(1, weights_bytes)
    return StepPrior(
        by_tokens=table.of,
        token_s=token_s,
        sequence_s=first_s * 1e-2,
        key_s=key_s,
        # A query head's pair is a few thousandths of a token's products in every model served here.
        pair_s=token_s * kv_bytes_per_token / max(1, weights_bytes),
    )


def default_prior() -> StepPrior:
    """Of an unknown model: only the form is right."""
    return StepPrior(by_tokens=lambda _: 1e-3, token_s=1e-5, sequence_s=1e-5, key_s=1e-8, pair_s=1e-9)


class StepPredictor:
    """Learns from the engine's thread; may be asked from any."""

    def __init__(self, prior: StepPrior | None = None) -> None:
        self._prior = prior or default_prior()
        # by_tokens, keys and pairs are believed; a further term per token and sequence is found or not.
        self._coefficients: tuple[float, ...] = (1.0, 0.0, 0.0, 1.0, 1.0)
        size = len(self._coefficients)
        # The normal equations matrix @ coefficients = vector; the prior in them is never forgotten.
        self._matrix = [[(row == column) / _PRIOR_VARIANCE for column in range(size)] for row in range(size)]
        self._prior_vector = tuple(value / _PRIOR_VARIANCE for value in self._coefficients)
        self._vector = list(self._prior_vector)
        self.error_ratio = 1.0
        """Mean size of the last relative errors."""
        self.num_observed = 0
        self._unlearnt_s = 0.0
        """Time of steps since the last that was learnt from."""

    def seconds(self, load: StepLoad) -> float:
        """Predicted time of a step."""
        terms = self._terms(load)
        return max(_LEAST_S, sum(map(float.__mul__, self._coefficients, terms)))

    def token_s(self, num_tokens: int) -> float:
        """Predicted seconds per token of a prompt, in a step of ``num_tokens``."""
        return self.seconds(StepLoad().plus(0, num_tokens)) / num_tokens

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from one step that took ``seconds``, or from a later one."""
        if seconds <= 0:
            return
        self.num_observed += 1
        self._unlearnt_s += seconds
        pause_s = _LEARN_EVERY_S if self.num_observed > _NUM_FIRST else 0.0
        if self._unlearnt_s < pause_s or (self.error_ratio < _GOOD_ERROR and self.num_observed % _SOME):
            return
        self._unlearnt_s = 0.0
        terms = self._terms(load)
        scale = 1 / max(_LEAST_S, seconds)
        x = [term * scale for term in terms]
        error = 1 - sum(map(float.__mul__, self._coefficients, x))
        clip = _CLIP * max(_LEAST_ERROR, self.error_ratio)
        clipped = max(-clip, min(clip, error))
        self._count(x, 1 - error + clipped)
        self._solve()
        self.error_ratio = _ERROR_DECAY * self.error_ratio + (1 - _ERROR_DECAY) * abs(clipped)

    def _terms(self, load: StepLoad) -> tuple[float, ...]:
        prior = self._prior
        return (
            float(prior.by_tokens(max(1, load.num_tokens))),
            prior.token_s * load.num_tokens,
            prior.sequence_s * load.num_seqs,
            prior.key_s * load.num_keys,
            prior.pair_s * load.num_pairs,
        )

    def _count(self, x: list[float], y: float) -> None:
        """Take x @ coefficients = y into the normal equations."""
        kept, prior = _FORGETTING, (1 - _FORGETTING)
        for at, (row, value) in enumerate(zip(self._matrix, x, strict=True)):
            for column, other in enumerate(x):
                row[column] = kept * row[column] + value * other
            row[at] += prior / _PRIOR_VARIANCE
            self._vector[at] = kept * self._vector[at] + prior * self._prior_vector[at] + value * y

    def _solve(self) -> None:
        """Coordinate descent: each coefficient at its best given the others, or zero where that is below it."""
        found = list(self._coefficients)
        for _ in range(_ROUNDS):
            for at, row in enumerate(self._matrix):
                left = self._vector[at] - sum(map(float.__mul__, row, found))
                found[at] = max(0.0, found[at] + left / row[at])
        self._coefficients = tuple(found)
