"""How one instance takes and sends KV."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from xllm_compile.runtime.transfer.connect import connect, open_receiver
from xllm_compile.runtime.transfer.shm import CopyBytes
from xllm_compile.runtime.transfer.transfer import Receiver, Region, Sender, TransferConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferEndpoint:
    """Both directions, over the pages of one KV cache."""

    receiver: Receiver
    region: Region
    config: TransferConfig

    def connect(self, addresses: Sequence[str]) -> Sender:
        """Raises ValueError where none of the addresses can be reached from here."""
        return connect(addresses, self.region, self.config)


def open_endpoint(
    schemes: Sequence[str], region: Region, config: TransferConfig, copy: CopyBytes = ctypes.memmove
) -> TransferEndpoint:
    """Raises what open_receiver raises."""
    return TransferEndpoint(receiver=open_receiver(schemes, region, config, copy), region=region, config=config)
