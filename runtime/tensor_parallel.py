"""The ranks of one tensor-parallel instance: their process group, and how followers run the steps of rank 0.

Rank 0 leads: it schedules, samples and owns the bookkeeping of the KV cache. Before each step it sends the step's
arrays to the others; then all ranks execute it, meeting in the collectives of the compiled graphs.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xllm_compile.runtime.ops.spec import TP_GROUP
from xllm_compile.runtime.step import ModelRunner, RunnerAround, Step

if TYPE_CHECKING:
    from torch.distributed import ProcessGroupGloo

JOIN_TIMEOUT_S = 120.0
"""How long ranks wait for each other at start-up, and for a collective inside a step."""

# An idle leader sends nothing for as long as there are no requests. A leader that dies closes its connections.
_IDLE_TIMEOUT = timedelta(days=3650)
_STEP, _STOP, _RELEASE = range(3)
_ARRAYS = [field.name for field in fields(Step)]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankConfig:
    """Which rank this process is, and where the ranks meet. Raises ValueError on a bad value."""

    rank: int
    world_size: int
    address: str = "127.0.0.1:0"
    """host:port on which rank 0 listens. Rank 0 may give port 0 and tell the others what it got."""
    interface: str = ""
    """Network interface of the collectives; empty is the one that the host's name resolves to, or the loopback."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} must be in [0, world_size={self.world_size})")
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"address={self.address!r} is no host:port, such as 127.0.0.1:29500")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseMemory:
    """Word from rank 0 to give the memory of weights and KV back; no sequence has any KV."""

    from_cache: bool
    """Have the system forget the weights file as well."""


class RankGroup:
    """The process group of the present process, under the name that compiled graphs look up. One per process.

    Raises RuntimeError (DistNetworkError among them) when the ranks do not meet within JOIN_TIMEOUT_S.
    """

    def __init__(self, config: RankConfig) -> None:
        from torch._C._distributed_c10d import TCPStore

        self.config = config
        host, _, port = config.address.rpartition(":")
        timeout = timedelta(seconds=JOIN_TIMEOUT_S)
        # Rank 0 does not wait for the others here: they may have to be told the port first.
        self._store = TCPStore(host, int(port), config.world_size, config.rank == 0, timeout, wait_for_workers=False)
        self.address = f"{host}:{self._store.port}"
        self._timeout = timeout
        self._gloo: ProcessGroupGloo | None = None

    def connect(self) -> None:
        """Meet the other ranks."""
        import torch.distributed as dist
        from torch._C._distributed_c10d import PrefixStore, _register_process_group
        from torch.distributed.distributed_c10d import GroupName

        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = self._timeout
        # One thread: collectives complete in the order in which they are started.
        options._threads = 1
        if self.config.interface:
            device = dist.ProcessGroupGloo.create_device(interface=self.config.interface)
        else:
            device = dist.ProcessGroupGloo.create_device(hostname=self.address.rpartition(":")[0])
        options._devices = [device]
        rank, size = self.config.rank, self.config.world_size
        store = PrefixStore(TP_GROUP, self._store)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, options)
        group = dist.ProcessGroup(store, rank, size)
        kind = dist.ProcessGroup.BackendType.GLOO
        group._set_default_backend(kind)
        group._register_backend(torch.device("cpu"), kind, self._gloo)
        _register_process_group(GroupName(TP_GROUP), group)
        # The registry holds a weak reference.
        self._registered = group

    def close(self) -> None:
        """Forget the group. Rank 0 tells the followers to end first."""
        from torch._C._distributed_c10d import _unregister_process_group
        from torch.distributed.distributed_c10d import GroupName

        if self._gloo is not None:
            if self.config.rank == 0:
                # A follower that is gone already needs no word.
                with contextlib.suppress(RuntimeError):
                    self._send([_STOP])
            _unregister_process_group(GroupName(TP_GROUP))
            self._gloo = None

    def publish(self, values: Mapping[str, Any]) -> None:
        """Rank 0: plain values that the followers read once."""
        self._store.set("values", json.dumps(values))

    def published(self) -> dict[str, Any]:
        """What rank 0 published; waits for it."""
        values: dict[str, Any] = json.loads(self._store.get("values"))
        return values

    def send_step(self, step: Step) -> None:
        arrays = [getattr(step, name) for name in _ARRAYS]
        self._send([_STEP, *(len(array) for array in arrays)])
        self._broadcast(torch.from_numpy(np.concatenate(arrays)))

    def send_release(self, message: ReleaseMemory) -> None:
        """Between steps. Raises RuntimeError when a follower is gone."""
        self._send([_RELEASE, message.from_cache])

    def receive(self) -> Step | ReleaseMemory | None:
        """Follower: what rank 0 sends next; None is the end. Raises RuntimeError when rank 0 is gone."""
        header = torch.zeros(1 + len(_ARRAYS), dtype=torch.int64)
        self._broadcast(header, _IDLE_TIMEOUT)
        kind, *values = header.tolist()
        if kind == _STOP:
            return None
        if kind == _RELEASE:
            return ReleaseMemory(from_cache=bool(values[0]))
        payload = torch.empty(sum(values), dtype=torch.int32)
        self._broadcast(payload)
        parts = np.split(payload.numpy(), np.cumsum(values)[:-1])
        return Step(**dict(zip(_ARRAYS, parts, strict=True)))

    def _send(self, header: list[int]) -> None:
        padded = header + [0] * (1 + len(_ARRAYS) - len(header))
        self._broadcast(torch.tensor(padded, dtype=torch.int64))

    def _broadcast(self, tensor: Tensor, timeout: timedelta | None = None) -> None:
        import torch.distributed as dist

        assert self._gloo is not None
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = timeout or self._timeout
        self._gloo.broadcast([tensor], options).wait()  # type: ignore[attr-defined]


class LeaderRunner(RunnerAround):
    """Rank 0's model runner: what it executes the followers execute as well."""

    def __init__(self, runner: ModelRunner, group: RankGroup) -> None:
        super().__init__(runner)
        self._group = group

    def execute(self, step: Step, on_layers: Callable[[], None] | None = None) -> Tensor:
        """See ModelRunner.execute. Raises RuntimeError when a follower is gone."""
        self._group.send_step(step)
        return self._runner.execute(step, on_layers)
