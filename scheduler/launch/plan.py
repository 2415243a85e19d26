"""From the options of one command to the command lines of a gateway and its instances."""

import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from xllm_compile.scheduler.role_options import GATEWAY_OPTIONS, OWN_OPTIONS, SECRET_OPTIONS, SHARED_OPTIONS

GATEWAY = "gateway"
_ROLES = {"P": "prefill", "D": "decode", "M": "mix"}
_TERM = re.compile(r"(\d+)([PDM])")
_LOOPBACK = "127.0.0.1"

# By parameter name of xllm-serve. What is in none of role_options' sets is of instances alone.
_REFUSED = {
    "role": "each process gets its own",
    "registry": "the gateway serves one",
    "name": "instances are named by role and number",
    "tls_ca": "these processes speak over the loopback only; for several machines start a gateway and instances each "
    "with --role",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessPlan:
    """One process."""

    name: str
    arguments: tuple[str, ...]
    """Of xllm-serve, the artifact first."""
    environment: Mapping[str, str]
    """Beside what the supervisor has."""

    @property
    def command(self) -> tuple[str, ...]:
        return (sys.executable, "-m", "xllm_compile.scheduler.serve", *self.arguments)

    def with_arguments(self, *more: str) -> "ProcessPlan":
        return replace(self, arguments=(*self.arguments, *more))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    gateway: ProcessPlan
    instances: tuple[ProcessPlan, ...]
    """Still without --registry, whose address is known once the gateway is up."""


def parse_instances(text: str) -> dict[str, int]:
    """Instances by role of 2P2D, 4M or 1P1D2M: P prefills, D decodes, M does both. Raises ValueError."""
    terms = _TERM.findall(text.upper())
    if "".join(number + letter for number, letter in terms) != text.upper() or not terms:
        raise ValueError(
            f"--instances {text} must be numbers with P (prefill), D (decode) or M (mix), such as 2P2D or 4M"
        )
    counts: dict[str, int] = {}
    for number, letter in terms:
        role = _ROLES[letter]
        if role in counts or int(number) == 0:
            raise ValueError(f"--instances {text}: {letter} must be there once and with at least 1, or not at all")
        counts[role] = int(number)
    if ("prefill" in counts) != ("decode" in counts):
        has, lacks = ("P", "D") if "prefill" in counts else ("D", "P")
        raise ValueError(f"--instances {text}: {has} hands over to {lacks} and none is there; add one, or use M")
    return counts


def make_plan(
    artifact: str,
    counts: Mapping[str, int],
    given: Mapping[str, Sequence[str]],
    *,
    api_keys: Sequence[str] = (),
    transfer_secret: str | None = None,
    is_local: bool = True,
) -> Plan:
    """given: by parameter name the arguments that the user wrote, which are passed on as they are.

    Without a secret of the user's the instances get one of their own. Unless all is on this machine, instances still
    lack --host and --transfer-host, which are those of where they come to be.

    Raises ValueError for an option that does not go with this.
    """
    for name, reason in _REFUSED.items():
        if name in given:
            raise ValueError(f"{given[name][0]} does not go with --instances: {reason}; leave it out")
    if "transfer_host" in given:
        raise ValueError("--transfer-host does not go with --instances: each process gets its own; leave it out")
    # All keys for whoever is asked, the first for whoever asks.
    environment = {"XLLM_API_KEY": " ".join(api_keys)} if api_keys else {}
    gateway = ProcessPlan(
        name=GATEWAY,
        arguments=(
            artifact,
            *("--role", GATEWAY),
            *(("--registry-host", _LOOPBACK) if is_local and "registry_host" not in given else ()),
            *(() if "registry_port" in given else ("--registry-port", "0")),
            *_pick(given, GATEWAY_OPTIONS | SHARED_OPTIONS),
        ),
        environment=environment,
    )
    others = GATEWAY_OPTIONS | SECRET_OPTIONS | OWN_OPTIONS
    passed_on = _pick(given, given.keys() - others)
    total = sum(counts.values())
    secret = transfer_secret or secrets.token_urlsafe(32)
    instances = tuple(
        ProcessPlan(
            name=f"{role}-{number}",
            arguments=(
                artifact,
                *("--role", role, "--name", f"{role}-{number}"),
                *("--port", "0", "--grpc-port", "0"),
                *(("--host", _LOOPBACK) if is_local else ()),
                *(("--colocated", str(total)) if is_local and "colocated" not in given else ()),
                *passed_on,
            ),
            environment={**environment, "XLLM_TRANSFER_SECRET": secret},
        )
        for role, count in counts.items()
        for number in range(count)
    )
    return Plan(gateway=gateway, instances=instances)


def _pick(given: Mapping[str, Sequence[str]], names: frozenset[str] | set[str]) -> tuple[str, ...]:
    return tuple(argument for name, arguments in given.items() if name in names for argument in arguments)
