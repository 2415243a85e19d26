"""Chooses how KV moves between two instances."""

import ctypes
import functools
from collections.abc import Callable, Sequence

from xllm_compile.runtime.transfer.fabric import MakeFabric, connect_fabric, open_fabric_receiver
from xllm_compile.runtime.transfer.mapping import Mapping
from xllm_compile.runtime.transfer.mooncake import make_mooncake
from xllm_compile.runtime.transfer.nixl import make_nixl
from xllm_compile.runtime.transfer.permits import Permits
from xllm_compile.runtime.transfer.server import Server
from xllm_compile.runtime.transfer.shm import CopyBytes, connect_shm, machine_id, open_shm_receiver
from xllm_compile.runtime.transfer.tcp import connect_tcp, open_tcp_receiver
from xllm_compile.runtime.transfer.transfer import Receiver, Region, Sender, TransferConfig

_FABRICS: dict[str, MakeFabric] = {"mooncake": make_mooncake, "nixl": make_nixl}
_CONNECT: dict[str, Callable[[str, Region, TransferConfig], Sender]] = {
    "shm": connect_shm,
    **{scheme: functools.partial(connect_fabric, make) for scheme, make in _FABRICS.items()},
    "tcp": connect_tcp,
}
SCHEMES = tuple(_CONNECT)
"""The fastest way first."""


def open_receiver(
    schemes: Sequence[str], region: Region, config: TransferConfig, copy: CopyBytes = ctypes.memmove
) -> Receiver:
    """Takes writes to the region by each of the schemes. Raises ValueError, and OSError when it cannot listen.

    copy is what shm copies with. Where a target's kernels are loaded, theirs is faster: native.copy_bytes.
    """
    _check_schemes(schemes)
    receiver = _Receiver(region, config)
    try:
        for scheme in sorted(set(schemes), key=SCHEMES.index):
            receiver.servers.append(_open(scheme, receiver, config, copy))
    except BaseException:
        receiver.close()
        raise
    return receiver


def _open(scheme: str, receiver: "_Receiver", config: TransferConfig, copy: CopyBytes) -> Server:
    if scheme == "shm":
        return open_shm_receiver(receiver.mapping, receiver.permits, config, copy)
    if scheme in _FABRICS:
        return open_fabric_receiver(scheme, _FABRICS[scheme], receiver.mapping, receiver.permits, config)
    return open_tcp_receiver(receiver.mapping, receiver.permits, config)


class _Receiver:
    """See Receiver: the servers of all schemes, with one set of permits."""

    def __init__(self, region: Region, config: TransferConfig) -> None:
        self.mapping = Mapping(region, is_writable=True)
        self.permits = Permits(region.num_bytes)
        self.servers: list[Server] = []
        self._timeout_s = config.timeout_s
        self._is_closed = False

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(server.address for server in self.servers)

    def permit(self, token: bytes, ranges: Sequence[tuple[int, int]]) -> None:
        self.permits.permit(token, ranges)

    def revoke(self, token: bytes) -> None:
        self.permits.revoke(token, self._timeout_s)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        for server in self.servers:
            server.close()
        self.mapping.close()


def connect(
    addresses: Sequence[str], region: Region, config: TransferConfig, schemes: Sequence[str] = ("shm", "tcp")
) -> Sender:
    """Sends from the region by the fastest of a receiver's addresses whose scheme is among those of this side.

    shm is for processes of one user on one machine. Connects when first written to. Raises ValueError when there is
    none, or the scheme's library is not installed.
    """
    _check_schemes(schemes)
    for scheme in SCHEMES:
        for address in addresses if scheme in schemes else ():
            if not address.startswith(f"{scheme}:"):
                continue
            if scheme == "shm" and address.split(":")[1].split("/")[0] != machine_id():
                continue
            return _CONNECT[scheme](address, region, config)
    raise ValueError(
        f"no way to send KV to {', '.join(addresses) or 'an instance without addresses'}: this side has"
        f" {', '.join(schemes)}, and shm reaches its own machine and user only"
    )


def _check_schemes(schemes: Sequence[str]) -> None:
    unknown = [scheme for scheme in schemes if scheme not in SCHEMES]
    if unknown or not schemes:
        raise ValueError(f"KV transfer {', '.join(unknown) or 'by nothing'}: there is {', '.join(SCHEMES)}")
