"""Mooncake's distributed store as a remote tier: every instance lends it memory, and a master knows who has what.

It speaks its own protocol without a secret, on ports of its own on every address of the machine, and whoever reaches
them can read and alter what is kept. It is for networks where none but instances do.
"""

import importlib.util
import socket
from collections.abc import Callable, Sequence
from typing import Any

from xllm_compile.runtime.memory.remote_tier import StoreError

_SCHEME = "mooncake://"
# Of one call in either direction: more than a block.
_BUFFER_BYTES = 64 << 20
_NO_ROOM = -200


def mooncake_connector(address: str, segment_bytes: int) -> Callable[[], "MooncakeStore"]:
    """What connects to the master at mooncake://HOST:PORT, lending the store segment_bytes of this host's memory.

    Raises ValueError for another address, and where the library is not installed.
    """
    host, _, port = address.removeprefix(_SCHEME).rpartition(":")
    if not address.startswith(_SCHEME) or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"KV store {address!r} must be {_SCHEME}HOST:PORT, of a mooncake_master")
    if importlib.util.find_spec("mooncake") is None:
        raise ValueError(f"KV store {address}: mooncake is not installed; pip install 'xllm-compile[mooncake]'")
    return lambda: MooncakeStore(f"{host}:{port}", segment_bytes)


class MooncakeStore:
    """See StoreClient."""

    def __init__(self, master: str, segment_bytes: int) -> None:
        """Raises StoreError. Where nobody answers that may take more than a minute."""
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as err:
            raise StoreError(f"mooncake cannot be loaded ({err}); it needs the system's libibverbs1") from err
        self._master = master
        try:
            own = _own_address(master)
        except OSError as err:
            raise StoreError(f"mooncake's master at {master} cannot be reached: {err.strerror or err}") from err
        self._store: Any = MooncakeDistributedStore()
        # No metadata server: peers ask each other.
        status = self._store.setup(own, "P2PHANDSHAKE", segment_bytes, _BUFFER_BYTES, "tcp", "", master)
        if status != 0:
            raise StoreError(f"mooncake's master at {master} does not answer (status {status}); is it running?")

    def num_present(self, keys: Sequence[str]) -> int:
        states = self._store.batch_is_exist(list(keys))
        if any(state < 0 for state in states):
            raise StoreError(f"mooncake's master at {self._master} does not answer (status {min(states)})")
        return next((index for index, state in enumerate(states) if state == 0), len(states))

    def get(self, key: str) -> bytes | None:
        # Empty where it is gone, and where who has it is.
        return bytes(self._store.get(key)) or None

    def put(self, key: str, value: bytes) -> bool:
        status = self._store.put(key, value)
        if status not in (0, _NO_ROOM):
            raise StoreError(f"mooncake's master at {self._master} takes no block (status {status})")
        return bool(status == 0)

    def close(self) -> None:
        self._store.close()


def _own_address(master: str) -> str:
    """Of this machine, as seen from the master; nothing is sent. Raises OSError."""
    host, _, port = master.rpartition(":")
    host = host.strip("[]")
    family = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])
