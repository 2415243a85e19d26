"""Options that several subcommands have, and what they make of them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from xllm_compile.benchmarks.record import RESULTS

F = TypeVar("F", bound=Callable[..., Any])
# The shapes of checkpoints.SHAPES, named here so that --help needs no torch.
SHAPE_NAMES = ("qwen3-0.6b", "qwen3-1.7b-4l", "tiny")


def results_option(function: F) -> F:
    return click.option(
        "--results", type=click.Path(path_type=Path), default=RESULTS, show_default="benchmarks/results", help="Folder."
    )(function)


def work_dir_option(text: str) -> Callable[[F], F]:
    return click.option("--work-dir", type=click.Path(path_type=Path), default=Path(".cache/bench"), help=text)


def model_options(function: F) -> F:
    """Options of everything that runs a model of its own making."""
    for option in reversed(
        (
            click.option(
                "--shape", type=click.Choice(SHAPE_NAMES), default=SHAPE_NAMES[0], help="Model, with random weights."
            ),
            click.option(
                "--work-dir",
                type=click.Path(path_type=Path),
                default=Path(".cache/bench"),
                help="Where models and artifacts are kept between runs; some GB.",
            ),
            click.option("--seed", type=int, default=1234, help="Of weights and prompts."),
            results_option,
        )
    ):
        function = option(function)
    return function


def trace_option(text: str) -> Callable[[F], F]:
    return click.option("--trace", type=click.Path(path_type=Path), required=True, help=text)


def served_by_option(function: F) -> F:
    models = click.Choice(("qwen3-8b", "qwen3-0.6b"))
    return click.option("--model", type=models, default="qwen3-8b", help="What serves them.")(function)


def planned_options(function: F) -> F:
    """What a simulation is of."""
    device = click.option("--device", default="ascend-910b2", help="On what: a device spec by name.")
    return click.option("--model", default="qwen3-8b", help="A planned model.")(device(function))


def targets_options(function: F) -> F:
    tpot = click.option("--tpot-slo", type=click.FloatRange(0, min_open=True), default=0.1, help="Seconds.")
    ttft = click.option("--ttft-slo", type=click.FloatRange(0, min_open=True), default=2.0, help="Seconds.")
    return ttft(tpot(function))


def shape_of(name: str) -> Any:
    from xllm_compile.benchmarks.checkpoints import SHAPES

    return SHAPES[name]


def command_line() -> list[str]:
    """As it was typed, for the record; a key is nobody's business, nor where this machine keeps its files."""
    words = ["xllm-bench", *map(_without_folder, sys.argv[1:])]
    for index, word in enumerate(words):
        if word == "--api-key":
            words[index + 1 :] = ["...", *words[index + 2 :]]
        elif word.startswith("--api-key="):
            words[index] = "--api-key=..."
    return words


def _without_folder(word: str) -> str:
    """The word with an absolute path, alone or behind --option=, reduced to its last part."""
    option, equals, value = word.rpartition("=")
    return option + equals + (Path(value).name if Path(value).is_absolute() else value)
