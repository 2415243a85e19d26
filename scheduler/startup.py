"""From the command line's options to a serving process, with the slow parts side by side."""

import asyncio
import gc
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_compile import __version__
from xllm_compile.runtime.lean_torch import defer_parts
from xllm_compile.scheduler.artifact_source import find_artifact
from xllm_compile.scheduler.exposure import Port, check_ports
from xllm_compile.scheduler.instance_options import opened_instances, served_names
from xllm_compile.scheduler.member import Member, check_registry, is_member
from xllm_compile.scheduler.process import bind_socket, process_age_s, raise_open_files
from xllm_compile.scheduler.tls import TlsConfig
from xllm_compile.scheduler.tracing import Tracing, open_tracing

if TYPE_CHECKING:
    from xllm_compile.runtime.async_engine import AsyncEngine
    from xllm_compile.runtime.instance import Instance
    from xllm_compile.runtime.tokenizer import Tokenizer
    from xllm_compile.scheduler.batches.batches import Batches
    from xllm_compile.scheduler.batches.folder import BatchFolder
    from xllm_compile.scheduler.dashboard.dashboard import DashboardConfig
    from xllm_compile.scheduler.engine_client import EngineClient
    from xllm_compile.scheduler.errors import ApiError
    from xllm_compile.scheduler.model_waker import ModelWaker
    from xllm_compile.scheduler.server import ServerConfig
    from xllm_compile.scheduler.service import Service

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005

# Descriptors that are not connections: artifact files, libraries, event loop.
_RESERVED_FILES = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerParts:
    """What a server has before its model: what is wrong here, as a port that is taken, costs no model load."""

    options: Mapping[str, Any]
    http_socket: socket.socket
    max_connections: int
    tracing: Tracing
    batch_folder: "BatchFolder | None"


def serve(options: Mapping[str, Any]) -> int:
    """The exit code, after the drain. Raises ValueError or OSError on the user's mistakes."""
    tls = TlsConfig.from_options(options)
    check_ports(open_ports(options, tls), allow_unauthenticated=options["allow_unauthenticated"])
    check_registry(options)
    # The event loop shares the interpreter with the engine thread and has short bursts of work. By default it waits
    # up to 5 ms for its turn after every system call, which also delays the next step's input.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # Before the first module that imports torch.
    defer_parts()
    artifacts = [find_artifact(path, options) for path in options["artifacts"]]
    names = served_names(artifacts, options["served_model_name"])
    if options["role"] is not None and len(artifacts) > 1:
        raise ValueError(
            f"--role {options['role']} serves one model, and {len(artifacts)} artifacts are given; give one"
        )
    # What imports make stays: passes of the collector over it would be a tenth of the start. run_server resumes it.
    gc.disable()
    try:
        with opened_parts(options) as parts:
            if options["role"] == "gateway":
                from xllm_compile.scheduler.gateway_startup import serve_gateway

                return serve_gateway(artifacts[0], names[0], parts)
            return _serve_artifacts(artifacts, names, parts)
    finally:
        gc.enable()


@contextmanager
def opened_parts(options: Mapping[str, Any]) -> Iterator[ServerParts]:
    """Raises ValueError or OSError on the user's mistakes: a port that is taken, a folder that another server uses."""
    max_connections = min(options["max_connections"], raise_open_files() - _RESERVED_FILES)
    with (
        bind_socket(options["host"], options["port"]) as http_socket,
        opened_tracing(options) as tracing,
        opened_batch_folder(options) as batch_folder,
    ):
        yield ServerParts(
            options=options,
            http_socket=http_socket,
            max_connections=max_connections,
            tracing=tracing,
            batch_folder=batch_folder,
        )


def _serve_artifacts(artifacts: Sequence[Path], names: Sequence[tuple[str, ...]], parts: ServerParts) -> int:
    # Two threads that both import take turns. What opens the artifact comes first, so that the servers' imports run
    # beside its first steps, which leave the interpreter to others.
    import xllm_compile.runtime.follower  # noqa: F401

    imports = threading.Thread(target=_import_servers, name="xllm-imports", daemon=True)
    imports.start()
    with opened_instances(artifacts, names, parts.options) as instances:
        imports.join()
        for instance in instances:
            num_tokens = instance.engine.stats().kv_tokens_total
            logger.info("%s: KV cache %s, %d tokens", instance.model_name, instance.kv_layout, num_tokens)
        return _serve_instances(dict(zip(names, instances, strict=True)), parts)


def open_ports(options: Mapping[str, Any], tls: TlsConfig) -> Iterator[Port]:
    """All that will listen."""
    guard = "--api-key (or XLLM_API_KEY)"
    is_guarded = bool(options["api_keys"]) or tls.client_auth
    names = ["HTTP", "gRPC"]
    for name in names:
        yield Port(name=name, host_option="--host", host=options["host"], is_guarded=is_guarded, guard=guard)
    if options["role"] == "gateway" and not options["registry"]:
        host = registry_host(options)
        option = "--registry-host" if options["registry_host"] else "--host"
        yield Port(name="the registry", host_option=option, host=host, is_guarded=is_guarded, guard=guard)
    if options["transfer_host"]:
        yield Port(
            name="the port that takes KV",
            host_option="--transfer-host",
            host=options["transfer_host"],
            is_guarded=bool(options["transfer_secret"]),
            guard="--transfer-secret (or XLLM_TRANSFER_SECRET)",
            may_be_open=False,
        )


def opened_tracing(options: Mapping[str, Any]) -> AbstractContextManager[Tracing]:
    """Leaving it sends what is left. Raises ValueError for a bad endpoint, or where OpenTelemetry is missing."""
    role = options["role"]
    return closing(
        open_tracing(
            options["otlp_traces_endpoint"],
            service_name=f"xllm-{role or 'server'}",
            instance_name=options["name"] or f"{role or 'server'}-{socket.gethostname()}-{os.getpid()}",
            has_engine=role != "gateway",
        )
    )


def registry_host(options: Mapping[str, Any]) -> str:
    """Where a gateway serves its own registry."""
    return str(options["registry_host"] or options["host"])


def _import_servers() -> None:
    import xllm_compile.scheduler.server  # noqa: F401


def _serve_instances(instances: Mapping[tuple[str, ...], "Instance"], parts: ServerParts) -> int:
    """Instances by the names of their models."""
    from xllm_compile.runtime.async_engine import AsyncEngine
    from xllm_compile.scheduler.dashboard.dashboard import Dashboard
    from xllm_compile.scheduler.dashboard.reading import read_server
    from xllm_compile.scheduler.server import run_server

    options = parts.options
    engines = {
        names: AsyncEngine(instance.engine, instance.release_weights, is_asleep=instance.is_asleep)
        for names, instance in instances.items()
    }
    try:
        door = _make_services(instances, engines, parts)
        config = server_config(parts)
        member = None
        if is_member(options):
            (names, instance), *_ = instances.items()
            member = Member(instance, engines[names], door, options)
        on_ready = partial(announce, config.host)
        dashboard = Dashboard(partial(read_server, door), dashboard_config(options, door.model_name))
        with opened_batches(parts.batch_folder, door) as batches:
            serving = run_server(
                config, parts.http_socket, door, on_ready, routes=dashboard.routes(), batches=batches, member=member
            )
            is_clean = asyncio.run(dashboard.beside(serving))
    finally:
        for engine in engines.values():
            engine.shutdown()
    return 0 if is_clean else 1


def _make_services(
    instances: Mapping[tuple[str, ...], "Instance"],
    engines: Mapping[tuple[str, ...], "AsyncEngine"],
    parts: ServerParts,
) -> "Service":
    """One for each model; the first, which is the door to all."""
    from xllm_compile.scheduler.model_waker import ModelWaker

    waker = None
    if parts.options["wake_on_request"]:
        waker = ModelWaker({first: engine for (first, *_), engine in engines.items()})
    door: Service | None = None
    for names, instance in instances.items():
        service = make_service(
            parts,
            engine=engines[names],
            tokenizer=instance.tokenizer,
            model_names=names,
            max_model_len=instance.max_model_len,
            door=door,
            waker=waker,
        )
        door = door or service
    assert door is not None, "there is an artifact"
    return door


def opened_batch_folder(options: Mapping[str, Any]) -> AbstractContextManager["BatchFolder | None"]:
    """None without --batch-dir. Raises ValueError or OSError where the folder cannot be used."""
    from xllm_compile.scheduler.batches.folder import BatchConfig, BatchFolder

    names = {
        "batch_max_lines": "max_lines",
        "batch_max_file_size": "max_file_bytes",
        "batch_disk_size": "max_disk_bytes",
    }
    given = {field: options[option] for option, field in names.items() if options[option] is not None}
    if options["batch_dir"] is None:
        if given:
            option = next(option for option in names if options[option] is not None)
            raise ValueError(f"--{option.replace('_', '-')} is used with --batch-dir only; add it, or leave that out")
        return nullcontext()
    return closing(BatchFolder(BatchConfig(folder=options["batch_dir"], **given)))


def opened_batches(folder: "BatchFolder | None", service: "Service") -> AbstractContextManager["Batches | None"]:
    """Raises ValueError where the folder's database cannot be used."""
    from xllm_compile.scheduler.batches.batches import Batches

    return nullcontext() if folder is None else closing(Batches(folder, service))


def make_service(
    parts: ServerParts,
    *,
    engine: "EngineClient",
    tokenizer: "Tokenizer",
    model_names: Sequence[str],
    max_model_len: int,
    unhealthy: "Callable[[], ApiError] | None" = None,
    longest_now: "Callable[[], int | None]" = lambda: None,
    door: "Service | None" = None,
    waker: "ModelWaker | None" = None,
) -> "Service":
    """See Service."""
    import prometheus_client

    from xllm_compile.scheduler.chat_formats import ChatFormats
    from xllm_compile.scheduler.errors import engine_stopped
    from xllm_compile.scheduler.service import Service

    # They double every counter and histogram with the time it was made.
    prometheus_client.disable_created_metrics()
    options = parts.options
    return Service(
        engine=engine,
        tokenizer=tokenizer,
        model_names=model_names,
        max_model_len=max_model_len,
        version=__version__,
        api_keys=options["api_keys"],
        max_streams=options["max_streams"],
        unhealthy=unhealthy or engine_stopped,
        longest_now=longest_now,
        door=door,
        waker=waker,
        tracing=parts.tracing,
        chat_formats=ChatFormats.choose(
            tokenizer.chat_template_text,
            tool_call_parser=options["tool_call_parser"],
            reasoning_parser=options["reasoning_parser"],
        ),
    )


def server_config(parts: ServerParts) -> "ServerConfig":
    from xllm_compile.scheduler.server import ServerConfig

    options = parts.options
    return ServerConfig(
        host=options["host"],
        grpc_port=options["grpc_port"],
        max_connections=parts.max_connections,
        drain_timeout_s=options["drain_timeout"],
        tls=TlsConfig.from_options(options),
    )


def dashboard_config(options: Mapping[str, Any], title: str, *, is_gateway: bool = False) -> "DashboardConfig":
    from xllm_compile.scheduler.dashboard.dashboard import DashboardConfig

    return DashboardConfig(
        title=title,
        version=__version__,
        is_gateway=is_gateway,
        ttft_slo_ms=options["ttft_slo_ms"],
        tpot_slo_ms=options["tpot_slo_ms"],
    )


def announce(host: str, http_port: int, grpc_port: int, registry_port: int = 0) -> None:
    name = f"[{host}]" if ":" in host else host
    registry = f" registry={name}:{registry_port}" if registry_port else ""
    ready = f"READY http={name}:{http_port} grpc={name}:{grpc_port}{registry} startup_s={process_age_s():.2f}"
    print(ready, flush=True)
    logger.info("serving on http://%s:%d and grpc %s:%d", name, http_port, name, grpc_port)
