"""Requests of many lengths, all there from the start: what an engine makes of them is its throughput."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from xllm_compile.benchmarks.engine_process import TokenIds
from xllm_compile.benchmarks.workloads import mixed_lengths


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineWorkload:
    prompts: list[TokenIds]
    lengths: list[int]
    """Tokens to generate for each."""

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.lengths)


def random_workload(num_requests: int, vocab_size: int, *, seed: int) -> OfflineWorkload:
    """Random tokens, of mixed lengths."""
    rng = random.Random(seed)
    prompts, lengths = [], []
    for _ in range(num_requests):
        prompt_tokens, output_tokens = mixed_lengths(rng)
        lengths.append(output_tokens)
        prompts.append([rng.randrange(vocab_size) for _ in range(prompt_tokens)])
    return OfflineWorkload(prompts=prompts, lengths=lengths)


def read_workload(path: Path, num_requests: int, vocab_size: int) -> OfflineWorkload:
    """The first requests of a JSON file with a list "mixed" of {"prompt_ids": [...], "max_tokens": n}.

    Raises ValueError naming the file.
    """
    try:
        requests = json.loads(path.read_text())["mixed"][:num_requests]
        prompts = [[int(token) for token in request["prompt_ids"]] for request in requests]
        lengths = [int(request["max_tokens"]) for request in requests]
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(
            f'{path} is no workload ({type(err).__name__}: {err}); it needs a list "mixed" of'
            ' {"prompt_ids": [...], "max_tokens": n}'
        ) from err
    if not prompts or not all(prompts) or min(lengths) < 1:
        raise ValueError(f"{path} needs at least one request, each with a prompt and max_tokens of at least 1")
    highest = max(map(max, prompts))
    if highest >= vocab_size or min(map(min, prompts)) < 0:
        raise ValueError(f"{path} has token {highest}, the model's are below {vocab_size}; choose another --shape")
    return OfflineWorkload(prompts=prompts, lengths=lengths)
