"""Which ports other machines reach, and what keeps them out."""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """A port that is about to listen."""

    name: str
    """As it is called to people."""
    host_option: str
    host: str
    is_guarded: bool
    """Whether callers must prove who they are."""
    guard: str
    """The options that make them."""
    may_be_open: bool = True
    """Whether --allow-unauthenticated opens it to anybody."""


def check_ports(ports: Iterable[Port], *, allow_unauthenticated: bool) -> None:
    """Raises ValueError naming the first port that is open to other machines without proof of who calls."""
    for port in ports:
        is_allowed = allow_unauthenticated and port.may_be_open
        if not (port.is_guarded or is_allowed or is_loopback(port.host)):
            otherwise = (
                ", or --allow-unauthenticated if something in front checks who calls" if port.may_be_open else ""
            )
            raise ValueError(
                f"{port.host_option} {port.host}: {port.name} is reachable from other machines and takes anybody; give "
                f"{port.guard}{otherwise}"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address. A name counts as one address of another machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
