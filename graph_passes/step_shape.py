"""What a step is asked to do, as far as its cost depends on it: tokens, sequences, contexts, rows of logits."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """Sequences as (new tokens, tokens in the cache once they are written)."""

    sequences: tuple[tuple[int, int], ...] = ()
    num_logits: int = 0
    padded_tokens: int = 0
    """Rows that are computed; 0: those of the sequences. Padding attends to nothing."""
    padded_logits: int = 0
    world_size: int = 1
    """Devices a collective of this model spans."""

    def __post_init__(self) -> None:
        for new, context in self.sequences:
            if not 1 <= new <= context:
                raise ValueError(f"sequence of {new} new tokens and context {context}: needs 1 <= new <= context")
        tokens = sum(new for new, _ in self.sequences)
        if self.padded_tokens and self.padded_tokens < tokens:
            raise ValueError(f"padded_tokens={self.padded_tokens} is below the step's {tokens} tokens")
        if self.padded_logits and self.padded_logits < self.num_logits:
            raise ValueError(f"padded_logits={self.padded_logits} is below the step's {self.num_logits} rows")
        if self.world_size < 1:
            raise ValueError(f"world_size={self.world_size} must be at least 1")

    @classmethod
    def of(
        cls, tokens: int, sequences: int = 1, context: int | None = None, logits: int | None = None, world_size: int = 1
    ) -> "StepShape":
        """``tokens`` dealt evenly to ``sequences``, each ending at ``context`` tokens (its own new ones by default)."""
        share, more = divmod(tokens, sequences)
        dealt = [share + (index < more) for index in range(sequences)]
        return cls(
            sequences=tuple((new, max(new, context or new)) for new in dealt if new),
            num_logits=sequences if logits is None else logits,
            world_size=world_size,
        )

    @property
    def num_tokens(self) -> int:
        return sum(new for new, _ in self.sequences)

    @property
    def sizes(self) -> Mapping[str, int]:
        """The symbols of region inputs. A graph sees no fewer than one token, sequence and row."""
        tokens = max(1, self.padded_tokens or self.num_tokens)
        count = max(1, len(self.sequences))
        longest = max((context for _, context in self.sequences), default=1)
        rows = max(1, self.padded_logits or self.num_logits)
        halves = {"TA": tokens - tokens // 2, "TB": tokens // 2}
        return {"T": tokens, "S": count, "S1": count + 1, "R": rows, "L": count, "M": longest, **halves}

    def keys_read(self, window: int = 0) -> int:
        """Keys that attention brings in: of each sequence those any of its queries sees."""
        return sum(min(context, window + new - 1) if window > 0 else context for new, context in self.sequences)

    def query_keys(self, new: int, context: int, window: int = 0) -> int:
        """(query, key) pairs of one sequence under the causal mask and the window."""
        before = context - new
        if window <= 0 or context <= window:
            return new * before + new * (new + 1) // 2
        return sum(min(before + index + 1, window) for index in range(new))
