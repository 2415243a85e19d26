"""Between instances that have a library which writes to another process's memory by itself: Mooncake or NIXL.

Nothing on the receiver's side sees these writes, so the permits are kept by asking: the sender announces a write on a
connection as tcp's, waits until the receiver agrees, has the library write, and says that it is done. A sender that
keeps to this is held to its ranges. What cannot be enforced: whoever reaches the library's own ports can write to any
registered page (allow_open_ports), and a write under way cannot be cut short, so `revoke` waits for it.
"""

import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from xllm_compile.runtime.transfer.client import Client
from xllm_compile.runtime.transfer.mapping import Mapping
from xllm_compile.runtime.transfer.permits import Permits, Write
from xllm_compile.runtime.transfer.server import Server
from xllm_compile.runtime.transfer.session import Session, WriteRequest
from xllm_compile.runtime.transfer.tcp import connect_session, host_and_port, listen, tcp_address, tune
from xllm_compile.runtime.transfer.transfer import ByteRange, Region, Sender, TransferConfig, TransferError

_DONE = b"d"
# What a sender that died had handed to the network by then has arrived.
_SETTLE_S = 2.0


class Fabric(Protocol):
    """The library, with one mapping registered."""

    @property
    def peer(self) -> str:
        """How another process's library reaches this one."""
        ...

    def write(self, peer: str, parts: Sequence[tuple[int, int, int]]) -> None:
        """Copy (address here, address there, num_bytes). Thread-safe. Raises TransferError naming no peer."""
        ...

    def close(self) -> None: ...


MakeFabric = Callable[[Mapping, TransferConfig, bool], Fabric]
"""(what to register, config, whether others write to it). Raises ValueError when the library is not there."""


def open_fabric_receiver(
    scheme: str, make: MakeFabric, mapping: Mapping, permits: Permits, config: TransferConfig
) -> Server:
    """Raises ValueError and OSError."""
    listening = listen(config)
    try:
        fabric = make(mapping, config, True)
    except BaseException:
        listening.close()
        raise
    details = json.dumps({"peer": fabric.peer, "address": mapping.address}).encode()
    address = tcp_address(scheme, listening)
    return Server(listening, address, permits, config, _FabricChannel, details=details, release=fabric.close)


def connect_fabric(make: MakeFabric, address: str, region: Region, config: TransferConfig) -> Sender:
    """Raises ValueError when the library is not there, or the address is none."""
    host_and_port(address)
    mapping = Mapping(region, is_writable=True)
    try:
        fabric = make(mapping, config, False)
    except BaseException:
        mapping.close()
        raise

    def close() -> None:
        fabric.close()
        mapping.close()

    send = functools.partial(_send, address, fabric, mapping)
    return Client(address, region, functools.partial(connect_session, address, config), send, close)


def _send(
    address: str, fabric: Fabric, mapping: Mapping, session: Session, request: bytes, ranges: Sequence[ByteRange]
) -> None:
    session.stream.send(request)
    refusal = session.receive_reply()
    if refusal is not None:
        raise TransferError(f"{address} refuses a write of KV: {refusal}")
    there = json.loads(session.details)
    parts = [(mapping.address + part.source, there["address"] + part.target, part.num_bytes) for part in ranges]
    try:
        fabric.write(there["peer"], parts)
    except TransferError as err:
        raise TransferError(f"{address}: {err}") from err
    session.stream.send(_DONE)


class _FabricChannel:
    def __init__(self, session: Session) -> None:
        tune(session.stream)

    def receive(self, session: Session, request: WriteRequest, write: Write) -> None:
        session.reply()
        # However long it takes: until then the pages are not ours.
        if not session.stream.wait():
            time.sleep(_SETTLE_S)
            raise TransferError(f"{session.stream.peer} left in the middle of a write")
        session.stream.receive_bytes(len(_DONE))

    def refuse(self, session: Session, request: WriteRequest) -> None:
        pass

    def cut(self, session: Session) -> None:
        """Only its sender can end it."""

    def close(self) -> None:
        pass
