"""A serving process as one instance of a service of many: its options, and what it says of itself."""

import logging
import os
import socket
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from xllm_compile import __version__

if TYPE_CHECKING:
    from xllm_compile.runtime.async_engine import AsyncEngine
    from xllm_compile.runtime.instance import Instance
    from xllm_compile.scheduler.cluster.state import InstanceInfo
    from xllm_compile.scheduler.instance_api import InstanceServicer
    from xllm_compile.scheduler.service import Service

logger = logging.getLogger(__name__)

ROLES = ("mix", "prefill", "decode")
DEFAULT_TRANSFERS = "shm,tcp"
_NO_TRANSFER = "none"
_WILDCARDS = ("0.0.0.0", "::")


def is_member(options: Mapping[str, Any]) -> bool:
    return options["role"] in ROLES


def transfer_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of InstanceConfig. Raises ValueError where the options do not go together."""
    role, names = options["role"], options["transfer"] or DEFAULT_TRANSFERS
    if not is_member(options):
        for option in ("transfer", "transfer_host", "name"):
            if options[option] is not None:
                shown = f"--{option.replace('_', '-')} {options[option]}"
                raise ValueError(f"{shown} is for an instance of a service; add --role {', '.join(ROLES)}")
        return {}
    if names == _NO_TRANSFER:
        if role != "mix":
            raise ValueError(
                f"--role {role} needs a way to hand requests over; leave --transfer none out, or use --role mix"
            )
        return {}
    from xllm_compile.runtime.transfer.transfer import TransferConfig

    secret = options["transfer_secret"] or ""
    host = options["transfer_host"] or TransferConfig().host
    schemes = tuple(name.strip() for name in names.split(","))
    return {"transfers": schemes, "transfer": TransferConfig(host=host, secret=secret.encode())}


def check_registry(options: Mapping[str, Any]) -> None:
    """Raises ValueError for an address that is none, and where nobody would use it."""
    if options["registry"] is None:
        if is_member(options):
            logger.warning("--role %s without --registry: no gateway will find this instance", options["role"])
        return
    if options["role"] is None:
        raise ValueError(f"--registry {options['registry']} is for a service of several processes; add --role")
    from xllm_compile.scheduler.cluster.registry_address import registry_of

    registry_of(options)


class Member:
    """This process as an instance of the service."""

    def __init__(
        self, instance: "Instance", engine: "AsyncEngine", service: "Service", options: Mapping[str, Any]
    ) -> None:
        self._instance = instance
        self._engine = engine
        self._service = service
        self._options = options
        self._info: InstanceInfo | None = None

    def servicer(self, grpc_port: int) -> "InstanceServicer":
        """What serves Instance at that port; its `info` is what the registry lists."""
        from xllm_compile.scheduler.instance_api import InstanceServicer

        self._info = instance_info(self._instance, self._options, self._service.model_names, grpc_port)
        return InstanceServicer(self._service, self._engine, self._info)

    @asynccontextmanager
    async def listed(self) -> AsyncIterator[None]:
        """In the registry, if there is one, while entered."""
        if self._options["registry"] is None:
            yield
            return
        from xllm_compile.scheduler.cluster.registry_address import registry_of
        from xllm_compile.scheduler.registry.etcd_registry import EtcdRegistry
        from xllm_compile.scheduler.registry.registration import Registration

        assert self._info is not None, "the servicer comes first"
        address = registry_of(self._options)
        async with (
            EtcdRegistry(address.config) as registry,
            Registration(registry, self._info, namespace=address.namespace),
        ):
            yield


def instance_info(
    instance: "Instance", options: Mapping[str, Any], model_names: Sequence[str], grpc_port: int
) -> "InstanceInfo":
    """What a registry lists, and Instance.GetInstanceInfo answers."""
    from xllm_compile.scheduler.cluster.state import InstanceInfo, Role

    engine, machine = instance.engine, socket.gethostname()
    # Behind a wildcard others find this machine by its name.
    host = machine if options["host"] in _WILDCARDS else options["host"]
    return InstanceInfo(
        name=options["name"] or f"{options['role']}-{machine}-{os.getpid()}",
        incarnation=uuid.uuid4().hex,
        role=Role(options["role"]),
        address=f"[{host}]:{grpc_port}" if ":" in host else f"{host}:{grpc_port}",
        transfers=engine.transfer_addresses,
        host=machine,
        model_names=tuple(model_names),
        weights_key=instance.weights_key,
        kv_layout=instance.kv_layout,
        kv_bytes_per_token=engine.kv_bytes_per_token,
        block_tokens=engine.block_tokens,
        max_model_len=instance.max_model_len,
        max_num_seqs=engine.limits.max_num_seqs,
        max_num_batched_tokens=engine.limits.max_num_batched_tokens,
        kv_tokens_total=engine.stats().kv_tokens_total,
        version=__version__,
    )
