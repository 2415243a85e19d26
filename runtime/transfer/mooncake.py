"""Mooncake's transfer engine as a fabric: RDMA where there is, else TCP.

Its ports take writes of anybody, on every address of the machine whatever host says: allow_open_ports.
"""

from collections.abc import Sequence

from xllm_compile.runtime.transfer.fabric import Fabric
from xllm_compile.runtime.transfer.mapping import Mapping
from xllm_compile.runtime.transfer.transfer import TransferConfig, TransferError

# Its queue for TCP refuses what does not fit, and a thousand do not.
_MAX_PARTS = 128


def make_mooncake(mapping: Mapping, config: TransferConfig, is_receiver: bool) -> Fabric:
    """Raises ValueError."""
    if not config.allow_open_ports:
        raise ValueError(
            "mooncake listens on every address of this machine and lets anybody write to the KV cache; use tcp, or"
            " allow open ports where only instances reach them"
        )
    return _Mooncake(mapping, config)


class _Mooncake:
    def __init__(self, mapping: Mapping, config: TransferConfig) -> None:
        try:
            from mooncake.engine import TransferEngine
        except ImportError as err:
            raise ValueError(
                f"mooncake cannot be loaded ({err}); pip install 'xllm-compile[mooncake]', and the system's libibverbs1"
            ) from err
        self._mapping = mapping
        self._engine = TransferEngine()
        # No metadata server: peers ask each other.
        status = self._engine.initialize(f"{config.host}:0", "P2PHANDSHAKE", config.mooncake_protocol, "")
        if status != 0:
            raise ValueError(f"mooncake cannot use {config.mooncake_protocol} on {config.host} (status {status})")
        status = self._engine.register_memory(mapping.address, mapping.num_bytes)
        if status != 0:
            raise ValueError(f"mooncake refuses to register {mapping.num_bytes} bytes of KV (status {status})")
        self.peer = f"{config.host}:{self._engine.get_rpc_port()}"

    def write(self, peer: str, parts: Sequence[tuple[int, int, int]]) -> None:
        for begin in range(0, len(parts), _MAX_PARTS):
            here, there, sizes = (list(column) for column in zip(*parts[begin : begin + _MAX_PARTS], strict=True))
            status = self._engine.batch_transfer_sync_write(peer, here, there, sizes)
            if status != 0:
                raise TransferError(f"mooncake could not write to {peer} (status {status}); has it ended?")

    def close(self) -> None:
        self._engine.unregister_memory(self._mapping.address)
        # The engine's threads and sockets end with it.
        del self._engine
