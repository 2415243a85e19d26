"""How many tokens to draft: as many as are expected to pay, from how drafts fared and what steps cost.

Pure but for what it is told. A draft of k tokens turns a step of one row into one of 1 + k; with a chance s_j that
the first j are all accepted, it brings 1 + s_1 + ... + s_k tokens instead of one.
Source of the model: Leviathan et al., arXiv:2211.17192, section 3.3; by position, because guesses get worse with it.
"""

from bisect import bisect, insort
from collections.abc import Callable, Sequence

# Chance of acceptance before anything is known, and the weight of a prior in observations.
_OPTIMISM = 0.7
_PRIOR_WEIGHT = 3.0
# How much of the past is kept per draft: about 20 drafts of a sequence, 100 of all.
_DECAY = 0.95
_SHARED_DECAY = 0.99
# A longer draft has to promise this much more, because the estimates are noisy.
_MARGIN = 1.05
# Guesses less likely than this never pay.
_LEAST_CHANCE = 0.02
# Chances for a draft between two probes, while none pays: those of all sequences. It doubles with every probe in vain.
_FIRST_PROBE_AFTER = 64
_LAST_PROBE_AFTER = 1024
_PROBE_LENGTH = 2
# Steps between two looks at whether drafts pay again, while nothing new is known of them.
_LOOK_EVERY = 16
# After so many looks in vain the next ones come half as often; and steps between two at the most, as a power of 2.
_VAIN_LOOKS = 8
_LONGEST_PERIOD_LOG2 = 3
# Steps after which what one without drafts takes is measured again.
_STALE_AFTER = 128


class Acceptance:
    """How drafts of one kind fare, by position. Without ``prior`` it is that of all sequences."""

    def __init__(self, max_length: int, prior: "Acceptance | None" = None) -> None:
        self.tried = [0.0] * max_length
        self.accepted = [0.0] * max_length
        self.survival: list[float] = []
        """Chance that the first 1, 2, ... tokens of a draft are all accepted."""
        self._prior = prior
        self._decay = _SHARED_DECAY if prior is None else _DECAY
        self._probe_after = _FIRST_PROBE_AFTER
        self._num_passed = self._look_at = 0
        self._update_survival()

    def update(self, num_drafted: int, num_accepted: int) -> None:
        """Count one draft. What follows the first rejected token was not judged."""
        for position in range(min(num_drafted, num_accepted + 1)):
            self.tried[position] = self.tried[position] * self._decay + 1
            is_accepted = position < num_accepted
            self.accepted[position] = self.accepted[position] * self._decay + is_accepted
        self._update_survival()
        if self._prior is not None:
            self._prior.update(num_drafted, num_accepted)

    def rate(self, position: int) -> float:
        """Chance of acceptance at a position, given that all before it were accepted."""
        prior = _OPTIMISM if self._prior is None else self._prior.rate(position)
        return (self.accepted[position] + _PRIOR_WEIGHT * prior) / (self.tried[position] + _PRIOR_WEIGHT)

    @property
    def is_resting(self) -> bool:
        """Whether drafts did not pay a moment ago, which needs no second look in every step."""
        return self._num_passed < self._look_at

    def probed(self, length: int, num_steps: int = 1) -> int:
        """The length to draft where ``length`` is what pays: now and then some although nothing does, to notice when
        that changes. num_steps: since it was asked last."""
        if length > 0:
            self._probe_after, self._num_passed, self._look_at = _FIRST_PROBE_AFTER, 0, 0
            if self._prior is not None:
                self._prior.probed(length)
            return length
        if not self.is_resting:
            self._look_at = self._num_passed + _LOOK_EVERY
        self._num_passed += num_steps
        if self._prior is not None:
            return self._prior.probed(0, num_steps)
        if self._num_passed < self._probe_after:
            return 0
        self._num_passed = self._look_at = 0
        self._probe_after = min(2 * self._probe_after, _LAST_PROBE_AFTER)
        return min(_PROBE_LENGTH, len(self.tried))

    def _update_survival(self) -> None:
        chance, self.survival = 1.0, []
        for position in range(len(self.tried)):
            chance *= self.rate(position)
            self.survival.append(chance)


class Looks:
    """When to look at a sequence's text for a draft: after every step, less and less often while none pays.

    A look costs as much as all else that a step without drafts does for speculation.
    """

    def __init__(self) -> None:
        self.period = 1
        """Steps from the last look to the next."""
        self._num_left = 1
        self._num_vain = 0

    @property
    def is_far(self) -> bool:
        """Whether there is none after the next step."""
        return self._num_left > 1

    def is_due(self) -> bool:
        """Whether to look after the step that just ended. Asked once for each."""
        self._num_left -= 1
        return self._num_left <= 0

    def found(self, *, pays: bool) -> None:
        """Whether the look that was due found a draft that pays."""
        self._num_vain = 0 if pays else self._num_vain + 1
        self.period = self._num_left = 2 ** min(self._num_vain // _VAIN_LOOKS, _LONGEST_PERIOD_LOG2)


class StepSeconds:
    """Seconds of a step by its rows, or of a draft by its length: as measured, or as ``predict`` says in proportion to
    what was measured.

    A step is never taken to be slower than a larger one. What was not measured for long, or once in a bad moment, is to
    be measured again before it is compared with what is measured all the time: see `is_stale`.
    """

    def __init__(self, predict: Callable[[int], float]) -> None:
        self._predict = predict
        self._measured: dict[int, float] = {}
        self._believed: dict[int, float] = {}
        self._sizes: list[int] = []
        """Those measured, ascending."""
        self._measured_at: dict[int, int] = {}
        self._num_observed = 0
        self._ratio: float | None = None

    def __call__(self, num_rows: int) -> float:
        believed = self._believed.get(num_rows)
        if believed is not None:
            return believed
        predicted = self._predict(num_rows) * (self._ratio or 1.0)
        at = bisect(self._sizes, num_rows)
        return max(predicted, self._believed[self._sizes[at - 1]]) if at else predicted

    @property
    def is_known(self) -> bool:
        """Whether anything was measured."""
        return self._ratio is not None

    def is_stale(self, num_rows: int) -> bool:
        """Whether a step of so many rows should run now, to know what it takes."""
        at = self._measured_at.get(num_rows)
        return at is None or self._num_observed - at > _STALE_AFTER

    def observe(self, num_rows: int, seconds: float) -> None:
        """Take in what a step of so many rows took."""
        is_stale = self.is_stale(num_rows)
        self._num_observed += 1
        self._measured_at[num_rows] = self._num_observed
        ratio = smoothed(self._ratio, seconds / self._predict(num_rows))
        self._ratio = ratio
        if num_rows not in self._measured:
            insort(self._sizes, num_rows)
        usual = ratio * self._predict(num_rows)
        self._measured[num_rows] = min(seconds, 2 * usual) if is_stale else smoothed(self._measured[num_rows], seconds)
        least = float("inf")
        for size in reversed(self._sizes):
            least = min(least, self._measured[size])
            self._believed[size] = least


def smoothed(known: float | None, measured: float) -> float:
    """Of a time that interruptions only lengthen: short ones count more, and long ones not as long as they were."""
    if known is None:
        return measured
    weight = 0.3 if measured < known else 0.05
    return known + weight * (min(measured, 2 * known) - known)


def draft_lengths(
    survivals: Sequence[Sequence[float]],
    *,
    num_others: int,
    step_seconds: Callable[[int], float],
    draft_seconds: Callable[[int], float],
) -> list[int]:
    """How many tokens to draft for each sequence of a step, so that it brings most tokens per second.

    survivals: for each sequence the chances that its first 1, 2, ... drafted tokens are accepted, descending; their
    number is the limit. num_others rows of the step draft nothing. step_seconds(rows) is the verifying step,
    draft_seconds(longest) the drafting before it.
    """
    chances = [
        (chance, index) for index, survival in enumerate(survivals) for chance in survival if chance >= _LEAST_CHANCE
    ]
    chances.sort(reverse=True)
    num_rows = num_others + len(survivals)
    expected = float(num_rows)
    lengths = [0] * len(survivals)
    longest = 0
    best, best_count = expected / step_seconds(num_rows) * _MARGIN, 0
    for count, (chance, index) in enumerate(chances, start=1):
        lengths[index] += 1
        longest = max(longest, lengths[index])
        expected += chance
        rate = expected / (step_seconds(num_rows + count) + draft_seconds(longest))
        if rate > best:
            best, best_count = rate, count
    for _, index in chances[best_count:]:
        lengths[index] -= 1
    return lengths
