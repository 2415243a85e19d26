"""xllm-serve --instances: one command, one READY line, a whole service on this machine."""

import asyncio
import http.client
import json
import logging
import ssl
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from xllm_compile.scheduler.artifact_source import find_artifact
from xllm_compile.scheduler.exposure import check_ports, is_loopback
from xllm_compile.scheduler.launch.child import LocalChild, Ready
from xllm_compile.scheduler.launch.plan import Plan, make_plan, parse_instances
from xllm_compile.scheduler.launch.supervisor import LaunchError, Start, Supervisor, SupervisorConfig
from xllm_compile.scheduler.startup import announce, open_ports
from xllm_compile.scheduler.tls import TlsConfig

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
_POLL_S = 0.1
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}


def launch(options: Mapping[str, Any], given: Mapping[str, Sequence[str]]) -> int:
    """The exit code, after the drain. given: see make_plan. Raises ValueError or OSError on the user's mistakes."""
    if len(options["artifacts"]) > 1:
        raise ValueError(f"--instances serves one model, and {len(options['artifacts'])} artifacts are given; give one")
    counts = parse_instances(options["instances"])
    tls = TlsConfig.from_options(options)
    # A gateway's registry is on the loopback where all is.
    role = "gateway" if options["launcher"] == "ray" else None
    check_ports(open_ports({**options, "role": role}, tls), allow_unauthenticated=options["allow_unauthenticated"])
    artifact: Path = find_artifact(options["artifacts"][0], options)
    keys, secret = options["api_keys"], options["transfer_secret"]
    is_local = options["launcher"] == "local"
    plan = make_plan(str(artifact), counts, given, api_keys=keys, transfer_secret=secret, is_local=is_local)
    supervise = partial(_supervise, options=options, tls=tls)
    if options["launcher"] == "ray":
        return _with_ray(plan, options, supervise)
    return supervise(plan, LocalChild.start)


def _with_ray(plan: Plan, options: Mapping[str, Any], supervise: Callable[[Plan, Start], int]) -> int:
    if is_loopback(options["host"]):
        raise ValueError(f"--host {options['host']} is of this machine only; give the one that Ray's others reach")
    if options["tls_cert"] is not None:
        raise NotImplementedError("--tls-cert with --launcher ray: there is no TLS between its machines; leave it out")
    if options["threads"] is None:
        raise ValueError("--launcher ray places instances by their CPUs; give --threads")
    from xllm_compile.scheduler.launch.ray_child import ray_starter

    names = [instance.name for instance in plan.instances]
    with ray_starter(names, num_cpus=options["threads"]) as start:
        return supervise(plan, start)


def _supervise(plan: Plan, start: Start, *, options: Mapping[str, Any], tls: TlsConfig) -> int:
    config = SupervisorConfig(drain_timeout_s=options["drain_timeout"])
    is_whole = partial(wait_whole, api_keys=options["api_keys"], tls=tls)

    def on_ready(ready: Ready) -> None:
        announce(ready.http_host.strip("[]"), ready.http_port, ready.grpc_port)

    try:
        return asyncio.run(Supervisor(plan, start, is_whole, config).run(on_ready))
    except LaunchError as err:
        logger.error("%s", err)
        return EXIT_FAILED


async def wait_whole(gateway: Ready, num_instances: int, *, api_keys: Sequence[str], tls: TlsConfig) -> None:
    """Until the gateway finds so many instances ready for work."""
    while await asyncio.to_thread(_num_active, gateway, api_keys, tls) < num_instances:
        await asyncio.sleep(_POLL_S)


def _num_active(gateway: Ready, api_keys: Sequence[str], tls: TlsConfig) -> int:
    host = _WILDCARDS.get(gateway.http_host, gateway.http_host).strip("[]")
    connection: http.client.HTTPConnection
    if tls.is_served:
        context = tls.client_context()
        # Our own child, at an address that its certificate need not name.
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, gateway.http_port, timeout=10, context=context)
    else:
        connection = http.client.HTTPConnection(host, gateway.http_port, timeout=10)
    headers = {"Authorization": f"Bearer {api_keys[0]}"} if api_keys else {}
    try:
        connection.request("GET", "/cluster", headers=headers)
        response = connection.getresponse()
        instances = json.loads(response.read())["instances"] if response.status == 200 else []
    except OSError:
        # It died meanwhile, and is started again.
        return 0
    finally:
        connection.close()
    return sum(instance["health"] == "active" for instance in instances)
