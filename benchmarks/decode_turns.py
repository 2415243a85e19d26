"""Engines that decode side by side, some tokens of each in turn: the machine's speed wanders within the second that a
text takes, so whole texts one after the other would compare its moods."""

import time
from collections.abc import Iterable, Sequence

from xllm_compile.benchmarks.engine_process import TokenIds
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.outputs import RequestOutput
from xllm_compile.runtime.sampling_params import SamplingParams


class DecodeTurns:
    """One engine, which stands still but in its turns."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: list[list[int]] = []
        """Of each request, in the order of `begin`."""
        self.num_draft_tokens = self.num_accepted_tokens = 0
        """Of requests that ended."""
        self._seconds, self._num_timed_tokens = 0.0, 0
        self._before = engine.stats()

    def warm_up(self) -> None:
        """Code and weights come in from disk with the first steps."""
        self.engine.add_request("warm-up", [5, 6, 7], SamplingParams(temperature=2.0, max_tokens=16, ignore_eos=True))
        while self.is_playing:
            self.engine.step()

    @property
    def is_playing(self) -> bool:
        return self.engine.has_work

    @property
    def seconds_per_token(self) -> float:
        """In all turns so far."""
        return self._seconds / self._num_timed_tokens

    @property
    def forced_share(self) -> float:
        """Of all tokens so far, those that a structured output forced without a step."""
        now = self.engine.stats()
        num_tokens = now.num_generated_tokens - self._before.num_generated_tokens
        return (now.num_forced_tokens - self._before.num_forced_tokens) / num_tokens

    def begin(self, prompts: Sequence[TokenIds], params: SamplingParams) -> None:
        """Prefill, up to the first token of each."""
        first = len(self.tokens)
        for prompt in prompts:
            self.engine.add_request(str(len(self.tokens)), prompt, params)
            self.tokens.append([])
        while not all(self.tokens[first:]):
            self._take(self.engine.step())
        self._take(self.engine.settle())

    def play(self, num_tokens: int) -> None:
        """Generate at least so many tokens more, all requests together, and take the time."""
        num_before = self._num_tokens
        began = time.perf_counter()
        while self.is_playing and self._num_tokens < num_before + num_tokens:
            self._take(self.engine.step())
        self._take(self.engine.settle())
        self._seconds += time.perf_counter() - began
        self._num_timed_tokens += self._num_tokens - num_before

    def stop(self) -> None:
        """End what still runs."""
        for index in range(len(self.tokens)):
            self.engine.abort(str(index))
        while self.is_playing:
            self.engine.step()

    @property
    def _num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    def _take(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            self.tokens[int(output.request_id)] += output.outputs[0].token_ids
            if output.finished:
                self.num_draft_tokens += output.metrics.num_draft_tokens
                self.num_accepted_tokens += output.metrics.num_accepted_tokens


def take_turns(players: Iterable[DecodeTurns], num_tokens: int, *, num_turns: int | None = None) -> None:
    """Each plays so many tokens, then each again, another one first; so many times, or until all have ended."""
    playing = list(players)
    while playing and num_turns != 0:
        for player in playing:
            player.play(num_tokens)
        playing = [player for player in (*playing[1:], playing[0]) if player.is_playing]
        num_turns = None if num_turns is None else num_turns - 1
