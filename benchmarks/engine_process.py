"""An engine in a process of its own, driven line by line: one JSON request in, one JSON answer out.

Processes keep engines from sharing threads, allocators and compiled code, and are idle (blocked on stdin) while
another one is measured. The child is ``python -m xllm_compile.benchmarks.engine_NAME ARGUMENT...``.

An engine from elsewhere has a Python of its own, where this package is not installed. There the child is
``PYTHON -I engine_process.py engine_NAME.py ARGUMENT...`` (see the last lines), so this file and the adapters that are
started like that import the standard library, this file and their engine only.
"""

import json
import os
import runpy
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

TokenIds = list[int]

# What is installed has its bytecode beside it, whatever the environment says of writing it: nothing is compiled at a
# start.
KEEP_BYTECODE = {"PYTHONDONTWRITEBYTECODE": ""}


class EngineFailedError(RuntimeError):
    """The engine's process ended or answered with an error; the message is its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What one timed call did."""

    first_s: float
    """From the call to the moment every sequence has its first token."""
    decode_s: float
    """From there to the end."""
    num_decode_tokens: int
    """Tokens of all sequences made in decode_s."""
    token_ids: list[TokenIds]

    @property
    def decode_tokens_per_s(self) -> float:
        return self.num_decode_tokens / self.decode_s


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineRun:
    """Requests of many lengths, all there from the start."""

    seconds: float
    token_ids: list[TokenIds]


class Adapter(Protocol):
    """What each engine implements; greedy, exact lengths, no stop tokens."""

    def generate(self, prompts: list[TokenIds], num_tokens: int) -> Generation:
        """Generate num_tokens >= 1 for each prompt, all at once."""
        ...


class SteppedAdapter(ABC):
    """An engine that is driven step by step: all such engines are timed alike. The clock starts when all is queued."""

    @abstractmethod
    def begin(self, prompts: list[TokenIds], lengths: list[int]) -> None:
        """Queue the prompts, each with the number of tokens to generate. Nothing else is under way."""

    @abstractmethod
    def step(self) -> list[tuple[int, TokenIds]]:
        """Compute one step; what it generated, by the prompt's index."""

    @abstractmethod
    def end(self) -> None:
        """Drop what is not finished."""

    def generate(self, prompts: list[TokenIds], num_tokens: int) -> Generation:
        # One that prefills late still has to reach num_tokens decodes beside all the others.
        longest = num_tokens + sum(map(len, prompts)) // 512 + 1 if len(prompts) > 1 else num_tokens
        token_ids: list[TokenIds] = [[] for _ in prompts]
        self.begin(prompts, [longest] * len(prompts))
        began = time.perf_counter()
        while not all(token_ids):
            self._step_into(token_ids)
        first = time.perf_counter()
        num_before = sum(map(len, token_ids))
        for _ in range(num_tokens - 1):
            self._step_into(token_ids)
        ended = time.perf_counter()
        num_after = sum(map(len, token_ids))
        self.end()
        return Generation(
            first_s=first - began,
            decode_s=ended - first,
            num_decode_tokens=num_after - num_before,
            token_ids=[ids[:num_tokens] for ids in token_ids],
        )

    def complete(self, prompts: list[TokenIds], lengths: list[int]) -> OfflineRun:
        """Generate lengths[i] tokens for prompts[i]; the engine decides what it computes when."""
        token_ids: list[TokenIds] = [[] for _ in prompts]
        self.begin(prompts, lengths)
        began = time.perf_counter()
        while any(len(ids) < length for ids, length in zip(token_ids, lengths, strict=True)):
            self._step_into(token_ids)
        ended = time.perf_counter()
        self.end()
        return OfflineRun(seconds=ended - began, token_ids=token_ids)

    def _step_into(self, token_ids: list[TokenIds]) -> None:
        for index, ids in self.step():
            token_ids[index] += ids


def serve_engine(make: Callable[[], Adapter]) -> None:
    """The child's loop: makes the adapter, then answers requests until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    # Whatever a library prints, from its loading on, must not come between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    adapter = make()
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        call = getattr(adapter, request.pop("call"))
        answer: dict[str, Any]
        try:
            answer = asdict(call(**request))
        except Exception as err:
            answer = {"error": f"{type(err).__name__}: {err}"}
        print(json.dumps(answer), file=answers)


class EngineProcess:
    """The parent's end. Use as a context manager; leaving it ends the child."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        env: dict[str, str] | None = None,
        python: Path | None = None,
    ) -> None:
        """python: of the engine's own environment; None is ours."""
        self.name = name
        if python is None:
            command = [sys.executable, "-m", f"xllm_compile.benchmarks.{module}"]
        else:
            command = [str(python), "-I", __file__, str(Path(__file__).with_name(f"{module}.py"))]
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **KEEP_BYTECODE, **(env or {})},
        )

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        """Block until the engine is loaded."""
        self._read()

    def generate(self, prompts: list[TokenIds], num_tokens: int) -> Generation:
        return Generation(**self._ask(call="generate", prompts=prompts, num_tokens=num_tokens))

    def complete(self, prompts: list[TokenIds], lengths: list[int]) -> OfflineRun:
        """See SteppedAdapter.complete. Raises EngineFailedError when other lengths come back."""
        done = OfflineRun(**self._ask(call="complete", prompts=prompts, lengths=lengths))
        if [len(ids) for ids in done.token_ids] != lengths:
            raise EngineFailedError(f"{self.name} did not generate as many tokens as it was asked for")
        return done

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise EngineFailedError(f"{self.name} ended with exit code {code}; its message is above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailedError(f"{self.name}: {answer['error']}")
        return answer


if __name__ == "__main__":
    # The adapter imports this module by the package's name, as everywhere else.
    sys.modules["xllm_compile.benchmarks.engine_process"] = sys.modules["__main__"]
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
