"""The receiving process of the transfer measurement: takes KV by every scheme, and plain bytes as TCP's own limit.

Prints one JSON line when it is ready, and ends with its standard input.
"""

import argparse
import json
import socket
import sys
from pathlib import Path
from threading import Thread

from xllm_compile.runtime.memory.cpu_memory import HUGE_PAGE_BYTES, CpuMemory
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.transfer.connect import open_receiver
from xllm_compile.runtime.transfer.transfer import TransferConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernels", type=Path)
    parser.add_argument("--bytes", type=int, required=True, help="size of the region")
    parser.add_argument("--token", required=True, help="of writes to all of it, in hexadecimal")
    parser.add_argument("--schemes", nargs="+", required=True)
    args = parser.parse_args()
    native.load_kernels(args.kernels)
    memory = present_pages(args.bytes)
    receiver = open_receiver(args.schemes, memory.region, CONFIG, native.copy_bytes())
    receiver.permit(bytes.fromhex(args.token), [(0, args.bytes)])
    listening = socket.create_server(("127.0.0.1", 0))
    Thread(target=_take_plain_bytes, args=(listening,), daemon=True).start()
    print(json.dumps({"addresses": receiver.addresses, "plain_port": listening.getsockname()[1]}), flush=True)
    sys.stdin.read()
    receiver.close()


# Nothing of the figures is worth a secret; mooncake's and nixl's ports are as open as they are on any machine.
CONFIG = TransferConfig(timeout_s=60, allow_open_ports=True)


def present_pages(num_bytes: int) -> CpuMemory:
    """Pages of a KV cache that have their memory."""
    memory = CpuMemory(num_bytes // HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
    for page in range(memory.num_pages):
        memory.prepare(page)
    return memory


def _take_plain_bytes(listening: socket.socket) -> None:
    """Each connection says how many bytes a message has, and gets a byte back for each message."""
    connection, _ = listening.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(1 << 20))
    while header := connection.recv(8, socket.MSG_WAITALL):
        left = int.from_bytes(header, "little")
        while left:
            left -= connection.recv_into(buffer, min(left, len(buffer)), socket.MSG_WAITALL)
        connection.sendall(b"k")


if __name__ == "__main__":
    main()
