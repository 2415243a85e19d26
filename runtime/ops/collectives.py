"""Collectives that a graph calls: torch's functional ones, each started by one operator and waited for by another.

``all_reduce`` returns a tensor that may be read only after ``wait_tensor`` of it. Between the two anything may run
that does not read it; c10d finds the running work by the tensor's storage, so the wait may be in another graph.
"""

import torch

# Registers the shape functions of the operators.
import torch.distributed._functional_collectives
from torch import Tensor

from xllm_compile.runtime.ops.spec import TP_GROUP

ALL_REDUCE = torch.ops._c10d_functional.all_reduce.default
WAIT = torch.ops._c10d_functional.wait_tensor.default


def all_reduce(x: Tensor) -> Tensor:
    """The sum of ``x`` over the ranks, complete on return."""
    started: Tensor = ALL_REDUCE(x, "sum", TP_GROUP)
    done: Tensor = WAIT(started)
    return done
