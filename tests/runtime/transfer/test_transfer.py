"""What every transfer does, on real sockets between two regions."""

import os
import random
import secrets
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.runtime.transfer.libraries import needs_library
from tests.runtime.transfer.memory import content, read
from xllm_compile.runtime.transfer.connect import connect, open_receiver
from xllm_compile.runtime.transfer.transfer import ByteRange, TransferConfig, TransferError

pytestmark = pytest.mark.usefixtures("no_leaks")

SIZE = 3 << 20
CONFIG = TransferConfig(secret=b"between us", timeout_s=30, allow_open_ports=True)


@pytest.fixture(params=["shm", "tcp", "mooncake", "nixl"])
def scheme(request):
    needs_library(request.param)
    return request.param


@pytest.fixture
def receiver(scheme, target):
    receiver = open_receiver([scheme], target, CONFIG)
    yield receiver
    receiver.close()


@pytest.fixture
def sender(scheme, receiver, source):
    sender = connect(receiver.addresses, source, CONFIG, [scheme])
    yield sender
    sender.close()


def permitted(receiver, *ranges):
    token = secrets.token_bytes(16)
    receiver.permit(token, ranges or [(0, SIZE)])
    return token


def test_ranges_of_any_size_and_place_arrive_and_nothing_else_changes(receiver, sender, target):
    rng = random.Random(2)
    sizes = [0, 1, 7, 64, 4095, 4096, 4097, 65536, 1 << 20, (1 << 20) + 3]
    ranges, at = [], 5
    for size in sizes:
        ranges.append(ByteRange(source=rng.randrange(SIZE - size), target=at, num_bytes=size))
        at += size + rng.randrange(1, 5000)
    rng.shuffle(ranges)
    token = permitted(receiver, *((part.target, part.num_bytes) for part in ranges))
    sender.write(token, ranges)
    expected, sent = bytearray(SIZE), content(SIZE, 1)
    for part in ranges:
        expected[part.target : part.target + part.num_bytes] = sent[part.source : part.source + part.num_bytes]
    assert read(target) == expected


def test_many_ranges_and_the_whole_region(receiver, sender, target):
    token = permitted(receiver)
    order = list(range(SIZE // 1024))
    random.Random(3).shuffle(order)
    sender.write(token, [ByteRange(source=at * 1024, target=at * 1024, num_bytes=1024) for at in order])
    assert read(target) == content(SIZE, 1)
    os.pwrite(target.file, bytes(SIZE), 0)
    sender.write(token, [ByteRange(source=0, target=0, num_bytes=SIZE)])
    assert read(target) == content(SIZE, 1)


def test_nothing_to_write_is_written(receiver, sender):
    sender.write(b"no token is looked at", [])
    sender.write(b"no token is looked at", [ByteRange(source=SIZE, target=0, num_bytes=0)])


@pytest.mark.parametrize("offset", [0, 1999, 3000])
def test_outside_of_the_permitted_ranges_nothing_is_written_and_the_connection_goes_on(
    receiver, sender, target, offset
):
    token = permitted(receiver, (1000, 1000), (2000, 500))
    inside = ByteRange(source=0, target=1000, num_bytes=1500)
    for size in (1024, 1 << 20):
        with pytest.raises(TransferError, match=f"does not permit to write {size} bytes at {offset}"):
            sender.write(token, [inside, ByteRange(source=0, target=offset, num_bytes=size)])
    assert not any(read(target))
    sender.write(token, [inside])
    assert read(target, 1000, 1500) == content(SIZE, 1)[:1500]


def test_a_wrong_a_revoked_and_an_unknown_token_are_refused(receiver, sender, target):
    token = permitted(receiver)
    part = [ByteRange(source=0, target=0, num_bytes=100_000)]
    sender.write(token, part)
    os.pwrite(target.file, bytes(100_000), 0)
    receiver.revoke(token)
    receiver.revoke(token)
    receiver.revoke(secrets.token_bytes(16))
    for refused in (token, secrets.token_bytes(16), b""):
        with pytest.raises(TransferError, match="does not know the token"):
            sender.write(refused, part)
    assert not any(read(target))
    sender.write(permitted(receiver), part)


def test_ranges_outside_of_the_senders_region_are_an_error_of_the_caller(receiver, sender):
    token = permitted(receiver)
    for source, size in ((SIZE, 1), (-1, 2), (0, SIZE + 1), (5, -1)):
        with pytest.raises(ValueError, match=f"{size} bytes at {source}"):
            sender.write(token, [ByteRange(source=source, target=0, num_bytes=size)])


def test_writes_of_many_threads_at_once_do_not_mix(scheme, receiver, sender, source, target):
    other = connect(receiver.addresses, source, CONFIG, [scheme])
    size = SIZE // 64

    def write(at):
        token = permitted(receiver, (at * size, size))
        for _ in range(5):
            (sender, other)[at % 2].write(token, [ByteRange(source=at * size, target=at * size, num_bytes=size)])
        receiver.revoke(token)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(64)))
    other.close()
    assert read(target) == content(SIZE, 1)


def test_another_secret_is_refused(scheme, receiver, source):
    sender = connect(
        receiver.addresses, source, TransferConfig(secret=b"a guess", timeout_s=30, allow_open_ports=True), [scheme]
    )
    with pytest.raises(TransferError, match="another secret"):
        sender.write(permitted(receiver), [ByteRange(source=0, target=0, num_bytes=1)])
    sender.close()


def test_a_receiver_that_closed_is_a_named_error_and_so_is_a_sender_that_did(scheme, receiver, source):
    sender = connect(receiver.addresses, source, CONFIG, [scheme])
    part = [ByteRange(source=0, target=0, num_bytes=1)]
    token = permitted(receiver)
    sender.write(token, part)
    receiver.close()
    with pytest.raises(TransferError, match=receiver.addresses[0].split("/")[0]):
        sender.write(token, part)
    sender.close()
    with pytest.raises(TransferError, match="closed by this side"):
        sender.write(token, part)
