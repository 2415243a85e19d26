"""How many tokens an output will have, of which only max_tokens is known: about as many as the last ones."""

# Before any has ended, and how much of the past their mean keeps.
_FIRST_MEAN_TOKENS = 128.0
_DECAY = 0.95


class OutputLength:
    """Learns from outputs that end."""

    def __init__(self) -> None:
        self.mean_tokens = _FIRST_MEAN_TOKENS

    def expected(self, max_tokens: float) -> float:
        """Of one that may have so many."""
        return min(self.mean_tokens, max_tokens)

    def learn(self, num_tokens: int) -> None:
        """One ended at that length."""
        self.mean_tokens = _DECAY * self.mean_tokens + (1 - _DECAY) * num_tokens
