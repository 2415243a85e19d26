"""From the command line's options to a gateway: a server without an engine of its own."""

import asyncio
import os
import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from xllm_compile.runtime.artifact import TOKENIZER, read_manifest
from xllm_compile.runtime.tokenizer import Tokenizer
from xllm_compile.scheduler.cluster.cluster_api import ClusterApi
from xllm_compile.scheduler.cluster.cluster_client import ClusterClient, SloDefaults
from xllm_compile.scheduler.cluster.cluster_metrics import ClusterCollector
from xllm_compile.scheduler.cluster.gateway import Gateway, ServedRegistry
from xllm_compile.scheduler.cluster.offline_puller import OfflinePuller
from xllm_compile.scheduler.cluster.placer import Placer
from xllm_compile.scheduler.cluster.registry_address import RegistryAddress, registry_of
from xllm_compile.scheduler.dashboard.dashboard import Dashboard
from xllm_compile.scheduler.dashboard.reading import read_cluster
from xllm_compile.scheduler.errors import no_instance
from xllm_compile.scheduler.exposure import is_loopback
from xllm_compile.scheduler.policies.colocation import ColocationRules
from xllm_compile.scheduler.policies.fetch import FetchRules
from xllm_compile.scheduler.policies.roles import RoleRules
from xllm_compile.scheduler.policies.routing import RoutingRules
from xllm_compile.scheduler.server import run_server
from xllm_compile.scheduler.service import Service
from xllm_compile.scheduler.startup import (
    ServerParts,
    announce,
    dashboard_config,
    make_service,
    opened_batches,
    registry_host,
    server_config,
)
from xllm_compile.scheduler.tasks import cancel_all
from xllm_compile.scheduler.tls import TlsConfig


def serve_gateway(artifact: Path, names: tuple[str, ...], parts: ServerParts) -> int:
    """The exit code. Of the artifact only the manifest and the tokenizer are read. Raises ValueError on bad options."""
    options, tls = parts.options, TlsConfig.from_options(parts.options)
    manifest = read_manifest(artifact)
    tokenizer = Tokenizer.from_directory(artifact / TOKENIZER)
    roles, registry, colocation = _role_rules(options), _registry(options, tls), _colocation_rules(options)

    async def run() -> bool:
        async with Gateway(
            registry,
            name=f"{socket.gethostname()}-{os.getpid()}",
            api_keys=options["api_keys"],
            tls=tls,
            roles=roles,
            weights_key=manifest.tokens_key,
        ) as gateway:
            placer = _placer(options, colocation)
            slo = SloDefaults(ttft_ms=options["ttft_slo_ms"], tpot_ms=options["tpot_slo_ms"])
            client = ClusterClient(gateway.cluster, placer=placer, slo=slo)
            service = make_service(
                parts,
                engine=client,
                tokenizer=tokenizer,
                model_names=names,
                max_model_len=options["max_model_len"] or manifest.model.max_model_len,
                unhealthy=no_instance,
                longest_now=gateway.cluster.max_model_len,
            )
            service.metrics.register(ClusterCollector(gateway.cluster))
            jobs = []
            if colocation is not None:
                puller = OfflinePuller(gateway.cluster, client, placer, colocation)
                jobs.append(asyncio.create_task(puller.run()))
            try:
                return await _run_servers(gateway, service, parts)
            finally:
                await cancel_all(jobs)

    return 0 if asyncio.run(run()) else 1


async def _run_servers(gateway: Gateway, service: Service, parts: ServerParts) -> bool:
    """See run_server."""
    config = server_config(parts)
    on_ready = partial(announce, config.host, registry_port=gateway.registry_port)
    read = partial(read_cluster, service, gateway.cluster)
    dashboard = Dashboard(read, dashboard_config(parts.options, service.model_name, is_gateway=True))
    routes = [*ClusterApi(gateway.cluster).routes(), *dashboard.routes()]
    with opened_batches(parts.batch_folder, service) as batches:
        serving = run_server(config, parts.http_socket, service, on_ready, routes=routes, batches=batches)
        return await dashboard.beside(serving)


def _placer(options: Mapping[str, Any], colocation: ColocationRules | None) -> Placer:
    routing = RoutingRules(policy=options["routing"], spreads_offline=colocation is not None)
    return Placer(routing, fetch=FetchRules() if options["kv_fetch"] else None)


def _registry(options: Mapping[str, Any], tls: TlsConfig) -> RegistryAddress | ServedRegistry:
    host = registry_host(options)
    if tls.is_served and tls.ca_file is None and (options["registry"] or not is_loopback(host)):
        raise ValueError(
            "--tls-cert without --tls-ca: instances on other machines would be spoken to without TLS; give --tls-ca "
            "to check their certificates, or --registry-host 127.0.0.1 if all are on this one"
        )
    if tls.ca_file is not None and not (tls.is_served or options["registry"]):
        raise ValueError(
            "--tls-ca has the registry speak TLS, which needs a certificate; give --tls-cert and --tls-key"
        )
    if options["registry"]:
        return registry_of(options)
    return ServedRegistry(host=host, port=options["registry_port"])


def _colocation_rules(options: Mapping[str, Any]) -> ColocationRules | None:
    if not options["colocation"]:
        return None
    if options["tpot_slo_ms"] is None:
        raise ValueError("--colocation fills what a target leaves, and none is given; add --tpot-slo-ms")
    return ColocationRules(tpot_slo_s=options["tpot_slo_ms"] / 1e3)


def _role_rules(options: Mapping[str, Any]) -> RoleRules | None:
    if not options["dynamic_roles"]:
        return None
    ttft_ms, tpot_ms = options["ttft_slo_ms"], options["tpot_slo_ms"]
    if ttft_ms is None or tpot_ms is None:
        raise ValueError("--dynamic-roles keeps targets, and not both are given; add --ttft-slo-ms and --tpot-slo-ms")
    return RoleRules(ttft_slo_s=ttft_ms / 1e3, tpot_slo_s=tpot_ms / 1e3)
