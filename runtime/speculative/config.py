"""How a server or a command wants to speculate."""

from dataclasses import dataclass
from pathlib import Path

METHODS = ("suffix", "ngram", "draft")
MAX_SPECULATIVE_TOKENS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculativeConfig:
    """Raises ValueError on a bad value, or a method and a draft model that do not go together."""

    method: str
    """suffix: from the request's text and finished outputs; ngram: from the request's text; draft: by a model."""
    draft_model: Path | None = None
    """Artifact of the draft model."""
    num_speculative_tokens: int = 8
    """Most tokens of one draft; how many there are adapts to what is accepted."""
    max_shared_tokens: int = 1 << 18
    """Most tokens of finished outputs kept for the method suffix; some 300 bytes each."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"speculative method {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if not 1 <= self.num_speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise ValueError(
                f"num_speculative_tokens={self.num_speculative_tokens} must be in [1, {MAX_SPECULATIVE_TOKENS}]"
            )
        if self.max_shared_tokens < 0:
            raise ValueError(f"max_shared_tokens={self.max_shared_tokens} must be at least 0")
        if (self.method == "draft") != (self.draft_model is not None):
            raise ValueError(
                "speculative method 'draft' needs a draft model, and only that one does; give --draft-model ARTIFACT"
                " with --speculative draft, or leave it out"
            )
