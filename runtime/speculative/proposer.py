"""What guesses tokens, and what it guesses for.

A proposer runs on the device's thread, right before the step that verifies: only there are the last tokens known.
A new kind of proposer (the prediction heads of a model, for one) implements `Proposer` and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from xllm_compile.runtime.candidates import Kept
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.speculative.adaptive import Acceptance, Looks


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that follow a sequence's last one: guessed, or forced by its grammar.

    ``drawn_from`` has the distribution that each was drawn from, which lossless verification needs to know; None
    where they were not drawn: the same text always gets the same draft.
    """

    token_ids: list[int]
    drawn_from: list[Kept] | None = None
    is_forced: bool = False
    """Nothing else is allowed, so these are accepted."""
    has_logits: bool = True
    """Whether the step computes the logits that each is judged by. What is forced has none, unless its
    log-probabilities are wanted."""

    @property
    def num_logits(self) -> int:
        """Rows of logits that the sequence has in the step: the last one gives the token after the draft."""
        return 1 + len(self.token_ids) if self.has_logits else 1


NO_DRAFT = Draft([])


@dataclass(eq=False, kw_only=True, slots=True)
class Speculation:
    """The device's view of one sequence. Its thread alone changes it. Compared by identity."""

    params: SamplingParams
    token_ids: list[int]
    """Prompt and output, as the device knows them: up to a step ahead of the host."""
    num_prompt_tokens: int
    max_output_tokens: int
    acceptance: dict[int, Acceptance] = field(default_factory=dict)
    """How drafts of each kind fared."""
    kind: int | None = None
    """Of the draft that the proposer would make now."""
    forced: list[int] = field(default_factory=list)
    """Tokens that its grammar forces to come next: the draft, then."""
    looks: Looks = field(default_factory=Looks)
    num_shown: int = 0
    """Its tokens when the proposer was last asked for a draft."""
    num_wanted: int = 0
    """Drafted tokens worth verifying in the next step. The host reads it, one step late."""

    @property
    def heat(self) -> int:
        """Classes of temperature: greedy, up to that of the model, above."""
        return 0 if self.params.is_greedy else 1 if self.params.temperature <= 1 else 2

    @property
    def num_left_tokens(self) -> int:
        """Tokens that may still be generated."""
        return self.num_prompt_tokens + self.max_output_tokens - len(self.token_ids)


class Proposer(Protocol):
    """Makes drafts. Every call comes from the device's thread."""

    is_costly: bool
    """Whether a draft takes time that counts beside a step's."""

    def observe(self, sequence: Speculation) -> int | None:
        """The kind of draft that the sequence would get after the tokens it has now; None: none.

        Called when it got tokens, after every step or after several. What is learnt of acceptance is kept by kind.
        """
        ...

    def propose(self, sequences: Sequence[Speculation], lengths: Sequence[int]) -> list[Draft]:
        """A draft of at most so many tokens for each. A length may be 0."""
        ...

    def forget(self, sequence: Speculation) -> None:
        """The sequence ended."""
        ...
