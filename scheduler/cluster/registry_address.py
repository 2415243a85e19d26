"""What --registry names."""

from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from xllm_compile.scheduler.registry.etcd_config import EtcdConfig

SERVED_USER = "xllm"
"""Of the registry that a gateway serves; its password is the API key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryAddress:
    config: EtcdConfig
    namespace: str = ""
    """Before all keys."""


def parse_registry(text: str, *, api_key: str | None) -> RegistryAddress:
    """HOST:PORT of a gateway, or etcd://[USER:PASSWORD@]HOST:PORT[,HOST:PORT...][/NAMESPACE]; etcds:// with TLS.

    Raises ValueError naming what is wrong.
    """
    if "://" not in text:
        user, password = (SERVED_USER, api_key) if api_key else ("", "")
        return RegistryAddress(config=EtcdConfig(endpoints=(text,), user=user, password=password))
    parts = urlsplit(text)
    if parts.scheme not in ("etcd", "etcds"):
        raise ValueError(f"--registry {text}: {parts.scheme!r} must be etcd or etcds, or leave it out for HOST:PORT")
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    config = EtcdConfig(
        endpoints=tuple(hosts.split(",")),
        user=unquote(user),
        password=unquote(password),
        use_tls=parts.scheme == "etcds",
    )
    return RegistryAddress(config=config, namespace=parts.path.rstrip("/"))
