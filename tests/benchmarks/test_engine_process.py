"""Timing of engines that are driven by steps, and of those from another environment."""

import sys
from pathlib import Path

import pytest

from xllm_compile.benchmarks import engine_process
from xllm_compile.benchmarks.engine_process import EngineFailedError, EngineProcess, SteppedAdapter, TokenIds


class OneByOne(SteppedAdapter):
    """Prefills a prompt a step; those that are prefilled decode beside it. A token is the number of its position."""

    def begin(self, prompts: list[TokenIds], lengths: list[int]) -> None:
        self.lengths = lengths
        self.num_admitted = 0
        self.made = [0] * len(prompts)
        self.is_open = True

    def step(self) -> list[tuple[int, TokenIds]]:
        self.num_admitted = min(self.num_admitted + 1, len(self.lengths))
        output = []
        for index in range(self.num_admitted):
            if self.made[index] < self.lengths[index]:
                output.append((index, [self.made[index]]))
                self.made[index] += 1
        return output

    def end(self) -> None:
        self.is_open = False


def test_decode_is_counted_from_when_all_have_their_first_token() -> None:
    engine = OneByOne()
    done = engine.generate([[1] * 512, [2] * 512, [3] * 512], 3)
    # Three steps prefill, the first of them beside decodes that do not count; two more decode all three.
    assert done.num_decode_tokens == 6
    assert done.token_ids == [[0, 1, 2]] * 3
    assert not engine.is_open


def test_a_single_token_is_prefill_alone() -> None:
    done = OneByOne().generate([[1]], 1)
    assert (done.num_decode_tokens, done.token_ids) == (0, [[0]])


def test_offline_requests_get_the_tokens_they_asked_for() -> None:
    engine = OneByOne()
    assert engine.complete([[1], [2], [3]], [1, 5, 2]).token_ids == [[0], [0, 1, 2, 3, 4], [0, 1]]
    assert not engine.is_open


ADAPTER = """
import sys

from xllm_compile.benchmarks.engine_process import SteppedAdapter, serve_engine


class Adapter(SteppedAdapter):
    def __init__(self):
        print("what a library prints while it is loaded", flush=True)

    def begin(self, prompts, lengths):
        if "xllm_compile" in sys.modules:
            raise RuntimeError("the package itself must not be needed")
        self.left = list(lengths)

    def step(self):
        print("what a library prints")
        found = [(index, [int(sys.argv[1])]) for index, left in enumerate(self.left) if left]
        self.left = [max(0, left - 1) for left in self.left]
        return found

    def end(self):
        pass


serve_engine(Adapter)
"""


@pytest.mark.integration
def test_an_adapter_in_another_environment_needs_no_package_of_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "engine_other.py").write_text(ADAPTER)
    # Without the checkout around it.
    beside = tmp_path / "engine_process.py"
    beside.write_text(Path(engine_process.__file__).read_text())
    monkeypatch.setattr(engine_process, "__file__", str(beside))
    with EngineProcess("other", "engine_other", ["7"], python=Path(sys.executable)) as engine:
        engine.wait_ready()
        assert engine.generate([[1, 2], [3]], 1).token_ids == [[7], [7]]
        assert engine.complete([[1], [2]], [3, 1]).token_ids == [[7, 7, 7], [7]]
        with pytest.raises(EngineFailedError, match="other: ValueError"):
            engine.complete([[1], [2]], [3])
        # An error ends the call, not the engine.
        assert engine.complete([[1]], [2]).token_ids == [[7, 7]]
