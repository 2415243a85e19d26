from pathlib import Path

import pytest

from xllm_compile.scheduler.registry.etcd_config import EtcdConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoints": ()}, "endpoints must name at least one HOST:PORT"),
        ({"endpoints": ("http://h:2379",)}, "endpoint 'http://h:2379' must be HOST:PORT"),
        ({"endpoints": ("h",)}, "endpoint 'h' must be HOST:PORT"),
        ({"endpoints": ("h:0",)}, "endpoint 'h:0' must be HOST:PORT"),
        ({"endpoints": ("h:65536",)}, "endpoint 'h:65536' must be HOST:PORT"),
        ({"timeout_s": 0}, "timeout_s=0 must be above 0"),
        ({"user": "u"}, "user='u' and a password come together"),
        ({"password": "p"}, "user='' and a password come together"),
        ({"use_tls": True, "cert_file": Path("c")}, "cert_file=c and key_file=None come together"),
        ({"ca_file": Path("c")}, "ca_file=c and cert_file=None need use_tls"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        EtcdConfig(**{"endpoints": ("h:1",), **options})


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    config = EtcdConfig(endpoints=("h:1",), use_tls=True, ca_file=tmp_path / "no.pem")
    with pytest.raises(ValueError, match=r"cannot read .*no\.pem: No such file or directory; give a PEM file"):
        config.credentials()


def test_a_password_is_not_printed():
    assert "secret" not in repr(EtcdConfig(endpoints=("[::1]:2379",), user="u", password="secret"))
