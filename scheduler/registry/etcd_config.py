"""Where etcd is, and who we are to it."""

from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio


@dataclass(frozen=True, kw_only=True, slots=True)
class EtcdConfig:
    endpoints: tuple[str, ...]
    """HOST:PORT of each member; the next one is asked when one does not answer."""
    timeout_s: float = 5.0
    """Longest time to look for an answer, over all endpoints."""
    user: str = ""
    password: str = field(default="", repr=False)
    """Both or neither."""
    use_tls: bool = False
    ca_file: Path | None = None
    """Certificates (PEM) that the server's is checked against; None takes gRPC's own."""
    cert_file: Path | None = None
    """The client's certificate and key (PEM), where the server wants one; both or neither."""
    key_file: Path | None = None

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ValueError("endpoints must name at least one HOST:PORT")
        for endpoint in self.endpoints:
            host, _, port = endpoint.rpartition(":")
            if "/" in endpoint or not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ValueError(f"endpoint {endpoint!r} must be HOST:PORT, such as 127.0.0.1:2379")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s={self.timeout_s} must be above 0")
        if bool(self.user) != bool(self.password):
            raise ValueError(f"user={self.user!r} and a password come together")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError(f"cert_file={self.cert_file} and key_file={self.key_file} come together")
        if not self.use_tls and (self.ca_file or self.cert_file):
            raise ValueError(f"ca_file={self.ca_file} and cert_file={self.cert_file} need use_tls")

    @property
    def attempt_timeout_s(self) -> float:
        """Of one call: a member that is stuck leaves time for the others."""
        return self.timeout_s / (len(self.endpoints) + 1)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None without TLS. Raises ValueError naming a file that cannot be read."""
        if not self.use_tls:
            return None
        ca, key, cert = (_read(path) for path in (self.ca_file, self.key_file, self.cert_file))
        return grpc.ssl_channel_credentials(ca, key, cert)


def _read(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path is not None else None
    except OSError as err:
        raise ValueError(f"cannot read {path}: {err.strerror}; give a PEM file") from err
