"""xllm-serve: an artifact in, OpenAI HTTP and gRPC out."""

import logging
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from xllm_compile import __version__
from xllm_compile.scheduler.sizes import parse_size
from xllm_compile.scheduler.speculative_options import speculative_options

# Exit codes: 0 clean drain, 1 requests were cut or the server failed, 2 the user's mistake, 128 + n a second signal.
EXIT_USAGE = 2

# The keys of tool_formats.FORMATS and reasoning.FORMATS, whose modules --help has no time for.
TOOL_CALL_PARSERS = ("hermes", "qwen25", "qwen3", "qwen3_coder", "llama3_json", "deepseek_v3", "deepseek_v31")
# Likewise policies/routing.py.
ROUTING_POLICIES = ("round_robin", "load", "prefix", "slo")
ROLES = ("gateway", "mix", "prefill", "decode")
REASONING_PARSERS = ("qwen3", "deepseek_r1", "deepseek_v3")


def parse_size_option(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_size(value)
    except ValueError as err:
        raise click.BadParameter(str(err)) from None


class RoleType(click.Choice):  # type: ignore[type-arg, unused-ignore]  # generic from click 8.2 on
    """Of ROLES."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if value == "encode":
            self.fail(
                "'encode' would be for models that read images, and none is supported yet; choose one of "
                + ", ".join(ROLES),
                parameter,
                context,
            )
        return super().convert(value, parameter, context)


def check_keys(_context: click.Context, _parameter: click.Parameter, keys: tuple[str, ...]) -> tuple[str, ...]:
    if not all(key and key.isascii() and not key.isspace() for key in keys):
        raise click.BadParameter("a key must not be empty, and ASCII")
    return keys


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100})
@click.argument("artifacts", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="ARTIFACT...")
@click.option("--host", default="127.0.0.1", help="Address of both servers; beyond this machine it needs an API key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="HTTP port; 0 lets the system choose.")
@click.option("--grpc-port", type=click.IntRange(0, 65535), default=8001, help="gRPC port; 0 lets the system choose.")
@click.option(
    "--instances",
    metavar="COUNTS",
    help="Serve by several processes on this machine, such as 2P2D or 4M: instances that prefill (P), decode (D) or do "
    "both (M), and a gateway. Options of instances are given to each.",
)
@click.option(
    "--launcher",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="Where --instances run: on this machine, or on those of a running Ray cluster (RAY_ADDRESS).",
)
@click.option(
    "--role",
    type=RoleType(ROLES),
    help="Part of a service of several processes: a gateway takes requests and computes nothing itself, the others are "
    "instances, for all work or one half of it.",
)
@click.option(
    "--registry",
    metavar="ADDRESS",
    help="Where the service's processes find each other: HOST:PORT of a gateway's, or etcd://HOST:PORT.",
)
@click.option(
    "--registry-port",
    type=click.IntRange(0, 65535),
    default=8002,
    help="Port of a gateway's own registry, without --registry; 0 lets the system choose.",
)
@click.option("--registry-host", help="Address of a gateway's own registry.  [default: that of --host]")
@click.option(
    "--dynamic-roles",
    is_flag=True,
    help="Have a gateway move its mix instances between prefill and decode, to keep --ttft-slo-ms and --tpot-slo-ms.",
)
@click.option(
    "--colocation",
    is_flag=True,
    help="Have all of a gateway's instances take offline requests, and take them over from busier ones, within "
    "--tpot-slo-ms.",
)
@click.option(
    "--routing",
    type=click.Choice(ROUTING_POLICIES),
    default="slo",
    help="How a gateway chooses instances: in turns, by load, by cached prefixes, or by the targets.",
)
@click.option(
    "--kv-fetch/--no-kv-fetch",
    default=True,
    help="Have a gateway let instances copy cached prefixes from each other where computing them would take longer.",
)
@click.option(
    "--served-model-name",
    multiple=True,
    metavar="NAME",
    help="Name in the API; may be repeated. Of several artifacts each needs one, in their order.",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="XLLM_API_KEY",
    show_envvar=True,
    callback=check_keys,
    metavar="KEY",
    help="Key that clients must send. Repeat it while keys change: all are taken, and the first is sent to instances.",
)
@click.option(
    "--tls-cert", type=click.Path(path_type=Path), help="Certificate of this server, PEM; its ports then speak TLS."
)
@click.option("--tls-key", type=click.Path(path_type=Path), help="Key of --tls-cert, PEM.")
@click.option(
    "--tls-ca",
    type=click.Path(path_type=Path),
    help="Speak TLS with the service's other processes and the registry, and check their certificates against this.",
)
@click.option("--tls-client-auth", is_flag=True, help="Ask clients for a certificate by the CA of --tls-ca, too.")
@click.option("--allow-unauthenticated", is_flag=True, help="Serve other machines without an API key.")
@click.option("--max-num-seqs", type=click.IntRange(1), help="Most sequences running at once.")
@click.option("--max-num-batched-tokens", type=click.IntRange(1), help="Most tokens in one step.")
@click.option("--max-model-len", type=click.IntRange(2), help="Longest prompt plus output, in tokens.")
@click.option(
    "--memory", callback=parse_size_option, metavar="SIZE", help="Memory of weights and KV of all models together."
)
@click.option("--wake-on-request", is_flag=True, help="Wake a sleeping model for its request; idle ones make room.")
@click.option("--kv-memory", callback=parse_size_option, metavar="SIZE", help="Memory of the KV cache, such as 4GiB.")
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "int8"]),
    default="auto",
    help="Demand an artifact that was compiled for it (with --compile, compile for it); auto takes what there is.",
)
@click.option("--kv-pretouch", is_flag=True, help="Take all memory of the KV cache before READY, not page by page.")
@click.option("--prefix-cache/--no-prefix-cache", default=True, help="Reuse the KV of prompts that start alike.")
@click.option(
    "--kv-host-memory",
    callback=parse_size_option,
    metavar="SIZE",
    help="Host memory for prefixes that lost their pages.",
)
@click.option(
    "--kv-swap-memory",
    callback=parse_size_option,
    metavar="SIZE",
    help="Host memory for the KV of preempted requests, where copying is sooner done than computing again.",
)
@click.option(
    "--kv-disk", type=click.Path(path_type=Path), metavar="DIR", help="Keep what host memory has no room for here."
)
@click.option(
    "--kv-disk-size", callback=parse_size_option, metavar="SIZE", help="Bound of --kv-disk.  [default: 16GiB]"
)
@click.option(
    "--kv-store",
    metavar="ADDRESS",
    help="Keep it in a store that instances share, too: mooncake://HOST:PORT of a mooncake_master, in a network that "
    "none but instances reach.",
)
@click.option(
    "--kv-store-size", callback=parse_size_option, metavar="SIZE", help="Lent to --kv-store.  [default: 1GiB]"
)
@click.option("--max-waiting", type=click.IntRange(1), help="Sequences that may wait; more are answered 429.")
@click.option(
    "--max-waiting-tokens", type=click.IntRange(1), help="Prompt tokens that may wait; more are answered 429."
)
@click.option(
    "--scheduling-policy",
    type=click.Choice(["auto", "fcfs", "priority", "deadline"]),
    default="auto",
    help="Who goes first: by arrival, by the requests' priority, or by when their first token is due, those that are "
    "late already last; auto: deadline with --ttft-slo-ms, else fcfs.",
)
@click.option(
    "--ttft-slo-ms",
    type=click.FloatRange(0, min_open=True),
    help="Target for the time to the first token, of online requests that name none.",
)
@click.option(
    "--tpot-slo-ms",
    type=click.FloatRange(0, min_open=True),
    help="Target for the mean time between tokens, of online requests that name none.",
)
@click.option("--max-streams", type=click.IntRange(1), default=1024, help="Requests open at once; more get 429.")
@click.option("--max-connections", type=click.IntRange(1), default=16384, help="HTTP connections; more get 429.")
@click.option(
    "--drain-timeout", type=click.FloatRange(0), default=30.0, help="Seconds to finish requests after SIGTERM."
)
@click.option("--batch-dir", type=click.Path(path_type=Path), metavar="DIR", help="Serve /v1/batches, kept here.")
@click.option("--batch-max-lines", type=click.IntRange(1), help="Most requests of one batch.  [default: 50000]")
@click.option(
    "--batch-max-file-size", callback=parse_size_option, metavar="SIZE", help="Most of one upload.  [default: 200MiB]"
)
@click.option(
    "--batch-disk-size",
    callback=parse_size_option,
    metavar="SIZE",
    help="Most of all uploads and results.  [default: 16GiB]",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads that compute, of each rank.  [default: its share of the CPUs]",
)
@click.option(
    "--colocated",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    help="Instances on this machine: by default one has 1/N of its cores and of its free memory.",
)
@click.option(
    "--slow-down",
    type=click.FloatRange(1),
    default=1.0,
    metavar="FACTOR",
    help="Have each step last so many times what the build predicts for it, mostly asleep: several instances behave on "
    "few cores as each would on a slower device of its own.",
)
@click.option(
    "--async-scheduling/--no-async-scheduling",
    default=True,
    show_default=True,
    help="Plan the next step and stream the last one while the device runs the one between.",
)
@click.option(
    "--warm-up/--no-warm-up",
    default=True,
    help="Read the weights and run every graph once before READY, instead of in the first request.",
)
@click.option("--enforce-eager", is_flag=True, help="Run operator by operator, without the compiled graphs.")
@click.option(
    "--graph-promotion/--no-graph-promotion", default=True, help="Compile graphs for hot step sizes while serving."
)
@click.option(
    "--graph-cache-bytes",
    callback=parse_size_option,
    default="128MiB",
    metavar="SIZE",
    help="Most that promoted graphs may take.",
)
@click.option(
    "--tool-call-parser",
    type=click.Choice(["auto", "none", *TOOL_CALL_PARSERS]),
    default="auto",
    help="How the model writes tool calls; auto asks its chat template.",
)
@click.option(
    "--reasoning-parser",
    type=click.Choice(["auto", "none", *REASONING_PARSERS]),
    default="auto",
    help="How the model marks its reasoning; auto asks its chat template.",
)
@speculative_options
@click.option("--name", help="Name of the instance, unique in its service.  [default: by role, host and process]")
@click.option(
    "--transfer",
    metavar="NAMES",
    help="Ways to hand KV over between instances, such as shm,tcp, or none.  [default: shm,tcp]",
)
@click.option("--transfer-host", help="Address that takes KV by tcp; beyond this machine it needs a secret.")
@click.option(
    "--transfer-secret",
    envvar="XLLM_TRANSFER_SECRET",
    show_envvar=True,
    help="Secret that instances prove to each other; it is never sent.",
)
@click.option("--compile", "use_compile", is_flag=True, help="Compile a model directory first, into the user's cache.")
@click.option(
    "--otlp-traces-endpoint",
    metavar="URL",
    help="Send OpenTelemetry traces of requests to this OTLP receiver over gRPC, such as grpc://127.0.0.1:4317.",
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
@click.version_option(__version__, prog_name="xllm-serve")
@click.pass_context
def command(context: click.Context, /, **options: Any) -> int:
    """Serve each ARTIFACT, built by xllm-compile, over the OpenAI HTTP API and gRPC.

    Prints one line "READY http=HOST:PORT grpc=HOST:PORT startup_s=SECONDS" on stdout once both answer; logs go to
    stderr. SIGTERM finishes open requests and exits, a second one exits at once.
    """
    logging.basicConfig(
        level=options["log_level"].upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # It announces every start and stop; the lines here say the same with the ports.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    given = given_arguments(context)
    if options["instances"] is not None:
        from xllm_compile.scheduler.launch.launch import launch

        return launch(options, given)
    if options["launcher"] != "local":
        raise click.UsageError(f"--launcher {options['launcher']} starts --instances; add them, such as 2P2D")
    from xllm_compile.scheduler.role_options import check_role_options
    from xllm_compile.scheduler.startup import serve

    check_role_options(options["role"], given)
    return serve(options)


def given_arguments(context: click.Context) -> dict[str, tuple[str, ...]]:
    """By parameter name what the user wrote on the command line, as arguments of another xllm-serve."""
    given: dict[str, tuple[str, ...]] = {}
    for parameter in context.command.params:
        name, value = parameter.name or "", context.params.get(parameter.name or "")
        source = context.get_parameter_source(name)
        if not isinstance(parameter, click.Option) or source is not click.core.ParameterSource.COMMANDLINE:
            continue
        if parameter.is_flag:
            given[name] = (parameter.opts[0] if value else parameter.secondary_opts[0],)
        else:
            values = value if parameter.multiple else [value]
            given[name] = tuple(part for each in values or () for part in (parameter.opts[0], str(each)))
    return given


def main() -> NoReturn:
    """Entry point: a user's mistake is one line and exit code 2."""
    try:
        code = command.main(standalone_mode=False)
    except click.ClickException as err:
        _fail(err.format_message())
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (ValueError, OSError, NotImplementedError) as err:
        logging.getLogger(__name__).debug("start-up failed", exc_info=True)
        _fail(str(err))
    # --help and --version give 0 as well.
    sys.exit(code or 0)


def _fail(message: str) -> NoReturn:
    click.echo(f"xllm-serve: error: {' '.join(message.split())}", err=True)
    sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
