"""What goes wrong between two processes: each fault ends in an error that names the peer, and the other side lives."""

import contextlib
import ctypes
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import xxhash

from tests.runtime.transfer.memory import content, read
from tests.runtime.transfer.peer import Peer, digest, send_half
from xllm_compile.runtime.transfer.connect import connect, open_receiver
from xllm_compile.runtime.transfer.mapping import Mapping
from xllm_compile.runtime.transfer.permits import Permits
from xllm_compile.runtime.transfer.session import Session, greet_receiver
from xllm_compile.runtime.transfer.shm import open_shm_receiver
from xllm_compile.runtime.transfer.stream import ConnectionLostError, Stream
from xllm_compile.runtime.transfer.tcp import connect_session
from xllm_compile.runtime.transfer.transfer import ByteRange, Receiver, Region, Sender, TransferConfig, TransferError

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.integration]

SIZE = 32 << 20
# Nothing here waits for it: what should end at once but waits makes the suite's own limit fail.
CONFIG = TransferConfig(timeout_s=600)
WHOLE = ByteRange(source=0, target=0, num_bytes=SIZE)
BOTH = pytest.mark.parametrize("scheme", ["shm", "tcp"])


@pytest.fixture
def peer() -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def start(seed: int = -1, **config: int) -> Peer:
        peers.append(Peer(SIZE, seed, **{"timeout_s": 600, **config}))
        return peers[-1]

    yield start
    for one in peers:
        one.kill()


def ready_receiver(peer, scheme):
    """A process that takes KV, its addresses, and a token for all of its memory."""
    receiver = peer()
    addresses = receiver.ask("receive", scheme)
    token = secrets.token_bytes(16)
    receiver.ask("permit", token.hex(), (0, SIZE))
    return receiver, addresses, token


def permitted(receiver: Receiver, *ranges: tuple[int, int]) -> bytes:
    token = secrets.token_bytes(16)
    receiver.permit(token, ranges or [(0, SIZE)])
    return token


def write_whole(sender: Sender, token: bytes) -> None:
    sender.write(token, [WHOLE])


class HeldCopy:
    """Copies, and stops in the middle until it is let go on."""

    def __init__(self) -> None:
        self.is_reached, self.go_on = Event(), Event()

    def __call__(self, target: int, source: int, num_bytes: int) -> None:
        ctypes.memmove(target, source, num_bytes // 2)
        self.is_reached.set()
        assert self.go_on.wait(600)
        ctypes.memmove(target + num_bytes // 2, source + num_bytes // 2, num_bytes - num_bytes // 2)


@contextlib.contextmanager
def half_written(address: str, token: bytes, num_bytes: int = SIZE) -> Iterator[Session]:
    """A sender over TCP that has sent the first half of a write."""
    session = send_half(address, CONFIG, token, num_bytes)
    yield session
    session.stream.close()


def test_a_shm_sender_killed_in_the_middle_leaves_pages_that_can_be_used_again(peer, target, source):
    copy = HeldCopy()
    receiver = open_receiver(["shm"], target, CONFIG, copy)
    token = permitted(receiver)
    killed = peer(1)
    killed.ask("connect", *receiver.addresses)
    killed.start("write", token.hex(), (0, 0, SIZE))
    assert copy.is_reached.wait(600)
    killed.kill()
    with ThreadPoolExecutor(1) as pool:
        revoked = pool.submit(receiver.revoke, token)
        assert not revoked.done()
        copy.go_on.set()
        revoked.result()
    # No copy goes on: what the next holder writes stays.
    sender = connect(receiver.addresses, source, CONFIG)
    write_whole(sender, permitted(receiver))
    assert read(target) == content(SIZE, 1)
    sender.close()
    receiver.close()


def test_a_shm_write_is_cut_short_by_revoke(target, source):
    copy, permits, mapping = HeldCopy(), Permits(SIZE), Mapping(target, is_writable=True)
    server = open_shm_receiver(mapping, permits, CONFIG, copy)
    sender = connect([server.address], source, CONFIG)
    token = secrets.token_bytes(16)
    permits.permit(token, [(0, SIZE)])
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write_whole, sender, token)
        assert copy.is_reached.wait(600)
        with pytest.raises(TransferError, match="must stay unused"):
            permits.revoke(token, 0)
        copy.go_on.set()
        with pytest.raises(TransferError, match=r"shm:.* refuses a write of KV: the token was revoked"):
            written.result()
    permits.revoke(token, 0)
    assert not any(read(target, SIZE // 2, SIZE // 2))
    sender.close()
    server.close()
    mapping.close()


def test_a_tcp_sender_killed_in_the_middle_leaves_pages_that_can_be_used_again(peer, target, source):
    receiver = open_receiver(["tcp"], target, CONFIG)
    token = permitted(receiver)
    killed = peer(1)
    killed.ask("write_half", receiver.addresses[0], token.hex())
    killed.kill()
    receiver.revoke(token)
    sender = connect(receiver.addresses, source, CONFIG)
    write_whole(sender, permitted(receiver))
    assert read(target) == content(SIZE, 1)
    sender.close()
    receiver.close()


def test_a_tcp_write_is_cut_short_by_revoke_though_its_sender_hangs(target, source):
    receiver = open_receiver(["tcp"], target, CONFIG)
    token = permitted(receiver)
    with half_written(receiver.addresses[0], token) as session:
        receiver.revoke(token)
        with pytest.raises(ConnectionLostError):
            session.stream.send(bytes(SIZE // 2), bytes(8))
            session.receive_reply()
    sender = connect(receiver.addresses, source, CONFIG)
    write_whole(sender, permitted(receiver))
    assert read(target) == content(SIZE, 1)
    sender.close()
    receiver.close()


def test_a_torn_write_is_none_and_the_receiver_takes_the_next(target, source):
    receiver = open_receiver(["tcp"], target, CONFIG)
    token = permitted(receiver)
    for num_bytes in (1000, SIZE):
        with half_written(receiver.addresses[0], token, num_bytes):
            pass
    session = connect_session(receiver.addresses[0], CONFIG)
    session.stream.send(session.request(token, [WHOLE])[:-1])
    session.stream.close()
    sender = connect(receiver.addresses, source, CONFIG)
    write_whole(sender, token)
    assert read(target) == content(SIZE, 1)
    sender.close()
    receiver.close()


def test_a_corrupted_byte_is_found_and_the_connection_goes_on(target):
    receiver = open_receiver(["tcp"], target, CONFIG)
    token = permitted(receiver)
    session = connect_session(receiver.addresses[0], CONFIG)
    size = 3_000_000
    sent = content(size, 5)
    for damaged, reply in ((size // 2, "the bytes that arrived are not those that were sent"), (None, None)):
        data = bytearray(sent)
        if damaged is not None:
            data[damaged] ^= 1
        part = ByteRange(source=0, target=7, num_bytes=size)
        session.stream.send(session.request(token, [part]), bytes(data), xxhash.xxh3_64(sent).digest())
        assert (session.receive_reply() or "").startswith(reply or "")
        assert reply or read(target, 7, size) == sent
    session.stream.close()
    receiver.close()


def test_a_request_that_is_sent_again_or_changed_proves_nothing(target):
    receiver = open_receiver(["tcp"], target, CONFIG)
    token = permitted(receiver)
    session = connect_session(receiver.addresses[0], CONFIG)
    request = session.request(token, [ByteRange(source=0, target=0, num_bytes=1)])
    other = session.request(token, [ByteRange(source=0, target=1, num_bytes=1)])
    data = b"x" + xxhash.xxh3_64(b"x").digest()
    for message, is_taken in ((request, True), (request, False), (other[:-24] + request[-24:], False)):
        session.stream.send(message, data)
        assert (session.receive_reply() is None) is is_taken
    session.stream.close()
    receiver.close()


@BOTH
def test_a_killed_receiver_is_an_error_at_once_that_names_it(peer, source, scheme):
    receiver, addresses, token = ready_receiver(peer, scheme)
    sender = connect(addresses, source, CONFIG)
    write_whole(sender, token)
    assert receiver.ask("digest", 0, SIZE) == digest(content(SIZE, 1))
    os.kill(receiver.process.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write_whole, sender, token)
        receiver.kill()
        with pytest.raises(TransferError, match=scheme):
            written.result()
    with pytest.raises(TransferError, match=rf"{scheme}:.* cannot be reached: Connection refused; has it ended"):
        write_whole(sender, token)
    sender.close()


@BOTH
def test_a_receiver_that_hangs_is_an_error_after_the_timeout(peer, source, scheme):
    receiver, addresses, token = ready_receiver(peer, scheme)
    sender = connect(addresses, source, TransferConfig(timeout_s=0.2))
    os.kill(receiver.process.pid, signal.SIGSTOP)
    with pytest.raises(TransferError, match=rf"{scheme}:.* made no progress for 0.2 s"):
        write_whole(sender, token)
    os.kill(receiver.process.pid, signal.SIGCONT)
    sender.close()


def test_a_sender_that_hangs_is_dropped_after_the_timeout(target):
    receiver = open_receiver(["tcp"], target, TransferConfig(timeout_s=0.2))
    with half_written(receiver.addresses[0], permitted(receiver)) as session, pytest.raises(ConnectionLostError):
        session.receive_reply()
    receiver.close()


@BOTH
def test_a_receiver_restarted_at_the_same_address_refuses_old_tokens_and_takes_new_ones(peer, source, scheme):
    receiver, addresses, token = ready_receiver(peer, scheme)
    sender = connect(addresses, source, CONFIG)
    write_whole(sender, token)
    receiver.kill()
    if scheme == "shm":
        # A new start has a new name.
        sender.close()
        receiver = peer()
        sender = connect(receiver.ask("receive", scheme), source, CONFIG)
    else:
        receiver = peer(port=int(addresses[0].rpartition(":")[2]))
        assert receiver.ask("receive", scheme) == addresses
    with pytest.raises(TransferError, match="does not know the token: revoked, or given by an earlier start"):
        write_whole(sender, token)
    token = secrets.token_bytes(16)
    receiver.ask("permit", token.hex(), (0, SIZE))
    write_whole(sender, token)
    assert receiver.ask("digest", 0, SIZE) == digest(content(SIZE, 1))
    sender.close()


@BOTH
def test_two_senders_at_once(peer, target, scheme):
    receiver = open_receiver([scheme], target, CONFIG)
    senders = [peer(seed) for seed in (1, 2)]
    half = SIZE // 2
    for at, sender in enumerate(senders):
        token = permitted(receiver, (at * half, half))
        sender.ask("connect", *receiver.addresses)
        sender.start("write", token.hex(), *[(at * half, at * half, half)] * 4)
    assert [sender.answer() for sender in senders] == [None, None]
    assert read(target) == content(SIZE, 1)[:half] + content(SIZE, 2)[half:]
    receiver.close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
def test_memory_is_not_shared_with_another_user(target, source):
    receiver = open_receiver(["shm"], target, CONFIG)
    token = permitted(receiver)
    name = receiver.addresses[0].partition("/")[2]
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        code = 1
        try:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(f"\0xllm-kv-{name}")
            session = greet_receiver(Stream(connection, "receiver", 600), b"")
            socket.send_fds(connection, [b"f"], [source.file])
            session.stream.send(session.request(token, [WHOLE]))
            session.receive_reply()
        except (ConnectionLostError, BrokenPipeError):
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert not any(read(target))
    receiver.close()


def test_memory_that_could_shrink_during_a_copy_is_refused(target):
    receiver = open_receiver(["shm"], target, CONFIG)
    file = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.pwrite(file, content(SIZE, 1), 0)
    sender = connect(receiver.addresses, Region(file=file, num_bytes=SIZE), CONFIG)
    with pytest.raises(TransferError):
        write_whole(sender, permitted(receiver))
    assert not any(read(target))
    sender.close()
    os.close(file)
    receiver.close()


@pytest.mark.parametrize(
    "words", [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(100), secrets.token_bytes(4096), b""]
)
def test_strangers_are_turned_away_and_the_receiver_lives(target, source, words):
    receiver = open_receiver(["tcp"], target, CONFIG)
    host, port = receiver.addresses[0].split(":")[1:]
    # It may be turned away before it has said all.
    with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(words)
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(1000)[:8] == b"xllm-kv1"
        assert stranger.recv(1000) == b""
    sender = connect(receiver.addresses, source, CONFIG)
    write_whole(sender, permitted(receiver))
    sender.close()
    receiver.close()
