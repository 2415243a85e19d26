"""xllm-bench: one subcommand per claim; each prints a table and writes one JSON record."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from xllm_compile import __version__
from xllm_compile.benchmarks.record import RESULTS

F = TypeVar("F", bound=Callable[..., Any])
# The shapes of checkpoints.SHAPES, named here so that --help needs no torch.
_SHAPES = ("qwen3-0.6b", "qwen3-1.7b-4l", "tiny")
_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}


@click.group(context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="xllm-bench")
def command() -> None:
    """Measure this checkout on this machine.

    Figures are recorded under benchmarks/results/ with command, commit, machine, versions and raw numbers. Run them
    with nothing else on the machine; what others used is recorded beside them.
    """


def results_option(function: F) -> F:
    return click.option(
        "--results", type=click.Path(path_type=Path), default=RESULTS, show_default="benchmarks/results", help="Folder."
    )(function)


def model_options(function: F) -> F:
    """Options of everything that runs a model of its own making."""
    for option in reversed(
        (
            click.option("--shape", type=click.Choice(_SHAPES), default=_SHAPES[0], help="Model, with random weights."),
            click.option(
                "--work-dir",
                type=click.Path(path_type=Path),
                default=Path(".cache/bench"),
                help="Where models and artifacts are kept between runs; some GB.",
            ),
            click.option("--seed", type=int, default=1234, help="Of weights and prompts."),
            results_option,
        )
    ):
        function = option(function)
    return function


def _shape(name: str) -> Any:
    from xllm_compile.benchmarks.checkpoints import SHAPES

    return SHAPES[name]


@command.command("compile")
@model_options
@click.option("--repeats", type=click.IntRange(1), default=3, help="Rounds of all cases.")
def compile_command(shape: str, work_dir: Path, seed: int, results: Path, repeats: int) -> None:
    """Compile time: cold, twice the layers, unchanged, one pass off -> compile_time.json."""
    from xllm_compile.benchmarks.bench_compile import run_compile

    run_compile(_shape(shape), work_dir, results, _command_line(), seed=seed, repeats=repeats)


@command.command("startup")
@model_options
@click.option("--repeats", type=click.IntRange(1), default=7, help="Starts that count.")
def startup_command(shape: str, work_dir: Path, seed: int, results: Path, repeats: int) -> None:
    """Process start to first streamed token of xllm-serve -> startup.json."""
    from xllm_compile.benchmarks.bench_startup import run_startup

    run_startup(_shape(shape), work_dir, results, _command_line(), seed=seed, repeats=repeats)


@command.command("latency")
@model_options
@click.option("--rounds", type=click.IntRange(1), default=5, help="Rounds of all engines in turns.")
@click.option("--checked", type=click.IntRange(1), default=16, help="Prompts whose first token is compared.")
def latency_command(shape: str, work_dir: Path, seed: int, results: Path, rounds: int, checked: int) -> None:
    """Prefill and decode against the machine's limits and transformers -> latency_SHAPE.json."""
    from xllm_compile.benchmarks.bench_latency import run_latency

    run_latency(_shape(shape), work_dir, results, _command_line(), seed=seed, rounds=rounds, num_checked=checked)


@command.command("speculation")
@click.option("--rounds", type=click.IntRange(1), default=7, help="Rounds of all methods in turns.")
@click.option("--output-tokens", type=click.IntRange(2), default=256, help="Tokens to generate per prompt.")
@click.option("--every", type=click.IntRange(1), default=6, help="Continue one in this many held-out files.")
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path(".cache/bench"), help="Keeps the artifacts.")
@results_option
def speculation_command(rounds: int, output_tokens: int, every: int, work_dir: Path, results: Path) -> None:
    """Speculative decoding against plain on demo-code -> speculation_demo_code.json."""
    from xllm_compile.benchmarks.bench_speculation import run_speculation

    run_speculation(work_dir, results, _command_line(), rounds=rounds, output_tokens=output_tokens, every=every)


@command.command("ablation")
@model_options
@click.option("--rounds", type=click.IntRange(2), default=15, help="Rounds of all variants in turns.")
def ablation_command(shape: str, work_dir: Path, seed: int, results: Path, rounds: int) -> None:
    """Each pass left out in turn: decode and prefill -> ablation_SHAPE.json."""
    from xllm_compile.benchmarks.bench_ablation import run_ablation

    run_ablation(_shape(shape), work_dir, results, _command_line(), seed=seed, rounds=rounds)


@command.command("memory")
@model_options
@click.option("--streams", type=click.IntRange(1), default=8, help="Requests at the same time.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=512)
@click.option("--output-tokens", type=click.IntRange(2), default=128)
def memory_command(
    shape: str, work_dir: Path, seed: int, results: Path, streams: int, prompt_tokens: int, output_tokens: int
) -> None:
    """Memory of xllm-serve beyond its weights and KV cache -> memory.json."""
    from xllm_compile.benchmarks.bench_memory import run_memory

    run_memory(
        _shape(shape),
        work_dir,
        results,
        _command_line(),
        seed=seed,
        num_streams=streams,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )


@command.command("weights-memory")
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path(".cache/bench"), help="Scratch; half a GB.")
@results_option
@click.option("--rounds", type=click.IntRange(1), default=21, help="Rounds of both ways in turns.")
def weights_memory_command(work_dir: Path, results: Path, rounds: int) -> None:
    """Weights mapped from a file against a copy in huge pages: opening and decode -> weights_memory.json."""
    from xllm_compile.benchmarks.bench_weights_memory import run_weights_memory

    run_weights_memory(work_dir, results, _command_line(), rounds=rounds)


@command.command("adaptive")
@click.option(
    "--shape",
    "shapes",
    type=click.Choice(_SHAPES),
    multiple=True,
    default=("qwen3-0.6b", "qwen3-1.7b-4l"),
    help="May be repeated; the bars are on the last.",
)
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path(".cache/bench"), help="Scratch; some GB.")
@click.option("--seed", type=int, default=1234, help="Of weights and prompts.")
@results_option
@click.option("--rounds", type=click.IntRange(1), default=7, help="Rounds of all ways in turns.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128)
@click.option("--output-tokens", type=click.IntRange(2), default=48)
def adaptive_command(shapes: tuple[str, ...], work_dir: Path, results: Path, **options: Any) -> None:
    """Decode with full graphs, partial graphs and eagerly, in turns -> adaptive_graph.json."""
    from xllm_compile.benchmarks.bench_adaptive import run_adaptive

    run_adaptive([_shape(name) for name in shapes], work_dir, results, _command_line(), **options)


@command.command("async")
@model_options
@click.option("--rounds", type=click.IntRange(1), default=7, help="Rounds of on and off in turns.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128)
@click.option("--output-tokens", type=click.IntRange(2), default=64)
def async_command(shape: str, work_dir: Path, seed: int, results: Path, **options: Any) -> None:
    """Decode with async scheduling on and off, in turns: gap between steps -> async_scheduling.json."""
    from xllm_compile.benchmarks.bench_async import run_async

    run_async(_shape(shape), work_dir, results, _command_line(), seed=seed, **options)


@command.command("structured")
@model_options
@click.option("--rounds", type=click.IntRange(1), default=7, help="Rounds of free and structured in turns.")
@click.option("--output-tokens", type=click.IntRange(2), default=128)
@click.option("--schemas", "num_schemas", type=click.IntRange(1), default=1000, help="Random schemas to satisfy.")
def structured_command(shape: str, work_dir: Path, seed: int, results: Path, **options: Any) -> None:
    """What a JSON schema costs per token, and random schemas to satisfy -> structured_output.json."""
    from xllm_compile.benchmarks.bench_structured import run_structured

    run_structured(_shape(shape), work_dir, results, _command_line(), seed=seed, **options)


@command.command("soak")
@model_options
@click.option("--steps", "num_steps", type=click.IntRange(1), default=10000, help="Steps that count.")
def soak_command(shape: str, work_dir: Path, seed: int, results: Path, num_steps: int) -> None:
    """Steps of random shapes with promotion on: choices of graphs, memory -> soak.json."""
    from xllm_compile.benchmarks.bench_soak import run_soak

    run_soak(_shape(shape), work_dir, results, _command_line(), seed=seed, num_steps=num_steps)


@command.command("soak-requests")
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path(".cache/bench"), help="Scratch; some GB.")
@click.option("--seed", type=int, default=1234, help="Of the requests.")
@results_option
@click.option("--requests", "num_requests", type=click.IntRange(1), default=20000)
@click.option("--compare-every", type=click.IntRange(1), default=20, help="One in so many is sent to a clean server.")
def request_soak_command(work_dir: Path, results: Path, **options: Any) -> None:
    """Mixed requests, some of whose clients leave, against xllm-serve on demo-code -> soak_requests.json."""
    from xllm_compile.benchmarks.bench_request_soak import run_request_soak

    run_request_soak(work_dir, results, _command_line(), **options)


@command.command("chaos")
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path(".cache/bench"), help="Scratch; some GB.")
@click.option("--seed", type=int, default=1234, help="Of requests and disturbances.")
@results_option
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=10.0, help="Of disturbances.")
@click.option("--in-flight", type=click.IntRange(1), default=500, help="Requests open at the same time.")
@click.option("--instances", default="MMPPDD", help="What they are: M for any work, P for prefill, D for decode.")
def chaos_command(work_dir: Path, results: Path, **options: Any) -> None:
    """Instances, gateways and etcd killed, stopped, drained and cut off while requests run -> chaos.json."""
    from xllm_compile.benchmarks.bench_chaos import run_chaos

    run_chaos(work_dir, results, _command_line(), **options)


@command.command("gateway")
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path(".cache/bench"), help="Scratch; some GB.")
@results_option
@click.option("--streams", type=click.IntRange(1), default=200, help="Open at the same time.")
@click.option("--instances", type=click.IntRange(1), default=4)
@click.option("--tokens-per-s", type=click.FloatRange(0, min_open=True), default=10.0, help="Of each stream.")
@click.option("--seconds", type=click.FloatRange(1), default=20.0)
def gateway_command(work_dir: Path, results: Path, **options: Any) -> None:
    """What a gateway adds, before an instance that sends tokens at a steady rate -> gateway.json."""
    from xllm_compile.benchmarks.bench_gateway import run_gateway

    run_gateway(work_dir, results, _command_line(), **options)


@command.command("placement")
@results_option
@click.option("--requests", "num_requests", type=click.IntRange(1), default=2000, help="For each number of instances.")
def placement_command(results: Path, num_requests: int) -> None:
    """What a gateway takes to choose instances for a request, of up to thousands -> placement.json."""
    from xllm_compile.benchmarks.bench_placement import run_placement

    run_placement(results, _command_line(), num_requests=num_requests)


@command.command("hand-over")
@model_options
@click.option("--prompt-tokens", type=click.IntRange(1), default=512)
@click.option("--rounds", type=click.IntRange(1), default=11, help="Requests to each service, in turns.")
def hand_over_command(shape: str, work_dir: Path, seed: int, results: Path, prompt_tokens: int, rounds: int) -> None:
    """TTFT with prefill and decode on two instances of this host, beside one instance -> hand_over.json."""
    from xllm_compile.benchmarks.bench_hand_over import run_hand_over

    run_hand_over(
        _shape(shape), work_dir, results, _command_line(), seed=seed, prompt_tokens=prompt_tokens, rounds=rounds
    )


@command.command("registry")
@click.option("--operations", type=click.IntRange(1), default=1000, help="Of each kind that count.")
@click.option("--kills", type=click.IntRange(1), default=5, help="Times that etcd is killed and started.")
@results_option
def registry_command(results: Path, operations: int, kills: int) -> None:
    """Put, get and watch in memory and in etcd, and etcd's return after kill -9 -> registry.json."""
    from xllm_compile.benchmarks.bench_registry import run_registry

    run_registry(results, _command_line(), operations=operations, kills=kills)


@command.command("serve")
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
    run_serve(target, requests, how, results, _command_line(), name=name, api_key=api_key, tls=tls)


@command.command("profile")
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.option("--batch", type=click.IntRange(1), default=1, help="Sequences at the same time.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128)
@click.option("--output-tokens", type=click.IntRange(1), default=33, help="1 profiles the prefill.")
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path(".cache/bench"), help="Scratch folder.")
@click.option("--seed", type=int, default=1234, help="Of the prompts.")
@results_option
def profile_command(artifact: Path, results: Path, **options: Any) -> None:
    """Milliseconds of a step by kernel, between kernels and on the host -> profile_KIND.json."""
    from xllm_compile.benchmarks.bench_profile import run_profile

    run_profile(artifact, command=_command_line(), results=results, **options)


def _pass_on(function: Callable[[tuple[str, ...]], None]) -> click.Command:
    """A subcommand with a command line of its own, --help included."""
    settings = {"ignore_unknown_options": True, "help_option_names": []}
    taken = click.argument("arguments", nargs=-1, type=click.UNPROCESSED)(function)
    return command.command(context_settings=settings, add_help_option=False)(taken)


@_pass_on
def kernels(arguments: tuple[str, ...]) -> None:
    """Each kernel against the machine's limits and oneDNN."""
    from xllm_compile.benchmarks import bench_kernels

    bench_kernels.main.main(args=list(arguments), prog_name="xllm-bench kernels", standalone_mode=False)


@_pass_on
def parity(arguments: tuple[str, ...]) -> None:
    """Greedy tokens against transformers in float32."""
    from xllm_compile.benchmarks.parity import main as run

    run.main(args=list(arguments), prog_name="xllm-bench parity", standalone_mode=False)


@command.command("quantisation")
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path(".cache/bench"), help="Keeps the artifacts.")
@click.option("--every", type=click.IntRange(1), default=1, help="Score one in this many held-out files.")
@results_option
def quantisation_command(work_dir: Path, results: Path, every: int) -> None:
    """Bits per byte of demo-code in bfloat16, int8, int4 and int8-dynamic -> quantisation_demo_code.json."""
    from xllm_compile.benchmarks.bench_quantisation import run_quantisation

    run_quantisation(work_dir, results, _command_line(), every=every)


@command.command("call-overhead")
@click.option("--repeats", type=click.IntRange(1), default=30, help="Rounds of both ways.")
@click.option("--seed", type=int, default=1234)
@results_option
def call_overhead_command(results: Path, repeats: int, seed: int) -> None:
    """Weights as inputs of a graph against weights as its constants -> graph_call_overhead.json."""
    from xllm_compile.benchmarks.weights_as_inputs import run_call_overhead

    run_call_overhead(results, _command_line(), seed=seed, repeats=repeats)


@command.command("calibrate")
@click.argument("artifact", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False)
@model_options
@click.option("--repeats", type=click.IntRange(1), default=5, help="Of each measurement.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the spec here instead of the user's cache."
)
def calibrate_command(
    artifact: Path | None, shape: str, work_dir: Path, seed: int, results: Path, **options: Any
) -> None:
    """Fit the cost model to this machine, on ARTIFACT or a model of --shape -> a device spec and cost_model_cpu.json.

    Builds on this machine choose buckets by the spec from then on.
    """
    import os

    # Before torch is loaded: workers of its OpenMP that spin after a call would take a core from the kernels' pool.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from xllm_compile.benchmarks.bench_calibrate import run_calibrate

    run_calibrate(_shape(shape), artifact, work_dir, results, _command_line(), seed=seed, **options)


@command.command("buckets")
@click.option("--trace", type=click.Path(path_type=Path), required=True, help="Requests with arrival times.")
@click.option("--name", default="buckets_azure_conv", help="Name of the record.")
@click.option("--model", type=click.Choice(("qwen3-8b", "qwen3-0.6b")), default="qwen3-8b", help="What serves them.")
@click.option("--device", default="ascend-910b2", help="On what: a device spec by name.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, help="Most tokens in one step.")
@click.option("--max-seqs", type=click.IntRange(1), default=256, help="Most sequences in one step.")
@results_option
def buckets_command(trace: Path, results: Path, **options: Any) -> None:
    """Buckets chosen for a trace against powers of two; arithmetic only -> NAME.json."""
    from xllm_compile.benchmarks.bench_buckets import run_buckets

    run_buckets(trace, results, _command_line(), **options)


@command.command("schedule")
@click.option("--trace", type=click.Path(path_type=Path), required=True, help="Requests with arrival times.")
@click.option("--name", default="schedule_azure_conv", help="Name of the record.")
@click.option("--model", type=click.Choice(("qwen3-8b", "qwen3-0.6b")), default="qwen3-8b", help="What serves them.")
@click.option("--device", default="h200", help="On what: a device spec by name.")
@click.option("--num-requests", type=click.IntRange(2), default=2000, help="From the start of the trace.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), default=20.0, help="Requests per second.")
@click.option("--kv-tokens", type=click.IntRange(1), default=200_000, help="Tokens in the KV cache.")
@click.option("--max-tokens", type=click.IntRange(1), default=2048, help="Most tokens in one step.")
@click.option("--max-seqs", type=click.IntRange(1), default=256, help="Most sequences in one step.")
@results_option
def schedule_command(trace: Path, results: Path, **options: Any) -> None:
    """Scheduling policies on a trace, in simulation; arithmetic only -> NAME.json."""
    from xllm_compile.benchmarks.bench_schedule import run_schedule

    run_schedule(trace, results, _command_line(), **options)


@command.command("prefix-cache")
@click.option("--trace", type=click.Path(path_type=Path), required=True, help="Requests with hash_ids of their blocks.")
@click.option("--name", default="prefix_cache_mooncake", help="Name of the record.")
@click.option(
    "--capacity", "capacities", type=click.IntRange(1), multiple=True, default=(1000, 10000, 50000), help="Blocks."
)
@results_option
def prefix_cache_command(trace: Path, results: Path, name: str, capacities: tuple[int, ...]) -> None:
    """Hit rate of the prefix cache on a trace; nothing is computed -> NAME.json."""
    from xllm_compile.benchmarks.bench_prefix_cache import run_prefix_cache

    run_prefix_cache(trace, results, _command_line(), name=name, capacities=capacities)


@command.command("kv-index")
@click.option("--trace", type=click.Path(path_type=Path), required=True, help="Requests with hash_ids of their blocks.")
@click.option("--name", default="kv_index_mooncake", help="Name of the record.")
@click.option("--model", type=click.Choice(("qwen3-8b", "qwen3-0.6b")), default="qwen3-8b", help="What serves them.")
@click.option("--device", default="h200", help="On what: a device spec by name.")
@click.option("--instances", "counts", type=click.IntRange(1), multiple=True, default=(1, 4, 8, 16), help="How many.")
@results_option
def kv_index_command(trace: Path, results: Path, counts: tuple[int, ...], **options: Any) -> None:
    """What routing by cached prefixes is worth on a trace; nothing is computed -> NAME.json."""
    from xllm_compile.benchmarks.bench_kv_index import run_kv_index

    run_kv_index(trace, results, _command_line(), counts=counts, **options)


@command.command("xtensor")
@click.option("--sequences", type=click.IntRange(1), default=64, help="Running at the same time.")
@click.option("--steps", type=click.IntRange(1), default=2000, help="Decode steps that are played.")
@click.option("--context", type=click.IntRange(16), default=2048, help="Keys per sequence of the attention.")
@click.option("--batch", type=click.IntRange(1), default=4, help="Sequences of the attention.")
@click.option("--rounds", type=click.IntRange(1), default=61, help="Of the attention kernels, in turns.")
@click.option(
    "--step-ms", type=click.FloatRange(0, min_open=True), default=100.0, help="Step that latency is set against."
)
@click.option("--prompt-token-ms", type=click.FloatRange(0), default=1.2, help="What a prompt token adds to it.")
@results_option
def xtensor_command(results: Path, **options: Any) -> None:
    """Memory, allocation and attention of mapped ranges against a block table -> xtensor_memory.json."""
    from xllm_compile.benchmarks.bench_xtensor import run_xtensor

    run_xtensor(results, _command_line(), **options)


@command.command("transfer")
@click.option("--rounds", type=click.IntRange(1), default=25, help="Of 64 MiB, all ways in turns.")
@click.option("--small-rounds", type=click.IntRange(1), default=200, help="Of each smaller size.")
@results_option
def transfer_command(results: Path, **options: Any) -> None:
    """KV from process to process by each way, against copying and plain TCP -> transfer.json."""
    from xllm_compile.benchmarks.bench_transfer import run_transfer

    run_transfer(results, _command_line(), **options)


@command.command("balance")
@click.option("--device", default="ascend-910b2", help="On what: a device spec by name.")
@click.option("--traces", type=click.Path(path_type=Path), help="Folder for Chrome traces of the plans.")
@results_option
def balance_command(device: str, traces: Path | None, results: Path) -> None:
    """Planned idle time of cube and vector units, before and after balancing -> cube_vector_balance.json."""
    from xllm_compile.benchmarks.bench_balance import run_balance

    run_balance(results, _command_line(), device=device, traces=traces)


@command.command("overlap")
@model_options
@click.option("--layers", type=click.IntRange(1), default=6, help="Layers of the shape that are run.")
@click.option("--tokens", type=click.IntRange(2), default=512, help="Tokens of the prefill step.")
@click.option("--small-tokens", type=click.IntRange(2), default=8, help="Of one where splitting should not pay.")
@click.option("--repeats", type=click.IntRange(1), default=15)
@click.option("--share", type=click.FloatRange(0.05, 0.9), default=0.4, help="Of communication in the unsplit step.")
def overlap_command(
    shape: str,
    work_dir: Path,
    results: Path,
    seed: int,
    layers: int,
    tokens: int,
    small_tokens: int,
    repeats: int,
    share: float,
) -> None:
    """Communication that steps in halves hide, over a link of limited rate (needs root) -> overlap_tp2.json."""
    from xllm_compile.benchmarks.bench_overlap import run_overlap

    run_overlap(
        _shape(shape).with_layers(layers),
        work_dir,
        results,
        _command_line(),
        seed=seed,
        tokens=tokens,
        small_tokens=small_tokens,
        repeats=repeats,
        share=share,
    )


@command.group("simulate")
def simulate_group() -> None:
    """Services of many instances in simulation: the policies that serve, on predicted steps."""


@simulate_group.command("roles")
@click.argument("traces", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--bar", "bars", type=float, multiple=True, help="Of each trace: x over minimal load on fixed pools.")
@click.option("--name", default="dynamic_roles", help="Name of the record.")
@click.option("--model", default="qwen3-8b", help="A planned model.")
@click.option("--device", default="ascend-910b2", help="On what: a device spec by name.")
@click.option("--instances", "num_instances", type=click.IntRange(4), default=8)
@click.option("--ttft-slo", type=click.FloatRange(0, min_open=True), default=2.0, help="Seconds.")
@click.option("--tpot-slo", type=click.FloatRange(0, min_open=True), default=0.1, help="Seconds.")
@click.option("--seeds", type=click.IntRange(1), default=3, help="Each begins elsewhere in the trace.")
@click.option("--requests", "max_requests", type=click.IntRange(100), help="The first of each trace only.")
@results_option
def simulate_roles_command(
    traces: tuple[Path, ...], bars: tuple[float, ...], ttft_slo: float, tpot_slo: float, results: Path, **options: Any
) -> None:
    """Rates that fixed pools and dynamic ones sustain -> dynamic_roles.json and .html."""
    from xllm_compile.benchmarks.bench_simulate import Targets, run_dynamic_roles

    if bars and len(bars) != len(traces):
        raise click.UsageError(f"{len(bars)} of --bar for {len(traces)} traces; give one for each, or none")
    targets = Targets(ttft_slo_s=ttft_slo, tpot_slo_s=tpot_slo)
    run_dynamic_roles(traces, results, _command_line(), targets=targets, bars=bars or (1.0,) * len(traces), **options)


@simulate_group.command("colocation")
@click.argument("traces", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--lengths", type=click.Path(path_type=Path), required=True, help="Trace whose lengths offline requests have."
)
@click.option("--name", default="colocation", help="Name of the record.")
@click.option("--model", default="qwen3-8b", help="A planned model.")
@click.option("--device", default="ascend-910b2", help="On what: a device spec by name.")
@click.option("--instances", "num_instances", type=click.IntRange(2), default=8)
@click.option("--requests", "num_requests", type=click.IntRange(100), default=2000, help="Online ones of each trace.")
@click.option("--ttft-slo", type=click.FloatRange(0, min_open=True), default=2.0, help="Seconds.")
@click.option("--tpot-slo", type=click.FloatRange(0, min_open=True), default=0.1, help="Seconds.")
@click.option("--seeds", type=click.IntRange(1), default=2, help="Each begins elsewhere in the trace.")
@results_option
def simulate_colocation_command(
    traces: tuple[Path, ...], ttft_slo: float, tpot_slo: float, results: Path, **options: Any
) -> None:
    """Offline work beside online work within its targets -> colocation.json."""
    from xllm_compile.benchmarks.bench_colocation import run_colocation
    from xllm_compile.benchmarks.bench_simulate import Targets

    targets = Targets(ttft_slo_s=ttft_slo, tpot_slo_s=tpot_slo)
    run_colocation(traces, results, _command_line(), targets=targets, **options)


@simulate_group.command("scale")
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--name", default="simulation_scale", help="Name of the record.")
@click.option("--model", default="qwen3-8b", help="A planned model.")
@click.option("--device", default="ascend-910b2", help="On what: a device spec by name.")
@click.option("--instances", "num_instances", type=click.IntRange(2), default=1000)
@click.option("--requests", "num_requests", type=click.IntRange(2), default=500_000)
@click.option("--hours", type=click.FloatRange(0, min_open=True), default=24.0)
@click.option("--ttft-slo", type=click.FloatRange(0, min_open=True), default=2.0, help="Seconds.")
@click.option("--tpot-slo", type=click.FloatRange(0, min_open=True), default=0.1, help="Seconds.")
@results_option
def simulate_scale_command(trace: Path, ttft_slo: float, tpot_slo: float, results: Path, **options: Any) -> None:
    """How long a day of very many instances takes to simulate -> simulation_scale.json."""
    from xllm_compile.benchmarks.bench_simulate import Targets, run_scale

    run_scale(trace, results, _command_line(), targets=Targets(ttft_slo_s=ttft_slo, tpot_slo_s=tpot_slo), **options)


@command.command("check")
@results_option
@click.option("--strict", is_flag=True, help="Exit with 1 when a bar is not met.")
def check_command(results: Path, strict: bool) -> None:
    """Show every recorded bar, met or not."""
    from xllm_compile.benchmarks.console import show_bars
    from xllm_compile.benchmarks.record import read_records

    rows = [(record.name, bar) for record in read_records(results) for bar in record.bars]
    if not rows:
        raise click.ClickException(f"{results} holds no record with bars; run for example: xllm-bench startup")
    show_bars(f"{results.name}", rows)
    missed = [bar for _, bar in rows if bar.met is False]
    click.echo(f"{sum(bar.met is True for _, bar in rows)} bars met, {len(missed)} not met")
    if strict and missed:
        sys.exit(1)


def _command_line() -> list[str]:
    """As it was typed, for the record; a key is nobody's business, nor where this machine keeps its files."""
    words = ["xllm-bench", *map(_without_folder, sys.argv[1:])]
    for index, word in enumerate(words):
        if word == "--api-key":
            words[index + 1 :] = ["...", *words[index + 2 :]]
        elif word.startswith("--api-key="):
            words[index] = "--api-key=..."
    return words


def _without_folder(word: str) -> str:
    """The word with an absolute path, alone or behind --option=, reduced to its last part."""
    option, equals, value = word.rpartition("=")
    return option + equals + (Path(value).name if Path(value).is_absolute() else value)


def main() -> NoReturn:
    """Entry point: what goes wrong is one line and exit code 2."""
    try:
        code = command.main(standalone_mode=False)
    except click.ClickException as err:
        _fail(err.format_message())
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as err:
        _fail(str(err))
    sys.exit(code or 0)


def _fail(message: str) -> NoReturn:
    click.echo(f"xllm-bench: error: {message}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
