import pytest

from tests.runtime.transfer.memory import memory
from xllm_compile.runtime.transfer.connect import connect, open_receiver
from xllm_compile.runtime.transfer.shm import machine_id
from xllm_compile.runtime.transfer.transfer import TransferConfig

pytestmark = pytest.mark.usefixtures("no_leaks")

CONFIG = TransferConfig()


@pytest.fixture
def region():
    with memory(8192) as region:
        yield region


def test_a_receiver_names_its_fastest_address_first_and_closes_twice(region):
    receiver = open_receiver(["tcp", "shm", "tcp"], region, CONFIG)
    assert [address.partition(":")[0] for address in receiver.addresses] == ["shm", "tcp"]
    receiver.close()
    receiver.close()


@pytest.mark.parametrize(
    ("addresses", "chosen"),
    [
        (["tcp:h:1", f"shm:{machine_id()}/name"], "shm"),
        (["shm:another/name", "tcp:h:1", "tcp:h:2"], "tcp:h:1"),
        (["pigeon:loft", "tcp:h:1"], "tcp:h:1"),
    ],
)
def test_a_sender_takes_the_fastest_way_that_both_have(region, addresses, chosen):
    sender = connect(addresses, region, CONFIG)
    assert sender.address.startswith(chosen)
    sender.close()
    sender.close()


@pytest.mark.parametrize("addresses", [[], ["shm:another/name"], ["pigeon:loft"], ["tcp"]])
def test_no_common_way_is_an_error_that_names_what_there_is(region, addresses):
    with pytest.raises(ValueError, match=f"no way to send KV to .*{''.join(addresses)}.*this side has shm, tcp"):
        connect(addresses, region, CONFIG)


@pytest.mark.parametrize("address", ["tcp:", "tcp:host", "tcp:host:", "tcp:host:99999", "tcp::1", "tcp:h:-1"])
def test_an_address_that_is_none_is_an_error(region, address):
    with pytest.raises(ValueError, match=f"'{address}' is no address .* must be SCHEME:HOST:PORT"):
        connect([address], region, CONFIG)


@pytest.mark.parametrize(("schemes", "message"), [([], "by nothing"), (["shm", "pigeon"], "transfer pigeon: there is")])
def test_unknown_schemes_are_an_error(region, schemes, message):
    with pytest.raises(ValueError, match=message):
        open_receiver(schemes, region, CONFIG)


def test_listening_where_strangers_are_needs_a_secret(region):
    with pytest.raises(ValueError, match=r"on 192\.0\.2\.1 without a secret"):
        open_receiver(["tcp"], region, TransferConfig(host="192.0.2.1"))
    receiver = open_receiver(["tcp"], region, TransferConfig(host="::1"))
    assert receiver.addresses[0].startswith("tcp:[::1]:")
    receiver.close()


def test_a_port_that_is_taken_is_an_error_that_says_so(region):
    receiver = open_receiver(["tcp"], region, CONFIG)
    port = int(receiver.addresses[0].rpartition(":")[2])
    with pytest.raises(OSError, match=f"KV transfers cannot listen on 127.0.0.1:{port}: Address already in use"):
        open_receiver(["shm", "tcp"], region, TransferConfig(port=port))
    receiver.close()


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_an_address_that_peers_cannot_use_is_an_error(region, host):
    with pytest.raises(ValueError, match="name an address that peers reach"):
        open_receiver(["tcp"], region, TransferConfig(host=host, secret=b"s"))


@pytest.mark.parametrize(("field", "value"), [("timeout_s", 0), ("timeout_s", float("nan")), ("port", 65536)])
def test_a_config_out_of_range_is_an_error(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        TransferConfig(**{field: value})
