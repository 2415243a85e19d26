"""An engine in a process of its own, driven line by line: one JSON request in, one JSON answer out.

Processes keep engines from sharing threads, allocators and compiled code, and are idle (blocked on stdin) while
another one is measured. The child is ``python -m xllm_compile.benchmarks.engine_NAME ARGUMENT...``.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Protocol

TokenIds = list[int]


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


class Adapter(Protocol):
    """What each engine implements; greedy, exact lengths, no stop tokens."""

    def generate(self, prompts: list[TokenIds], num_tokens: int) -> Generation:
        """Generate num_tokens >= 1 for each prompt, all at once."""
        ...


def serve_engine(adapter: Adapter) -> None:
    """The child's loop: answers requests until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    # Whatever a library prints must not come between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = asdict(adapter.generate(request["prompts"], request["num_tokens"]))
        except Exception as err:
            answer = {"error": f"{type(err).__name__}: {err}"}
        print(json.dumps(answer), file=answers)


class EngineProcess:
    """The parent's end. Use as a context manager; leaving it ends the child."""

    def __init__(self, name: str, module: str, arguments: Sequence[str], env: dict[str, str] | None = None) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"xllm_compile.benchmarks.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
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
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}) + "\n")
        self._process.stdin.flush()
        return Generation(**self._read())

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
