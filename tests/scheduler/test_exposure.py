from dataclasses import replace

import pytest

from xllm_compile.scheduler.exposure import Port, check_ports, is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com", ""])
def test_what_other_machines_reach(host):
    assert not is_loopback(host)


def port(name: str, host: str, *, is_guarded: bool) -> Port:
    return Port(name=name, host_option="--host", host=host, is_guarded=is_guarded, guard="--api-key")


def test_the_port_that_is_open_to_others_is_named():
    ports = [
        port("HTTP", "0.0.0.0", is_guarded=True),
        port("gRPC", "127.0.0.1", is_guarded=False),
        port("the registry", "10.0.0.1", is_guarded=False),
    ]
    with pytest.raises(ValueError, match=r"--host 10\.0\.0\.1: the registry is reachable .* give --api-key"):
        check_ports(ports, allow_unauthenticated=False)
    check_ports(ports, allow_unauthenticated=True)
    check_ports(ports[:2], allow_unauthenticated=False)


def test_a_port_that_nothing_opens_to_all_does_not_offer_it():
    takes_kv = Port(
        name="the port that takes KV",
        host_option="--transfer-host",
        host="10.0.0.1",
        is_guarded=False,
        guard="--transfer-secret",
        may_be_open=False,
    )
    for allow_unauthenticated in (False, True):
        with pytest.raises(ValueError, match=r"give --transfer-secret$"):
            check_ports([takes_kv], allow_unauthenticated=allow_unauthenticated)
    check_ports([replace(takes_kv, is_guarded=True)], allow_unauthenticated=False)
