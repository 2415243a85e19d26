"""From the command line's options to a serving process, with the slow parts side by side."""

import asyncio
import gc
import logging
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_compile import __version__
from xllm_compile.scheduler.artifact_source import find_artifact
from xllm_compile.scheduler.exposure import Port, check_ports
from xllm_compile.scheduler.member import Member, check_registry, is_member, transfer_options
from xllm_compile.scheduler.tls import TlsConfig
from xllm_compile.scheduler.tracing import NO_TRACING, Tracing, open_tracing

if TYPE_CHECKING:
    from xllm_compile.runtime.instance import Instance
    from xllm_compile.runtime.instance_config import InstanceConfig
    from xllm_compile.runtime.speculative.config import SpeculativeConfig
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


def serve(options: Mapping[str, Any]) -> int:
    """The exit code, after the drain. Raises ValueError or OSError on the user's mistakes."""
    tls = TlsConfig.from_options(options)
    check_ports(open_ports(options, tls), allow_unauthenticated=options["allow_unauthenticated"])
    check_registry(options)
    # The event loop shares the interpreter with the engine thread and has short bursts of work. By default it waits
    # up to 5 ms for its turn after every system call, which also delays the next step's input.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    max_connections = min(options["max_connections"], raise_open_files() - _RESERVED_FILES)
    artifacts = [find_artifact(path, options) for path in options["artifacts"]]
    # What imports make stays: passes of the collector over it would be a tenth of the start. run_server resumes it.
    gc.disable()
    try:
        return _serve(artifacts, options, max_connections)
    finally:
        gc.enable()


def _serve(artifacts: Sequence[Path], options: Mapping[str, Any], max_connections: int) -> int:
    names = served_names(artifacts, options["served_model_name"])
    if options["role"] is not None and len(artifacts) > 1:
        raise ValueError(
            f"--role {options['role']} is of one model, and {len(artifacts)} artifacts are given; give one"
        )
    # Before the long part: a port that is taken should not cost a model load.
    http_socket = bind_socket(options["host"], options["port"])
    if options["role"] == "gateway":
        with http_socket, opened_tracing(options) as tracing, opened_batch_folder(options) as batch_folder:
            from xllm_compile.scheduler.gateway_startup import serve_gateway

            return serve_gateway(artifacts[0], names[0], options, http_socket, max_connections, tracing, batch_folder)
    # So is a folder that another server uses.
    with http_socket, opened_tracing(options) as tracing, opened_batch_folder(options) as batch_folder:
        # Two threads that both import take turns. What opens the artifact comes first, so that the servers' imports run
        # beside its first steps, which leave the interpreter to others.
        import xllm_compile.runtime.follower  # noqa: F401

        imports = threading.Thread(target=_import_servers, name="xllm-imports", daemon=True)
        imports.start()
        with opened_instances(artifacts, names, options) as instances:
            imports.join()
            for instance in instances:
                num_tokens = instance.engine.stats().kv_tokens_total
                logger.info("%s: KV cache %s, %d tokens", instance.model_name, instance.kv_layout, num_tokens)
            by_names = dict(zip(names, instances, strict=True))
            return _run(by_names, options, http_socket, max_connections, tracing, batch_folder)


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


def served_names(artifacts: Sequence[Path], given: Sequence[str]) -> list[tuple[str, ...]]:
    """The names of each artifact in the API. Raises ValueError where two would have one name."""
    from xllm_compile.runtime.artifact import read_manifest

    if len(artifacts) == 1 and given:
        return [tuple(given)]
    if given and len(given) != len(artifacts):
        raise ValueError(
            f"--served-model-name is given {len(given)} times for {len(artifacts)} artifacts; give it once for each,"
            " in their order"
        )
    names = list(given) or [read_manifest(root).model.name for root in artifacts]
    for name, root in zip(names, artifacts, strict=True):
        if names.count(name) > 1:
            raise ValueError(
                f"{root} and another artifact would both be served as {name!r}; give --served-model-name once for each"
            )
    return [(name,) for name in names]


@contextmanager
def opened_instances(
    artifacts: Sequence[Path], names: Sequence[tuple[str, ...]], options: Mapping[str, Any]
) -> Iterator[list["Instance"]]:
    """Leaving it ends other ranks. Raises ValueError for a budget that does not hold what was asked for."""
    from xllm_compile.runtime.artifact import read_manifest
    from xllm_compile.runtime.follower import opened_instance
    from xllm_compile.runtime.shared_models import open_models

    config, memory = instance_config(options), options["memory"]
    if len(artifacts) > 1:
        by_name = dict(zip([first for first, *_ in names], artifacts, strict=True))
        instances = list(open_models(by_name, config, memory, may_sleep=options["wake_on_request"]).values())
        try:
            yield instances
        finally:
            for each in instances:
                each.engine.close()
        return
    if memory is not None:
        weights = read_manifest(artifacts[0]).weights[0].num_bytes
        if memory <= weights or config.kv_memory_bytes is not None:
            raise ValueError(
                f"--memory {memory} is for the {weights} bytes of weights and for KV; give more than the weights, and"
                " not --kv-memory as well"
            )
        config = replace(config, kv_memory_bytes=memory - weights)
    with opened_instance(artifacts[0], config) as instance:
        yield [instance]


def instance_config(options: Mapping[str, Any]) -> "InstanceConfig":
    """The one place that turns options into the configuration of instances."""
    from xllm_compile.machine import cache_dir
    from xllm_compile.runtime.instance_config import InstanceConfig
    from xllm_compile.runtime.promotion import PromotionConfig

    names = {
        "threads": "num_threads",
        "max_num_seqs": "max_num_seqs",
        "max_num_batched_tokens": "max_num_batched_tokens",
        "max_model_len": "max_model_len",
        "kv_memory": "kv_memory_bytes",
        "kv_host_memory": "kv_host_bytes",
        "kv_swap_memory": "kv_swap_bytes",
        "kv_disk": "kv_disk",
        "kv_disk_size": "kv_disk_bytes",
        "kv_store": "kv_store",
        "kv_store_size": "kv_store_bytes",
        "max_waiting": "max_waiting",
        "max_waiting_tokens": "max_waiting_tokens",
        "scheduling_policy": "scheduling_policy",
        "ttft_slo_ms": "ttft_slo_ms",
        "tpot_slo_ms": "tpot_slo_ms",
    }
    given = {field: options[option] for option, field in names.items() if options[option] is not None}
    promotion = None
    if options["graph_promotion"]:
        promotion = PromotionConfig(store=cache_dir() / "graphs", max_bytes=options["graph_cache_bytes"])
    return InstanceConfig(
        **given,
        async_scheduling=options["async_scheduling"],
        prefix_cache=options["prefix_cache"],
        kv_cache_dtype=options["kv_cache_dtype"],
        kv_pretouch=options["kv_pretouch"],
        enforce_eager=options["enforce_eager"],
        promotion=promotion,
        warm_up=options["warm_up"],
        num_colocated=options["colocated"],
        slow_down=options["slow_down"],
        speculative=_speculative(options),
        **transfer_options(options),
    )


def _speculative(options: Mapping[str, Any]) -> "SpeculativeConfig | None":
    """Raises ValueError where the options do not go together."""
    from xllm_compile.runtime.speculative.config import SpeculativeConfig

    method, draft_model = options["speculative"], options["draft_model"]
    if method is None:
        if draft_model is not None:
            raise ValueError("--draft-model is used with --speculative draft only; add it, or leave the model out")
        return None
    if draft_model is not None and method == "draft":
        draft_model = find_artifact(draft_model, options)
    return SpeculativeConfig(
        method=method, draft_model=draft_model, num_speculative_tokens=options["num_speculative_tokens"]
    )


def _import_servers() -> None:
    import xllm_compile.scheduler.server  # noqa: F401


def _run(
    instances: Mapping[tuple[str, ...], "Instance"],
    options: Mapping[str, Any],
    http_socket: socket.socket,
    max_connections: int,
    tracing: Tracing,
    batch_folder: "BatchFolder | None",
) -> int:
    from xllm_compile.runtime.async_engine import AsyncEngine
    from xllm_compile.scheduler.dashboard.dashboard import Dashboard
    from xllm_compile.scheduler.dashboard.reading import read_server
    from xllm_compile.scheduler.model_waker import ModelWaker
    from xllm_compile.scheduler.server import run_server

    engines = {
        names: AsyncEngine(instance.engine, instance.release_weights, is_asleep=instance.is_asleep)
        for names, instance in instances.items()
    }
    try:
        waker = None
        if options["wake_on_request"]:
            waker = ModelWaker({first: engine for (first, *_), engine in engines.items()})
        door: Service | None = None
        for names, instance in instances.items():
            service = make_service(
                options,
                engine=engines[names],
                tokenizer=instance.tokenizer,
                model_names=names,
                max_model_len=instance.max_model_len,
                door=door,
                waker=waker,
                tracing=tracing,
            )
            door = door or service
        assert door is not None
        config = server_config(options, max_connections)
        member = None
        if is_member(options):
            (names, instance), *_ = instances.items()
            member = Member(instance, engines[names], door, options)
        on_ready = partial(announce, config.host)
        dashboard = Dashboard(partial(read_server, door), dashboard_config(options, door.model_name))
        with opened_batches(batch_folder, door) as batches:
            serving = run_server(
                config, http_socket, door, on_ready, routes=dashboard.routes(), batches=batches, member=member
            )
            is_clean = asyncio.run(dashboard.beside(serving))
    finally:
        for engine in engines.values():
            engine.shutdown()
    return 0 if is_clean else 1


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
    options: Mapping[str, Any],
    *,
    engine: "EngineClient",
    tokenizer: "Tokenizer",
    model_names: Sequence[str],
    max_model_len: int,
    unhealthy: "Callable[[], ApiError] | None" = None,
    longest_now: "Callable[[], int | None]" = lambda: None,
    door: "Service | None" = None,
    waker: "ModelWaker | None" = None,
    tracing: Tracing = NO_TRACING,
) -> "Service":
    import prometheus_client

    from xllm_compile.scheduler.chat_formats import ChatFormats
    from xllm_compile.scheduler.errors import engine_stopped
    from xllm_compile.scheduler.service import Service

    # They double every counter and histogram with the time it was made.
    prometheus_client.disable_created_metrics()
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
        tracing=tracing,
        chat_formats=ChatFormats.choose(
            tokenizer.chat_template_text,
            tool_call_parser=options["tool_call_parser"],
            reasoning_parser=options["reasoning_parser"],
        ),
    )


def server_config(options: Mapping[str, Any], max_connections: int) -> "ServerConfig":
    from xllm_compile.scheduler.server import ServerConfig

    return ServerConfig(
        host=options["host"],
        grpc_port=options["grpc_port"],
        max_connections=max_connections,
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
