"""Speculation on the device's thread: drafts before a step, verification after it, and what is learnt from both.

The host plans a step with room for drafts before the last one has brought its tokens. The device knows them when the
step's turn comes: it asks for drafts, makes the rows anew, and tells with the result how many were accepted.

What a grammar forces is a draft that costs nothing to make and is never refused, so there is no need of a proposer:
rows that would each have a step of their own ride in one, as many as it has room for at little cost.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

from xllm_compile.runtime.batch import Batch
from xllm_compile.runtime.outputs import SpeculationStats
from xllm_compile.runtime.sampler import SampledToken
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.speculative.adaptive import (
    HOT_OPTIMISM,
    LAST_PROBE_AFTER,
    PROBE_LENGTH,
    Acceptance,
    Looks,
    Probes,
    Room,
    StepSeconds,
    draft_lengths,
    num_forced_worth,
)
from xllm_compile.runtime.speculative.draft_step import move_rows, with_drafts
from xllm_compile.runtime.speculative.proposer import NO_DRAFT, Draft, Proposer, Speculation
from xllm_compile.runtime.speculative.verify import Verified
from xllm_compile.runtime.step import Step
from xllm_compile.runtime.token_matcher import TokenMatcher

_WEIGHT = 0.1
# Forced tokens of a sequence that one step takes in at most: KV for them is set aside when it is planned.
MAX_FORCED_TOKENS = 16
# Steps between two whose time is taken in, while nothing is guessed.
_OBSERVE_EVERY = 32


class Speculator:
    """Drafts and learns. `draft` and `learn` belong to the device's thread, the other methods to the host's."""

    def __init__(
        self,
        proposer: Proposer | None,
        *,
        max_length: int,
        step_seconds: StepSeconds,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Without a proposer only what grammars force is drafted. max_length bounds a guess. step_seconds learns how
        long steps take."""
        self.max_length = max_length
        self._proposer = proposer
        self._clock = clock
        self._step_seconds = step_seconds
        # With its first token come those that the proposer has not seen.
        self._draft_seconds = StepSeconds(lambda longest: 0.1 * (1 + longest) * step_seconds(1), ratio=1.0)
        self._num_idle = 0
        self._turn = 0
        self._forced_room = Room(MAX_FORCED_TOKENS)
        self._shared: dict[tuple[int, int], tuple[Acceptance, Probes]] = {}
        """By kind and heat: what is accepted of greedy texts says little of others."""
        self._ended: deque[Speculation] = deque()
        self._stats = SpeculationStats(drafted_by_position=[0] * max_length, accepted_by_position=[0] * max_length)

    @property
    def is_costly(self) -> bool:
        """Whether a draft takes time that counts beside a step's."""
        return self._proposer is not None and self._proposer.is_costly

    def start(
        self, params: SamplingParams, token_ids: Sequence[int], *, num_prompt_tokens: int, max_output_tokens: int
    ) -> Speculation | None:
        """For a new sequence; None where there will be no drafts for it."""
        if self._proposer is None and params.structured is None:
            return None
        speculation = Speculation(
            params=params,
            token_ids=list(token_ids),
            num_prompt_tokens=num_prompt_tokens,
            max_output_tokens=max_output_tokens,
        )
        if self.is_costly:
            # Of a draft model nothing new is known before a draft was verified.
            speculation.looks = Looks(64, patience=2)
        elif speculation.heat > 1:
            # These hardly repeat anything.
            speculation.looks = Looks(64, patience=1)
        return speculation

    def reserve(self, sequence: Speculation) -> int:
        """Most drafted tokens for the next step of the sequence, asked by the host when it plans it."""
        # A cheap draft is made when the newest tokens are known: only then is it clear whether they suggest any. So it
        # is with what they force.
        if sequence.params.structured is not None:
            return max(self.max_length, self._forced_room.size)
        if self.is_costly:
            return sequence.num_wanted
        # Without a look before then there will be none.
        return 0 if sequence.looks.is_far else self.max_length

    def forget(self, sequence: Speculation) -> None:
        """The sequence ended, for the host; a launched step may still have it."""
        if self._proposer is not None:
            self._ended.append(sequence)

    def stats(self) -> SpeculationStats | None:
        """A snapshot of the counters of guesses; None without a proposer."""
        if self._proposer is None:
            return None
        counted = self._stats
        return SpeculationStats(
            num_drafts=counted.num_drafts,
            drafted_by_position=list(counted.drafted_by_position),
            accepted_by_position=list(counted.accepted_by_position),
            draft_length=counted.draft_length,
        )

    def draft(self, batch: Batch) -> tuple[Step, list[Draft]]:
        """The step to run, and a draft for each sampled sequence, of which only the first may have one."""
        sequences = batch.drafting
        if not sequences:
            return batch.step, [NO_DRAFT] * len(batch.sampled)
        drafts = self._draft(batch) if any(batch.num_granted) else [NO_DRAFT] * len(sequences)
        step = batch.step
        last_positions = [len(sequence.token_ids) - 1 for sequence in sequences]
        if any(draft.token_ids for draft in drafts):
            step = with_drafts(step, sequences, drafts)
        elif step.positions[: len(sequences)].tolist() != last_positions:
            move_rows(step, last_positions)
        return step, drafts + [NO_DRAFT] * (len(batch.sampled) - len(drafts))

    def learn(self, batch: Batch, drafts: Sequence[Draft], verified: Sequence[Verified], seconds: float) -> None:
        """Take the tokens of a step in, and decide what the next one should draft. seconds: without the drafting."""
        num_forced = 0
        for sequence, results in zip(batch.sampled, verified, strict=True):
            speculation, matcher = sequence.speculation, sequence.sampling.matcher
            if speculation is None:
                continue
            for result in results:
                speculation.token_ids.append(result.token_id if isinstance(result, SampledToken) else 0)
            if matcher is not None:
                speculation.forced = matcher.forced()
                num_forced += len(speculation.forced)
        if batch.is_decode_only and (batch.drafting or self._proposer is not None):
            self._observe(batch, drafts, seconds)
        if self._proposer is not None:
            if batch.drafting:
                self._count(batch, drafts, verified)
            self._look(batch, num_forced)
            # The host ends a sequence with one step under way at most, which is this one.
            while self._ended:
                self._proposer.forget(self._ended.popleft())

    def _look(self, batch: Batch, num_forced: int) -> None:
        """What the next step should guess, where it is time to look. num_forced: rows it has whatever is guessed."""
        due: list[Speculation] = []
        for sequence in batch.sampled:
            speculation = sequence.speculation
            assert speculation is not None
            speculation.num_wanted = 0
            if not speculation.forced and speculation.looks.is_due():
                due.append(speculation)
        if due:
            self._choose_lengths(due, len(batch.sampled), num_forced)

    def _draft(self, batch: Batch) -> list[Draft]:
        forced = self._take_forced(batch)
        if self._proposer is None:
            return forced
        # A costly guess was decided on when the step was planned. A cheap one is made as the newest tokens suggest.
        lengths = [
            0 if draft.token_ids else min(granted, wanted if self.is_costly else each.num_wanted)
            for draft, each, granted, wanted in zip(
                forced, batch.drafting, batch.num_granted, batch.num_wanted, strict=True
            )
        ]
        guesses = self._guess(self._proposer, batch.drafting, lengths)
        return [
            draft if draft.token_ids else _within_grammar(guess, sequence.sampling.matcher)
            for draft, guess, sequence in zip(forced, guesses, batch.sampled, strict=False)
        ]

    def _take_forced(self, batch: Batch) -> list[Draft]:
        """Of what is forced as much as the step gains by. Who comes first changes from step to step."""
        lengths = [min(len(each.forced), most) for each, most in zip(batch.drafting, batch.num_granted, strict=True)]
        drafts = [NO_DRAFT] * len(lengths)
        if not any(lengths):
            self._forced_room.used(0)
            return drafts
        num_left = num_forced_worth(
            sum(lengths),
            num_rows=len(batch.step.token_ids),
            num_tokens=len(batch.sampled),
            step_seconds=self._step_seconds,
            graph_rows=self._step_seconds.graph_rows,
        )
        self._turn += 1
        for at in range(len(lengths)):
            index = (self._turn + at) % len(lengths)
            sequence, length = batch.drafting[index], min(lengths[index], num_left)
            if length:
                # Their log-probabilities, where they are wanted, come of logits.
                has_logits = sequence.params.logprobs is not None
                drafts[index] = Draft(sequence.forced[:length], is_forced=True, has_logits=has_logits)
                num_left -= length
        self._forced_room.used(max(len(draft.token_ids) for draft in drafts))
        return drafts

    def _guess(self, proposer: Proposer, sequences: Sequence[Speculation], lengths: Sequence[int]) -> list[Draft]:
        """The proposer's drafts, and how long they take."""
        if not any(lengths):
            return [NO_DRAFT] * len(lengths)
        began = self._clock()
        drafts = proposer.propose(sequences, lengths)
        longest = max(len(draft.token_ids) for draft in drafts)
        if proposer.is_costly and longest:
            seconds = self._clock() - began
            # One that comes after a rest, or first, computes all that came meanwhile: no length would change that.
            asked = [sequence for sequence, length in zip(sequences, lengths, strict=True) if length]
            if all(len(each.token_ids) - each.num_shown <= self.max_length + 1 for each in asked):
                self._draft_seconds.observe(longest, seconds)
            for each in asked:
                each.num_shown = len(each.token_ids)
        return drafts

    def _observe(self, batch: Batch, drafts: Sequence[Draft], seconds: float) -> None:
        num_rows, has_guess = len(drafts), False
        # Most steps of a text that is hard to guess have none, and the device waits meanwhile.
        if batch.drafting:
            num_rows += sum(len(draft.token_ids) for draft in drafts)
            has_guess = any(draft.token_ids and not draft.is_forced for draft in drafts)
        self._num_idle = 0 if has_guess else self._num_idle + 1
        if self._num_idle % _OBSERVE_EVERY and not self._step_seconds.is_unsure(num_rows):
            return
        self._step_seconds.observe(num_rows, seconds)

    def _count(self, batch: Batch, drafts: Sequence[Draft], verified: Sequence[Verified]) -> None:
        """How the guesses of a step fared."""
        for speculation, draft, results in zip(batch.drafting, drafts, verified, strict=False):
            if draft.token_ids and not draft.is_forced:
                self._count_draft(speculation, len(draft.token_ids), len(results) - 1)

    def _count_draft(self, sequence: Speculation, num_drafted: int, num_accepted: int) -> None:
        acceptance, probes = self._record(sequence)
        acceptance.update(num_drafted, num_accepted)
        probes.verified(num_drafted, num_accepted)
        if num_accepted:
            sequence.looks.hurry()
        stats = self._stats
        stats.num_drafts += 1
        stats.draft_length += _WEIGHT * (num_drafted - stats.draft_length)
        for position in range(num_drafted):
            stats.drafted_by_position[position] += 1
            stats.accepted_by_position[position] += position < num_accepted

    def _record(self, sequence: Speculation) -> tuple[Acceptance, Probes]:
        """Of drafts of the sequence's kind: how its own fared, and when to probe any."""
        assert sequence.kind is not None
        kind = sequence.kind, sequence.heat
        shared = self._shared.get(kind)
        if shared is None:
            if sequence.heat > 1:
                # With a draft model the first probe computes the whole text there, which takes as long as ten steps.
                first_after = LAST_PROBE_AFTER if self.is_costly else 512
                shared = Acceptance(self.max_length, optimism=HOT_OPTIMISM), Probes(first_after)
            else:
                shared = Acceptance(self.max_length), Probes()
            self._shared[kind] = shared
        prior, probes = shared
        own = sequence.acceptance.get(sequence.kind)
        if own is None:
            own = sequence.acceptance[sequence.kind] = Acceptance(self.max_length, prior)
        return own, probes

    def _choose_lengths(self, sequences: Sequence[Speculation], num_in_step: int, num_forced: int) -> None:
        """Of the guesses for these, in a step of num_in_step sequences and num_forced rows more."""
        candidates = []
        for sequence in sequences:
            # The last token needs no draft, and a request for one token no look at its prompt.
            sequence.kind = self._kind(sequence)
            if sequence.kind is None:
                sequence.looks.found(pays=False)
            else:
                candidates.append((sequence, *self._record(sequence)))
        if not candidates or self._step_seconds.is_stale(num_in_step):
            return
        lengths = draft_lengths(
            [acceptance.survival for _, acceptance, _ in candidates],
            num_others=num_in_step + num_forced - len(candidates),
            step_seconds=self._step_seconds,
            draft_seconds=self._expected_draft_seconds,
        )
        for (sequence, _, probes), length in zip(candidates, lengths, strict=True):
            num_steps = sequence.looks.period
            sequence.looks.found(pays=length > 0)
            sequence.num_wanted = length
            if length == 0 and probes.is_due(num_steps):
                sequence.num_wanted = min(PROBE_LENGTH, self.max_length)

    def _kind(self, sequence: Speculation) -> int | None:
        if self._proposer is None or sequence.num_left_tokens <= 1:
            return None
        return self._proposer.observe(sequence)

    def _expected_draft_seconds(self, longest: int) -> float:
        return self._draft_seconds(longest) if self.is_costly else 0.0


def _within_grammar(draft: Draft, matcher: TokenMatcher | None) -> Draft:
    """Without what the grammar is known to refuse. Of tokens that were drawn the first one refused has to be seen:
    what comes in its place is drawn from what the draft model gave too little to."""
    if matcher is None or not draft.token_ids:
        return draft
    size = matcher.num_allowed(draft.token_ids)
    if draft.drawn_from is not None:
        return Draft(draft.token_ids[: size + 1], draft.drawn_from[: size + 1])
    return Draft(draft.token_ids[:size])
