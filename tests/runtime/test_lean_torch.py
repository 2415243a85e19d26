"""Parts of PyTorch that run when they are asked for. Each test has a process of its own: this one has imported them."""

import subprocess
import sys

PRELUDE = """
import sys
from xllm_compile.runtime.lean_torch import META_KERNELS, PARTS, defer_parts, is_deferred
assert "torch" not in sys.modules
defer_parts()
import torch
deferred = {name for name in PARTS if is_deferred(name)}
"""


def run(code: str) -> str:
    command = [sys.executable, "-c", PRELUDE + code]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_what_serves_a_model_leaves_them_alone() -> None:
    run("""
import inspect
import xllm_compile.runtime.follower, xllm_compile.scheduler.server
# It looks at every module there is.
inspect.getmodule(inspect.currentframe())
torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3)).sum().item()
assert deferred == PARTS == {name for name in PARTS if is_deferred(name)}
""")


def test_a_part_that_is_asked_is_whole() -> None:
    run("""
assert torch.utils.data.DataLoader([1, 2]).batch_size == 1
assert not is_deferred("torch.utils.data") and is_deferred("torch.export")
assert type(torch.utils.data) is type(sys)
try:
    torch.nested.no_such_thing
except AttributeError as err:
    assert "no_such_thing" in str(err), err
else:
    raise AssertionError("it was found")
""")


def test_a_model_is_exported_with_the_kernels_for_shapes() -> None:
    run("""
class Model(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.vector_norm(x, dim=1)
assert is_deferred(META_KERNELS)
size = torch.export.Dim("size", min=2, max=9)
program = torch.export.export(Model(), (torch.ones(4, 3),), dynamic_shapes=({0: size},))
assert not is_deferred(META_KERNELS) and not is_deferred("torch.export")
assert torch.equal(program.module()(torch.ones(5, 3)), Model()(torch.ones(5, 3)))
""")


def test_a_compiled_function_finds_the_kernels_for_shapes() -> None:
    run("""
import torch._dynamo
assert not is_deferred(META_KERNELS)
compiled = torch.compile(lambda x: torch.linalg.vector_norm(x, dim=1), backend="eager", fullgraph=True)
assert compiled(torch.ones(2, 4)).tolist() == [2.0, 2.0]
""")
