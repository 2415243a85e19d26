"""Writes by a library that the receiver does not see: the permits are kept by asking."""

import ctypes
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from tests.runtime.transfer.libraries import MODULES, needs_library, why_missing
from tests.runtime.transfer.memory import content, memory, read
from tests.runtime.transfer.peer import Peer
from xllm_compile.runtime.transfer import fabric
from xllm_compile.runtime.transfer.connect import connect
from xllm_compile.runtime.transfer.fabric import connect_fabric, open_fabric_receiver
from xllm_compile.runtime.transfer.mapping import Mapping
from xllm_compile.runtime.transfer.permits import Permits
from xllm_compile.runtime.transfer.tcp import connect_session
from xllm_compile.runtime.transfer.transfer import ByteRange, TransferConfig, TransferError

pytestmark = pytest.mark.usefixtures("no_leaks")

SIZE = 1 << 20
CONFIG = TransferConfig(timeout_s=600)
WHOLE = ByteRange(source=0, target=0, num_bytes=SIZE)


class OwnMemory:
    """A fabric between regions of one process. Holds every write until it is let go on."""

    peer = "here"

    def __init__(self) -> None:
        self.is_reached, self.go_on = Event(), Event()
        self.failure: TransferError | None = None
        self.is_closed = False

    def __call__(self, mapping: Mapping, config: TransferConfig, is_receiver: bool) -> "OwnMemory":
        return self

    def write(self, peer: str, parts: Sequence[tuple[int, int, int]]) -> None:
        assert peer == self.peer
        self.is_reached.set()
        assert self.go_on.wait(600)
        if self.failure:
            raise self.failure
        for source, target, num_bytes in parts:
            ctypes.memmove(target, source, num_bytes)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def setup():
    library = OwnMemory()
    with memory(SIZE) as target, memory(SIZE, seed=1) as source:
        mapping, permits = Mapping(target, is_writable=True), Permits(SIZE)
        token = secrets.token_bytes(16)
        permits.permit(token, [(0, SIZE)])
        server = open_fabric_receiver("own", library, mapping, permits, CONFIG)
        sender = connect_fabric(library, server.address, source, CONFIG)
        yield library, permits, token, sender, target
        sender.close()
        library.is_closed = False
        server.close()
        assert library.is_closed
        mapping.close()


def test_the_library_writes_only_what_the_receiver_agrees_to(setup):
    library, permits, token, sender, target = setup
    library.go_on.set()
    small = secrets.token_bytes(16)
    permits.permit(small, [(0, 10)])
    with pytest.raises(TransferError, match=r"own:127\.0\.0\.1:\d+ refuses a write of KV: the token does not permit"):
        sender.write(small, [WHOLE])
    assert not library.is_reached.is_set() and not any(read(target))
    sender.write(token, [WHOLE])
    assert read(target) == content(SIZE, 1)


def test_revoke_waits_for_the_library(setup):
    library, permits, token, sender, _ = setup
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(sender.write, token, [WHOLE])
        assert library.is_reached.wait(600)
        with pytest.raises(TransferError, match="must stay unused"):
            permits.revoke(token, 0)
        library.go_on.set()
        written.result()
    permits.revoke(token, 0)
    with pytest.raises(TransferError, match="does not know the token"):
        sender.write(token, [WHOLE])


def test_a_write_that_the_library_fails_at_names_the_receiver_and_ends(setup, monkeypatch):
    monkeypatch.setattr(fabric, "_SETTLE_S", 0)
    library, permits, token, sender, _ = setup
    library.failure = TransferError("the library could not write")
    library.go_on.set()
    with pytest.raises(TransferError, match=r"own:127\.0\.0\.1:\d+: the library could not write"):
        sender.write(token, [WHOLE])
    permits.revoke(token, 600)


def test_pages_of_a_sender_that_left_in_the_middle_are_free_after_what_was_on_its_way(setup, monkeypatch):
    monkeypatch.setattr(fabric, "_SETTLE_S", 0.05)
    _, permits, token, sender, _ = setup
    session = connect_session(sender.address, CONFIG)
    session.stream.send(session.request(token, [WHOLE]))
    assert session.receive_reply() is None
    with pytest.raises(TransferError, match="must stay unused"):
        permits.revoke(token, 0)
    session.stream.close()
    permits.revoke(token, 600)


@pytest.mark.parametrize(("scheme", "host"), [("mooncake", "127.0.0.1"), ("nixl", "192.0.2.1")])
def test_ports_that_are_open_to_anybody_must_be_allowed(scheme, host):
    with memory(SIZE) as region, pytest.raises(ValueError, match=r"anybody.*allow\s+open ports"):
        connect([f"{scheme}:{host}:1"], region, TransferConfig(host=host), [scheme])


@pytest.mark.parametrize("scheme", MODULES)
def test_a_library_that_is_not_there_is_an_error_that_says_how_to_get_it(scheme):
    if not why_missing(scheme):
        pytest.skip(f"{scheme} is installed")
    config = TransferConfig(allow_open_ports=True)
    with (
        memory(SIZE) as region,
        pytest.raises(ValueError, match=rf"{scheme} cannot be loaded .*xllm-compile\[{scheme}\]"),
    ):
        connect([f"{scheme}:127.0.0.1:1"], region, config, [scheme])


@pytest.mark.integration
@pytest.mark.parametrize("scheme", MODULES)
def test_a_killed_receiver_is_an_error_that_names_it(scheme):
    needs_library(scheme)
    config = TransferConfig(timeout_s=600, allow_open_ports=True)
    receiver = Peer(SIZE, timeout_s=600, allow_open_ports=True)
    with memory(SIZE, seed=1) as source:
        addresses = receiver.ask("receive", scheme)
        token = secrets.token_bytes(16)
        receiver.ask("permit", token.hex(), (0, SIZE))
        sender = connect(addresses, source, config, [scheme])
        sender.write(token, [WHOLE])
        receiver.kill()
        with pytest.raises(TransferError, match=scheme):
            sender.write(token, [WHOLE])
        sender.close()
