"""Certificate authorities and what they issue, by the openssl command."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from xllm_compile.scheduler.tls import TlsConfig

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Issued:
    cert: Path
    key: Path


class Authority:
    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.cert, self.key = folder / f"{name}.pem", folder / f"{name}.key"
        self.name = name
        _openssl("req", "-x509", *_NEW_KEY, "-days", "2", "-subj", f"/CN={name}", *_out(self.key, self.cert))

    def issue(self, name: str, san: str = "IP:127.0.0.1,DNS:localhost") -> Issued:
        issued = Issued(cert=self.folder / f"{self.name}-{name}.pem", key=self.folder / f"{self.name}-{name}.key")
        signed_by = ("-CA", str(self.cert), "-CAkey", str(self.key), "-addext", f"subjectAltName={san}")
        _openssl(
            "req", "-x509", *_NEW_KEY, "-days", "2", "-subj", f"/CN={name}", *signed_by, *_out(issued.key, issued.cert)
        )
        return issued

    def tls(self, issued: Issued | None = None, *, client_auth: bool = False) -> TlsConfig:
        """As a process that trusts this authority, and shows what it issued."""
        return TlsConfig(
            ca_file=self.cert,
            cert_file=issued.cert if issued else None,
            key_file=issued.key if issued else None,
            client_auth=client_auth,
        )


def _out(key: Path, cert: Path) -> tuple[str, ...]:
    return ("-keyout", str(key), "-out", str(cert))


def _openssl(*args: str) -> None:
    subprocess.run(["openssl", *args], check=True, capture_output=True)
