"""NIXL as a fabric, by its UCX backend: RDMA, shared memory or TCP, as UCX finds best.

Its ports take writes of anybody who reaches them: allow_open_ports, unless all is on the loopback. A thread of the
receiver polls without pause, and takes a core.
"""

import base64
import logging
import os
import secrets
import time
from collections.abc import Sequence
from threading import Lock
from typing import Any

from xllm_compile.runtime.transfer.fabric import Fabric
from xllm_compile.runtime.transfer.mapping import Mapping
from xllm_compile.runtime.transfer.tcp import is_loopback
from xllm_compile.runtime.transfer.transfer import TransferConfig, TransferError

# Small writes end before the first look; others are looked at ever more rarely.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 20e-6, 1e-3


def make_nixl(mapping: Mapping, config: TransferConfig, is_receiver: bool) -> Fabric:
    """Raises ValueError."""
    if is_loopback(config.host):
        # UCX reads it when the first agent is made, and would listen on every interface.
        os.environ.setdefault("UCX_NET_DEVICES", "lo")
    elif not config.allow_open_ports:
        raise ValueError(
            f"nixl on {config.host} lets anybody who reaches its ports write to the KV cache; use tcp, or allow open"
            " ports where only instances reach them"
        )
    return _Nixl(mapping, config, is_receiver)


class _Nixl:
    def __init__(self, mapping: Mapping, config: TransferConfig, is_receiver: bool) -> None:
        try:
            from nixl_cu12._api import nixl_agent, nixl_agent_config
        except ImportError as err:
            raise ValueError(f"nixl cannot be loaded ({err}); pip install 'xllm-compile[nixl]'") from err
        # It would print what it does to stdout, which is the commands' own.
        logger = logging.getLogger("nixl")
        logger.handlers.clear()
        logger.propagate = True
        self._timeout_s = config.timeout_s
        # A sender makes its own progress while it waits.
        settings = nixl_agent_config(enable_prog_thread=is_receiver, backends=["UCX"])
        self._agent: Any = nixl_agent(f"xllm-{secrets.token_hex(8)}", settings)
        self._registered = self._agent.register_memory([(mapping.address, mapping.num_bytes, 0, "")], "DRAM")
        self.peer = base64.b64encode(self._agent.get_agent_metadata()).decode()
        self._lock = Lock()
        self._names: dict[str, str] = {}

    def write(self, peer: str, parts: Sequence[tuple[int, int, int]]) -> None:
        try:
            state = self._write(peer, parts)
        except TransferError:
            raise
        # The library's errors have no class in common.
        except Exception as err:
            raise TransferError(f"nixl could not write ({type(err).__name__}: {err}); has the receiver ended?") from err
        if state != "DONE":
            raise TransferError(f"nixl could not write (state {state})")

    def _write(self, peer: str, parts: Sequence[tuple[int, int, int]]) -> str:
        agent = self._agent
        with self._lock:
            if peer not in self._names:
                self._names[peer] = agent.add_remote_agent(base64.b64decode(peer))
            here = agent.get_xfer_descs([(source, num_bytes, 0) for source, _, num_bytes in parts], "DRAM")
            there = agent.get_xfer_descs([(target, num_bytes, 0) for _, target, num_bytes in parts], "DRAM")
            handle = agent.initialize_xfer("WRITE", here, there, self._names[peer])
            state: str = agent.transfer(handle)
        deadline_s, pause_s = time.monotonic() + self._timeout_s, _FIRST_PAUSE_S
        try:
            while state == "PROC":
                if time.monotonic() > deadline_s:
                    raise TransferError(f"nixl did not end a write within {self._timeout_s:g} s")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                with self._lock:
                    state = agent.check_xfer_state(handle)
        finally:
            with self._lock:
                agent.release_xfer_handle(handle)
        return state

    def close(self) -> None:
        with self._lock:
            for name in self._names.values():
                self._agent.remove_remote_agent(name)
            self._agent.deregister_memory(self._registered)
            # The agent's threads and sockets end with it.
            del self._agent
