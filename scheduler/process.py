"""What a server has of its process: a port, open files, and how long it has been there."""

import resource
import socket
import time
from pathlib import Path


def bind_socket(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: clients are refused until the model is there. Raises OSError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as err:
        raise OSError(f"HTTP cannot listen on {host}:{port}: {err.strerror or err}; choose another --port") from err
    return bound


def raise_open_files() -> int:
    """Lift the soft limit of open files to the hard one and return it: a connection is a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 20


def process_age_s() -> float:
    """Seconds since the process was started, interpreter and imports included."""
    # Field 22 of stat is the start in clock ticks since boot; the name before it may hold spaces.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / 100
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
