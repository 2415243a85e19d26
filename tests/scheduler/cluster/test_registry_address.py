import pytest

from xllm_compile.scheduler.cluster.registry_address import parse_registry


def test_a_gateway_by_host_and_port():
    found = parse_registry("10.0.0.1:8002", api_key=None)
    assert (found.config.endpoints, found.config.user, found.namespace) == (("10.0.0.1:8002",), "", "")
    with_key = parse_registry("[::1]:8002", api_key="secret")
    assert (with_key.config.user, with_key.config.password) == ("xllm", "secret")


def test_etcd_by_url():
    found = parse_registry("etcds://us%40er:pass@a:1,b:2/team/", api_key="secret")
    config = found.config
    assert (config.endpoints, config.user, config.password, config.use_tls) == (("a:1", "b:2"), "us@er", "pass", True)
    assert found.namespace == "/team"
    plain = parse_registry("etcd://a:1", api_key="secret").config
    assert (plain.user, plain.use_tls) == ("", False)


@pytest.mark.parametrize("text", ["http://a:1", "a", "etcd://", "etcd://a", "etcd://user@a:1", "a:0"])
def test_what_is_no_address(text):
    with pytest.raises(ValueError, match=r"must|come together"):
        parse_registry(text, api_key=None)
