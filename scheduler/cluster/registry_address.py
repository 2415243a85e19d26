"""What --registry names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from xllm_compile.scheduler.registry.etcd_config import EtcdConfig
from xllm_compile.scheduler.tls import TlsConfig

SERVED_USER = "xllm"
"""Of the registry that a gateway serves; its password is the API key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryAddress:
    config: EtcdConfig
    namespace: str = ""
    """Before all keys."""


def registry_of(options: Mapping[str, Any]) -> RegistryAddress:
    """What --registry names, with the key and the certificates that the options give for it. Raises ValueError."""
    return parse_registry(
        options["registry"], api_key=next(iter(options["api_keys"]), None), tls=TlsConfig.from_options(options)
    )


def parse_registry(text: str, *, api_key: str | None, tls: TlsConfig | None = None) -> RegistryAddress:
    """HOST:PORT of a gateway, or etcd://[USER:PASSWORD@]HOST:PORT[,HOST:PORT...][/NAMESPACE]; etcds:// with TLS.

    A gateway's speaks TLS where tls has a CA.

    Raises ValueError naming what is wrong.
    """
    tls = tls or TlsConfig()
    if "://" not in text:
        user, password = (SERVED_USER, api_key) if api_key else ("", "")
        files = _tls_files(tls, is_used=tls.ca_file is not None)
        return RegistryAddress(config=EtcdConfig(endpoints=(text,), user=user, password=password, **files))
    parts = urlsplit(text)
    if parts.scheme not in ("etcd", "etcds"):
        raise ValueError(f"--registry {text}: {parts.scheme!r} must be etcd or etcds, or leave it out for HOST:PORT")
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    config = EtcdConfig(
        endpoints=tuple(hosts.split(",")),
        user=unquote(user),
        password=unquote(password),
        **_tls_files(tls, is_used=parts.scheme == "etcds"),
    )
    return RegistryAddress(config=config, namespace=parts.path.rstrip("/"))


def _tls_files(tls: TlsConfig, *, is_used: bool) -> dict[str, Any]:
    if not is_used:
        return {}
    return {"use_tls": True, "ca_file": tls.ca_file, "cert_file": tls.cert_file, "key_file": tls.key_file}
