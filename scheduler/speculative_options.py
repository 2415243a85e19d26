"""The options of speculative decoding, for servers and for generation without one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def speculative_options(function: F) -> F:
    """Named as the fields of runtime/speculative/config.py but for `speculative`, its method."""
    method = click.option(
        "--speculative",
        type=click.Choice(["suffix", "ngram", "draft"]),
        help="Guess tokens and verify several per step: from the request's text and earlier outputs, from its text, or "
        "by --draft-model.",
    )
    model = click.option(
        "--draft-model",
        type=click.Path(path_type=Path),
        help="A small model with the same tokens, given as the other is.",
    )
    most = click.option(
        "--num-speculative-tokens", type=click.IntRange(1, 32), default=8, help="Most guesses per step; adapts."
    )
    return method(model(most(function)))
