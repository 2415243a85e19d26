"""xllm-bench: servers under load, alone and as a service of many."""

from pathlib import Path
from typing import Any

import click

from xllm_compile.benchmarks.commands.options import (
    command_line,
    model_options,
    results_option,
    shape_of,
    work_dir_option,
)


@click.command("serve")
@click.argument("target")
@results_option
@click.option("--name", default="serving", help="Name of the record.")
@click.option("--requests", "num_requests", type=click.IntRange(1), default=64, help="Requests to send.")
@click.option("--concurrency", type=click.IntRange(1), default=8, help="Most requests open at the same time.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Poisson arrivals a second.  [default: at once]")
@click.option("--prompt-tokens", type=click.IntRange(1), default=256)
@click.option("--output-tokens", type=click.IntRange(1), default=64)
@click.option("--trace", type=click.Path(path_type=Path), help="Lengths and arrivals from a .csv or .jsonl trace.")
@click.option("--speedup", type=click.FloatRange(0), default=1.0, help="Play the trace faster; 0: all at once.")
@click.option("--max-model-len", type=click.IntRange(2), default=4096, help="Leave longer requests of a trace out.")
@click.option("--vocab-size", type=click.IntRange(1), default=1000, help="Prompts are random ids below it.")
@click.option("--slo-ttft", type=click.FloatRange(0), default=2.0, help="Seconds; goodput counts what meets both.")
@click.option("--slo-tpot", type=click.FloatRange(0), default=0.2, help="Seconds a token.")
@click.option("--model", help="Name to send, where the server wants one.")
@click.option("--api-key", envvar="XLLM_API_KEY", show_envvar=True)
@click.option("--tls-ca", type=click.Path(path_type=Path), help="Of an https:// target's certificate.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Our certificate, where it wants one.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its key.")
@click.option("--seed", type=int, default=1234, help="Of prompts and arrivals.")
def serve_command(target: str, results: Path, **options: Any) -> None:
    """Concurrent streams against TARGET, an http(s)://HOST:PORT or an artifact -> NAME.json."""
    from xllm_compile.benchmarks.bench_serve import ServeOptions, run_serve
    from xllm_compile.benchmarks.workloads import all_at_once, fixed_requests, trace_requests
    from xllm_compile.scheduler.tls import TlsConfig

    count, seed = options["num_requests"], options["seed"]
    if options["trace"] is not None:
        speedup, limit = options["speedup"], options["max_model_len"]
        requests = trace_requests(options["trace"], limit=count, max_model_len=limit, speedup=speedup or 1.0)
        requests = requests if speedup else all_at_once(requests)
    else:
        lengths = options["prompt_tokens"], options["output_tokens"]
        requests = fixed_requests(count, *lengths, rate=options["rate"], seed=seed)
    how = ServeOptions(
        concurrency=options["concurrency"],
        vocab_size=options["vocab_size"],
        seed=seed,
        slo_ttft_s=options["slo_ttft"],
        slo_tpot_s=options["slo_tpot"],
        model=options["model"],
    )
    tls = TlsConfig.from_options(options)
    name, api_key = options["name"], options["api_key"]
    run_serve(target, requests, how, results, command_line(), name=name, api_key=api_key, tls=tls)


@click.command("serving-rate")
@click.argument("artifact", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="NAME[@MODEL]=COMMAND",
    help="Another server with /health and OpenAI's completions, {port} in its command; may be repeated.",
)
@click.option("--name", default="serving_rate", help="Name of the record.")
@click.option("--rounds", type=click.IntRange(1), default=1, help="Searches of each server, in turns.")
@click.option("--tries", "max_tries", type=click.IntRange(1), default=6, help="Rates in each search.")
@click.option("--seconds", type=click.FloatRange(1), default=30.0, help="Of arrivals at each rate.")
@click.option("--slo-ttft", "slo_ttft_s", type=click.FloatRange(0, min_open=True), default=10.0, help="Seconds.")
@click.option("--slo-tpot", "slo_tpot_s", type=click.FloatRange(0, min_open=True), default=0.1, help="Seconds a token.")
@click.option("--vocab-size", type=click.IntRange(1), default=30000, help="Prompts are random ids below it.")
@click.option("--seed", type=int, default=1234, help="Of prompts and arrivals.")
@results_option
def serving_rate_command(artifact: Path, peers: tuple[str, ...], name: str, results: Path, **options: Any) -> None:
    """Requests a second that xllm-serve and others sustain with tokens in time -> NAME.json and NAME.html."""
    from xllm_compile.benchmarks.bench_serving_rate import Contender, RateSetting, run_serving_rate

    setting = RateSetting(**options)
    try:
        contenders = [Contender.ours(artifact, setting.slo_tpot_s), *map(Contender.parse, peers)]
    except ValueError as err:
        raise click.UsageError(f"--peer {err}") from err
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names):
        raise click.UsageError(f"--peer names {names} must differ")
    run_serving_rate(contenders, setting, results, command_line(), name=name)


@click.command("soak-requests")
@work_dir_option("Scratch; some GB.")
@click.option("--seed", type=int, default=1234, help="Of the requests.")
@results_option
@click.option("--requests", "num_requests", type=click.IntRange(1), default=20000)
@click.option("--compare-every", type=click.IntRange(1), default=20, help="One in so many is sent to a clean server.")
def request_soak_command(work_dir: Path, results: Path, **options: Any) -> None:
    """Mixed requests, some of whose clients leave, against xllm-serve on demo-code -> soak_requests.json."""
    from xllm_compile.benchmarks.bench_request_soak import run_request_soak

    run_request_soak(work_dir, results, command_line(), **options)


@click.command("chaos")
@work_dir_option("Scratch; some GB.")
@click.option("--seed", type=int, default=1234, help="Of requests and disturbances.")
@results_option
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=10.0, help="Of disturbances.")
@click.option("--in-flight", type=click.IntRange(1), default=500, help="Requests open at the same time.")
@click.option("--instances", default="MMPPDD", help="What they are: M for any work, P for prefill, D for decode.")
def chaos_command(work_dir: Path, results: Path, **options: Any) -> None:
    """Instances, gateways and etcd killed, stopped, drained and cut off while requests run -> chaos.json."""
    from xllm_compile.benchmarks.bench_chaos import run_chaos

    run_chaos(work_dir, results, command_line(), **options)


@click.command("gateway")
@work_dir_option("Scratch; some GB.")
@results_option
@click.option("--streams", type=click.IntRange(1), default=200, help="Open at the same time.")
@click.option("--instances", type=click.IntRange(1), default=4)
@click.option("--tokens-per-s", type=click.FloatRange(0, min_open=True), default=10.0, help="Of each stream.")
@click.option("--seconds", type=click.FloatRange(1), default=20.0)
def gateway_command(work_dir: Path, results: Path, **options: Any) -> None:
    """What a gateway adds, before an instance that sends tokens at a steady rate -> gateway.json."""
    from xllm_compile.benchmarks.bench_gateway import run_gateway

    run_gateway(work_dir, results, command_line(), **options)


@click.command("placement")
@results_option
@click.option("--requests", "num_requests", type=click.IntRange(1), default=2000, help="For each number of instances.")
def placement_command(results: Path, num_requests: int) -> None:
    """What a gateway takes to choose instances for a request, of up to thousands -> placement.json."""
    from xllm_compile.benchmarks.bench_placement import run_placement

    run_placement(results, command_line(), num_requests=num_requests)


@click.command("colocation")
@work_dir_option("Scratch; some GB.")
@click.option("--seed", type=int, default=1234, help="Of requests and arrivals.")
@results_option
@click.option("--seconds", type=click.FloatRange(1), default=45.0, help="That count, of each mode.")
@click.option("--online-rate", type=click.FloatRange(0, min_open=True), default=2.0, help="Requests a second.")
@click.option("--in-flight", type=click.IntRange(1), default=32, help="Offline requests open at the same time.")
def colocation_command(work_dir: Path, results: Path, **options: Any) -> None:
    """Offline requests beside online ones on four instances of this host -> colocation_live.json."""
    from xllm_compile.benchmarks.bench_colocation_live import run_colocation_live

    run_colocation_live(work_dir, results, command_line(), **options)


@click.command("hand-over")
@model_options
@click.option("--prompt-tokens", type=click.IntRange(1), default=512)
@click.option("--rounds", type=click.IntRange(1), default=11, help="Requests to each service, in turns.")
def hand_over_command(shape: str, work_dir: Path, seed: int, results: Path, prompt_tokens: int, rounds: int) -> None:
    """TTFT with prefill and decode on two instances of this host, beside one instance -> hand_over.json."""
    from xllm_compile.benchmarks.bench_hand_over import run_hand_over

    run_hand_over(
        shape_of(shape), work_dir, results, command_line(), seed=seed, prompt_tokens=prompt_tokens, rounds=rounds
    )


@click.command("registry")
@click.option("--operations", type=click.IntRange(1), default=1000, help="Of each kind that count.")
@click.option("--kills", type=click.IntRange(1), default=5, help="Times that etcd is killed and started.")
@results_option
def registry_command(results: Path, operations: int, kills: int) -> None:
    """Put, get and watch in memory and in etcd, and etcd's return after kill -9 -> registry.json."""
    from xllm_compile.benchmarks.bench_registry import run_registry

    run_registry(results, command_line(), operations=operations, kills=kills)


COMMANDS: tuple[click.Command, ...] = (
    serve_command,
    serving_rate_command,
    request_soak_command,
    chaos_command,
    gateway_command,
    placement_command,
    colocation_command,
    hand_over_command,
    registry_command,
)
