"""An instance's side of a transfer in a process of its own: commands are JSON lines on stdin, answers on stdout.

python -m tests.runtime.transfer.peer NUM_BYTES SEED CONFIG, SEED -1 for zeros.
"""

import hashlib
import json
import os
import subprocess
import sys
from typing import Any

from tests.runtime.transfer.memory import memory, read
from xllm_compile.runtime.transfer.connect import connect, open_receiver
from xllm_compile.runtime.transfer.session import Session
from xllm_compile.runtime.transfer.tcp import connect_session
from xllm_compile.runtime.transfer.transfer import ByteRange, Receiver, Region, Sender, TransferConfig, TransferError


class Peer:
    """The other end of the pipe."""

    def __init__(self, num_bytes: int, seed: int = -1, **config: Any) -> None:
        command = [sys.executable, "-m", "tests.runtime.transfer.peer", str(num_bytes), str(seed), json.dumps(config)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def ask(self, command: str, *arguments: Any) -> Any:
        self.start(command, *arguments)
        return self.answer()

    def start(self, command: str, *arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *arguments]) + "\n")

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        """Whatever it is doing. As often as you like."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class _Commands:
    def __init__(self, region: Region, config: TransferConfig) -> None:
        self.region = region
        self.config = config
        self.receiver: Receiver
        self.sender: Sender
        self.half_written: Session

    def receive(self, *schemes: str) -> tuple[str, ...]:
        self.receiver = open_receiver(schemes, self.region, self.config)
        return self.receiver.addresses

    def permit(self, token: str, *ranges: tuple[int, int]) -> None:
        self.receiver.permit(bytes.fromhex(token), ranges)

    def digest(self, offset: int, num_bytes: int) -> str:
        return digest(read(self.region, offset, num_bytes))

    def connect(self, *addresses: str) -> None:
        self.sender = connect(addresses, self.region, self.config)

    def write(self, token: str, *ranges: tuple[int, int, int]) -> str | None:
        parts = [ByteRange(source=source, target=target, num_bytes=size) for source, target, size in ranges]
        try:
            self.sender.write(bytes.fromhex(token), parts)
        except TransferError as err:
            return str(err)
        return None

    def write_half(self, address: str, token: str) -> None:
        self.half_written = send_half(address, self.config, bytes.fromhex(token), self.region.num_bytes)


def send_half(address: str, config: TransferConfig, token: bytes, num_bytes: int) -> Session:
    """A write over TCP to the beginning of the region, as far as the middle."""
    session = connect_session(address, config)
    part = ByteRange(source=0, target=0, num_bytes=num_bytes)
    session.stream.send(session.request(token, [part]), bytes(num_bytes // 2))
    return session


def digest(data: bytes) -> str:
    return hashlib.blake2b(data).hexdigest()


def main() -> None:
    num_bytes, seed, config = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    with memory(num_bytes, None if seed < 0 else seed) as region:
        commands = _Commands(region, TransferConfig(**config))
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(getattr(commands, name)(*arguments)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
