"""TLS on the servers' ports and on the way to others: files in, credentials for gRPC and contexts for HTTP out."""

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grpc
    import grpc.aio


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsConfig:
    """Files are PEM. Read once: a new certificate needs a restart."""

    cert_file: Path | None = None
    """What we show: on our ports, and to servers that ask for a client's certificate. With its chain."""
    key_file: Path | None = None
    """Of the certificate, not encrypted; both or neither."""
    ca_file: Path | None = None
    """What the certificates of others are checked against. With it, connections to others use TLS."""
    client_auth: bool = False
    """Whether clients must show a certificate, too."""

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            given, missing = ("--tls-cert", "--tls-key") if self.cert_file else ("--tls-key", "--tls-cert")
            raise ValueError(f"{given} {self.cert_file or self.key_file} needs {missing} as well")
        if self.client_auth and not (self.cert_file and self.ca_file):
            raise ValueError("--tls-client-auth needs --tls-cert and --tls-key, and --tls-ca to check clients against")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "TlsConfig":
        """Raises ValueError where the options do not go together, or a file does not hold what it should."""
        tls = cls(
            cert_file=options["tls_cert"],
            key_file=options["tls_key"],
            ca_file=options["tls_ca"],
            client_auth=options.get("tls_client_auth", False),
        )
        # gRPC takes bad files without a word and fails every handshake.
        tls.client_context()
        return tls

    @property
    def is_served(self) -> bool:
        """Whether our ports speak TLS."""
        return self.cert_file is not None

    def server_credentials(self) -> "grpc.ServerCredentials | None":
        """None without a certificate."""
        if self.cert_file is None or self.key_file is None:
            return None
        import grpc

        pair = (_read(self.key_file), _read(self.cert_file))
        ca = _read(self.ca_file) if self.client_auth and self.ca_file else None
        return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=self.client_auth)

    def channel_credentials(self) -> "grpc.ChannelCredentials | None":
        """None without a CA."""
        if self.ca_file is None:
            return None
        import grpc

        key, cert = (_read(path) if path else None for path in (self.key_file, self.cert_file))
        return grpc.ssl_channel_credentials(_read(self.ca_file), key, cert)

    def client_context(self) -> ssl.SSLContext:
        """For HTTP. Without a CA of ours the system's are trusted."""
        if self.ca_file is not None:
            _read(self.ca_file)
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except ssl.SSLError as err:
            raise ValueError(f"--tls-ca {self.ca_file} holds no certificate; give a PEM file: {err.reason}") from err
        if self.cert_file is not None and self.key_file is not None:
            for path in (self.cert_file, self.key_file):
                _read(path)
            try:
                context.load_cert_chain(self.cert_file, self.key_file, password=_no_password)
            except ssl.SSLError as err:
                raise ValueError(
                    f"--tls-cert {self.cert_file} and --tls-key {self.key_file} are no certificate (PEM) and its key: "
                    f"{err.reason or err}"
                ) from err
        return context


RECONNECT_OPTIONS: tuple[tuple[str, Any], ...] = (
    # Who is back is found at once: gRPC's own pauses grow to minutes, its attempts over a cut network take 20 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 500),
)
"""For channels to peers that come and go."""


def open_channel(
    address: str, credentials: "grpc.ChannelCredentials | None", options: Sequence[tuple[str, Any]] = ()
) -> "grpc.aio.Channel":
    """To HOST:PORT; without credentials no TLS."""
    import grpc.aio

    if credentials is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, credentials, options)


def explain(details: str) -> str:
    """gRPC's account of a connection that failed, with the next step where it is about certificates."""
    hint = ""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        hint = "its certificate was not issued by the CA of --tls-ca; "
    elif "Hostname Verification" in details or "hostname" in details.lower():
        hint = "its certificate does not name the host of this address; "
    elif "WRONG_VERSION_NUMBER" in details:
        hint = "it speaks no TLS, and --tls-ca asks for it; "
    elif "CERTIFICATE_REQUIRED" in details:
        hint = "it wants a certificate of its clients: give --tls-cert and --tls-key; "
    return hint + details


def _no_password() -> str:
    raise ValueError("--tls-key is encrypted; give a key without a passphrase, readable by this user only")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise ValueError(f"cannot read {path}: {err.strerror}; give a PEM file") from err
