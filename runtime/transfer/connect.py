"""Chooses how KV moves between two instances."""

from collections.abc import Sequence

from xllm_compile.runtime.transfer.transfer import Receiver, Region, Sender, TransferConfig

SCHEMES = ("shm", "tcp", "mooncake", "nixl")
"""The fastest way first."""


def open_receiver(schemes: Sequence[str], region: Region, config: TransferConfig) -> Receiver:
    """Takes writes to the region by each of the schemes. Raises ValueError, and OSError when it cannot listen."""
    raise NotImplementedError("no transfer is built yet")


def connect(addresses: Sequence[str], region: Region, config: TransferConfig) -> Sender:
    """Sends from the region by the fastest of a receiver's addresses that this process can use.

    shm is for processes of one user on one machine. Connects when first written to. Raises ValueError when there is
    none.
    """
    raise NotImplementedError("no transfer is built yet")
