"""What a call of a compiled graph costs: weights passed in every time, against weights the graph keeps as constants.

One graph for all layers is the design (compile time grows with kinds of layers, not with depth), and the weights are
its inputs. AOTInductor's other way is one container per layer whose constants are our tensors ("user-managed"), over
the same library. The layer here has as many inputs and weights as a Qwen3 layer and next to nothing to compute, so
what is timed is the calling.
"""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.load import ForeignLoad, wait_quiet
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.timing import measure_in_turns

_NUM_LAYERS = 28
_NUM_WEIGHTS = 8
"""Of a Qwen3 layer after the passes: four linears and four norms."""
_NUM_METADATA = 7
"""Other inputs of a layer: cos, sin, positions, seq_start, context_len, slot and the KV cache."""
_WIDTH = 8
_STEPS_A_ROUND = 20


def _layer(hidden: Tensor, metadata: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    for tensor in (*metadata, *weights):
        hidden = hidden * tensor
    return hidden


class _WeightsAsInputs(nn.Module):
    def forward(self, hidden: Tensor, *tensors: Tensor) -> Tensor:
        return _layer(hidden, tensors[:_NUM_METADATA], tensors[_NUM_METADATA:])


class _WeightsAsConstants(nn.Module):
    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        for index, weight in enumerate(weights):
            self.register_buffer(f"w{index}", weight)

    def forward(self, hidden: Tensor, *metadata: Tensor) -> Tensor:
        return _layer(hidden, metadata, [getattr(self, f"w{index}") for index in range(_NUM_WEIGHTS)])


def run_call_overhead(results: Path, command: Sequence[str], *, seed: int, repeats: int) -> None:
    """Measure and write graph_call_overhead.json."""
    torch.manual_seed(seed)
    hidden = torch.rand(1, _WIDTH)
    metadata = [torch.rand(1, _WIDTH) for _ in range(_NUM_METADATA)]
    weights = [[torch.rand(_WIDTH) for _ in range(_NUM_WEIGHTS)] for _ in range(_NUM_LAYERS)]
    with tempfile.TemporaryDirectory() as folder:
        say("compiling two graphs")
        inputs = _compile(_WeightsAsInputs(), (hidden, *metadata, *weights[0]), Path(folder, "inputs.so"))
        constants = _compile(_WeightsAsConstants(weights[0]), (hidden, *metadata), Path(folder, "constants.so"))
        run = _open(inputs).run
        runs = [_with_constants(_open(constants), layer).run for layer in weights]

        def steps_with_inputs() -> Tensor:
            for _ in range(_STEPS_A_ROUND):
                out = hidden
                for layer in weights:
                    out = run([out, *metadata, *layer])[0]
            return out

        def steps_with_constants() -> Tensor:
            for _ in range(_STEPS_A_ROUND):
                out = hidden
                for layer_run in runs:
                    out = layer_run([out, *metadata])[0]
            return out

        torch.testing.assert_close(steps_with_inputs(), steps_with_constants())
        ways: dict[str, Callable[[], object]] = {
            "weights as inputs": steps_with_inputs,
            "user-managed constants": steps_with_constants,
        }
        wait_quiet()
        with ForeignLoad() as load:
            found = measure_in_turns(ways, warmup=3, repeats=repeats)
    num_calls = _STEPS_A_ROUND * _NUM_LAYERS
    per_call_us = {name: summary.median / num_calls * 1e6 for name, summary in found.items()}
    rows = [
        (name, f"{us:.2f}", f"{us * _NUM_LAYERS / 1000:.3f}", f"{found[name].p99 / num_calls * 1e6:.2f}")
        for name, us in per_call_us.items()
    ]
    columns = ("", "us a call", f"ms a step of {_NUM_LAYERS} layers", "p99 us a call")
    show_table("Calling a compiled layer", columns, rows)
    raw = {
        "num_layers": _NUM_LAYERS,
        "num_weights": _NUM_WEIGHTS,
        "num_other_inputs": _NUM_METADATA + 1,
        "calls_a_round": num_calls,
        "seconds_a_round": {name: summary.to_json() for name, summary in found.items()},
        "us_per_call": per_call_us,
        "foreign_cores": load.cores,
    }
    bars = [Bar(what=f"one call, {name}", value=us, unit="us") for name, us in per_call_us.items()]
    finish(make_record("graph_call_overhead", command, seed=seed, raw=raw, bars=bars), results)


def _compile(module: nn.Module, example: tuple[Tensor, ...], output: Path) -> Path:
    options: dict[str, Any] = {"aot_inductor.output_path": str(output)}
    with warnings.catch_warnings():
        # torch warns about its own use of its own names.
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, example, strict=False)
        torch._inductor.aot_compile(exported.module(), example, options=options)
    return output


def _open(library: Path) -> Any:
    return torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)


def _with_constants(runner: Any, weights: Sequence[Tensor]) -> Any:
    """The runner with its constants replaced by ours, without a copy."""
    names = runner.get_constant_names_to_original_fqns()
    given = {name: weights[int(original.removeprefix("w"))] for name, original in names.items()}
    # Names as the C++ side knows them; validated, so none is left at its built-in value; user-managed: not copied.
    runner.update_constant_buffer(given, False, True, True)
    return runner
