"""How many tokens to draft: as many as are expected to pay, from how guesses fared and what steps cost.

Pure but for what it is told. A draft of k tokens turns a step of one row into one of 1 + k; with a chance s_j that
the first j are all accepted, it brings 1 + s_1 + ... + s_k tokens instead of one.
Source of the model: Leviathan et al., arXiv:2211.17192, section 3.3; by position, because guesses get worse with it.
"""

from bisect import bisect
from collections.abc import Callable, Sequence
from functools import cache

# Chance of acceptance before anything is known, and the weight of a prior in observations. Text that is sampled at more
# than the model's own temperature is hardly ever guessed.
OPTIMISM, HOT_OPTIMISM = 0.7, 0.2
_PRIOR_WEIGHT = 3.0
# How much of the past is kept per draft: about 20 drafts of a sequence, 100 of all.
_DECAY = 0.95
_SHARED_DECAY = 0.99
# A longer draft, or more of them, has to promise this much more, because the estimates are noisy.
_MARGIN = 1.05
# Guesses less likely than this never pay.
_LEAST_CHANCE = 0.02
# Chances for a draft between two probes, while none pays: those of all sequences. It doubles with every probe that is
# refused; where all of one was accepted the next comes soon.
LAST_PROBE_AFTER = 1024
_NEXT_PROBE_AFTER = 8
PROBE_LENGTH = 2
# Steps after which what one without drafts takes is measured again.
_STALE_AFTER = 128
# Steps in a row that use a quarter of the room for forced tokens before it is halved, and the least.
_ROOM_PATIENCE, _LEAST_ROOM = 8, 4
# Observations of a size before it is believed to take longer than predicted.
_FIRST = 4


class Acceptance:
    """How drafts of one kind fare, by position. Without ``prior`` it is that of all sequences."""

    def __init__(self, max_length: int, prior: "Acceptance | None" = None, *, optimism: float = OPTIMISM) -> None:
        self.tried = [0.0] * max_length
        self.accepted = [0.0] * max_length
        self.survival: list[float] = []
        """Chance that the first 1, 2, ... tokens of a draft are all accepted."""
        self._prior = prior
        self._optimism = optimism
        self._decay = _SHARED_DECAY if prior is None else _DECAY
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
        prior = self._optimism if self._prior is None else self._prior.rate(position)
        return (self.accepted[position] + _PRIOR_WEIGHT * prior) / (self.tried[position] + _PRIOR_WEIGHT)

    def _update_survival(self) -> None:
        chance, self.survival = 1.0, []
        for position in range(len(self.tried)):
            chance *= self.rate(position)
            self.survival.append(chance)


class Probes:
    """When to try a draft although none pays, to notice when that changes: for all sequences together."""

    def __init__(self, first_after: int = 128) -> None:
        self._after = first_after
        self._num_passed = 0

    def is_due(self, num_steps: int) -> bool:
        """Whether to try one now. Asked where none pays, with the steps since it was asked last."""
        self._num_passed += num_steps
        if self._num_passed < self._after:
            return False
        self._num_passed = 0
        return True

    def verified(self, num_drafted: int, num_accepted: int) -> None:
        """What came of a draft, a probe or one that was expected to pay."""
        if num_accepted == 0:
            self._after = min(2 * self._after, LAST_PROBE_AFTER)
        elif num_accepted >= min(num_drafted, PROBE_LENGTH):
            # A part of a probe is accepted now and then of texts that are guessed too rarely to pay.
            self._after = _NEXT_PROBE_AFTER


class Looks:
    """When to look at a sequence's text for a draft: after every step, less and less often while none pays.

    A look costs as much as all else that a step without drafts does for speculation.
    """

    def __init__(self, longest_period: int = 8, *, patience: int = 8) -> None:
        """longest_period is a power of 2. After ``patience`` looks in vain the next ones come half as often."""
        self.period = 1
        """Steps from the last look to the next."""
        self._longest_period = longest_period
        self._patience = patience
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
        self.period = self._num_left = min(2 ** (self._num_vain // self._patience), self._longest_period)

    def hurry(self) -> None:
        """A draft was accepted, so others may pay: look after the step that just ended."""
        self._num_vain = 0
        self._num_left = 1


class Room:
    """Places that a sequence is kept for forced tokens in a step that is planned before they are known.

    To keep many for few is work for the host in every step; where more are forced, that goes on for some steps.
    """

    def __init__(self, most: int) -> None:
        self.size = self._most = most
        self._num_small = 0

    def used(self, longest: int) -> None:
        """So many were taken, by the sequence that took most of them."""
        if longest >= self.size:
            self.size = min(2 * self.size, self._most)
        self._num_small = self._num_small + 1 if 4 * longest <= self.size else 0
        if self._num_small == _ROOM_PATIENCE:
            self.size, self._num_small = max(self.size // 2, _LEAST_ROOM), 0


class StepSeconds:
    """Seconds of a step by its rows, or of a draft by its length: as measured, or as ``predict`` says in proportion to
    what was measured.

    A step is never taken to be slower than a larger one. Of the first few of a size the quickest counts, and none as
    slower than predicted: their code comes in from disk. What was measured long ago is forgotten, or one bad moment
    would keep drafts of that length away for ever.

    Sizes that one graph runs take the same time. Each for itself would be tried a few times before it is known that the
    graph is dear.
    """

    def __init__(
        self,
        predict: Callable[[int], float],
        *,
        graph_rows: Callable[[int], int] = lambda num_rows: num_rows,
        ratio: float | None = None,
    ) -> None:
        """graph_rows: of the graph that runs so many. ratio: what measured times are believed to be of predicted ones;
        None, as the first are."""
        self._predict = predict
        # Asked for several sizes in every step.
        self.graph_rows = cache(graph_rows)
        self._measured: dict[int, float] = {}
        self._believed: dict[int, float] = {}
        self._sizes: list[int] = []
        """Those measured, ascending."""
        self._measured_at: dict[int, int] = {}
        self._counts: dict[int, int] = {}
        self._num_observed = 0
        self._ratio = ratio

    def __call__(self, num_rows: int) -> float:
        num_rows = self.graph_rows(num_rows)
        believed = self._believed.get(num_rows)
        if believed is not None:
            return believed
        predicted = self._predict(num_rows) * (self._ratio or 1.0)
        at = bisect(self._sizes, num_rows)
        return max(predicted, self._believed[self._sizes[at - 1]]) if at else predicted

    def is_stale(self, num_rows: int) -> bool:
        """Whether a step of so many rows should run now, to know what it takes."""
        return self.graph_rows(num_rows) not in self._measured

    def is_unsure(self, num_rows: int) -> bool:
        """Whether what such a step takes is not believed yet as it was measured."""
        return self._counts.get(self.graph_rows(num_rows), 0) < _FIRST

    def observe(self, num_rows: int, seconds: float) -> None:
        """Take in what a step of so many rows took."""
        num_rows = self.graph_rows(num_rows)
        self._num_observed += 1
        self._measured_at[num_rows] = self._num_observed
        count = self._counts[num_rows] = self._counts.get(num_rows, 0) + 1
        ratio = seconds / self._predict(num_rows)
        if self._ratio is None or self._num_observed <= _FIRST:
            self._ratio = min(ratio, self._ratio or ratio)
        else:
            self._ratio = smoothed(self._ratio, ratio)
        known = self._measured.get(num_rows)
        if known is None or count <= _FIRST:
            self._measured[num_rows] = min(seconds, known or seconds)
        else:
            self._measured[num_rows] = smoothed(known, seconds)
        for size in [size for size in self._measured if self._num_observed - self._measured_at[size] > _STALE_AFTER]:
            del self._measured[size], self._counts[size]
        self._sizes = sorted(self._measured)
        least = float("inf")
        self._believed = {}
        for size in reversed(self._sizes):
            least = min(least, self._measured[size])
            if self._counts[size] < _FIRST:
                least = min(least, self._predict(size) * self._ratio)
            self._believed[size] = least


def smoothed(known: float | None, measured: float) -> float:
    """Of a time that interruptions only lengthen: short ones count more, and long ones not as long as they were."""
    if known is None:
        return measured
    weight = 0.3 if measured < known else 0.05
    return known + weight * (min(measured, 2 * known) - known)


def num_forced_worth(
    num_forced: int,
    *,
    num_rows: int,
    num_tokens: int,
    step_seconds: Callable[[int], float],
    graph_rows: Callable[[int], int] = lambda num_rows: num_rows,
) -> int:
    """Of so many tokens that are sure to be accepted, how many a step of num_rows rows should take in, to bring most
    tokens per second. It brings num_tokens without them. graph_rows: see StepSeconds.

    The others wait for a later step; a step that needs a larger graph for one more row is no place for them.
    """
    counts = [min(num_forced, graph_rows(num_rows) - num_rows)]
    while counts[-1] < num_forced:
        # A graph is filled, or not taken.
        counts.append(min(num_forced, graph_rows(num_rows + counts[-1] + 1) - num_rows))
    rates = [(num_tokens + count) / step_seconds(num_rows + count) for count in counts]
    best = max(rates)
    return next(count for count, rate in zip(counts, rates, strict=True) if rate * _MARGIN >= best)


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
