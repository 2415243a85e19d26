"""The main job on the embedded model: compile it, serve it, ask it over HTTP and gRPC, show what it took."""

import http.client
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import grpc
from rich.console import Console
from rich.table import Table

from xllm_compile.machine import cache_dir
from xllm_compile.models import demo
from xllm_compile.scheduler.proto import xllm_pb2, xllm_pb2_grpc

MODEL_DIR = Path(demo.__file__).parent / "demo-code"
# In the wording the model was trained on; seeded, because greedy decoding of a model this small repeats itself.
MESSAGES = [{"role": "user", "content": "Write a Python function named is_empty: Return True if the queue is empty."}]
PROMPT = 'import os\n\ndef read_file(path):\n    """Return the contents of'
TEMPERATURE, SEED = 0.5, 1
_START_LIMIT_S = 120.0
_STOP_LIMIT_S = 60.0


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", type=click.Path(path_type=Path), default=MODEL_DIR, help="Model directory.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Artifact.  [default: in the user's cache]")
@click.option("--max-tokens", type=int, default=96, help="Tokens of each answer.")
def main(model: Path, output: Path | None, max_tokens: int) -> None:
    """Compile the demo model, serve it, send one streaming chat and one gRPC request, print text and times."""
    console = Console()
    output = output or cache_dir() / "artifacts" / "demo-code.xllm"
    figures: list[tuple[str, str]] = []
    console.rule("compile")
    compile_s = compile_model(model, output)
    figures.append(("compile", f"{compile_s:.1f} s"))
    console.rule("serve")
    with serve(output) as (http_address, grpc_address, startup_s):
        figures.append(("start-up of the server", f"{startup_s:.2f} s"))
        console.print(f"serving on http://{http_address} and grpc://{grpc_address}")
        console.rule("streaming chat over HTTP")
        console.print(f"[bold]{MESSAGES[-1]['content']}[/bold]")
        figures += chat(http_address, max_tokens)
        console.rule("completion over gRPC")
        complete(grpc_address, max_tokens)
        figures.append(("graph cache", graph_cache(http_address)))
    console.rule("figures")
    table = Table(show_header=False)
    for name, value in figures:
        table.add_row(name, value)
    console.print(table)


def compile_model(model: Path, output: Path) -> float:
    """Runs xllm-compile as a user would; its progress bar goes to stderr. Returns seconds."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "xllm_compile.cli", str(model), "-o", str(output)])
    if done.returncode:
        sys.exit(done.returncode)
    return time.monotonic() - began


@contextmanager
def serve(artifact: Path) -> Iterator[tuple[str, str, float]]:
    """An xllm-serve process on ports the system picks: HTTP and gRPC addresses and seconds until both answered.

    Stopped with SIGTERM on the way out, whatever happens in between.
    """
    command = [sys.executable, "-m", "xllm_compile.scheduler.serve", str(artifact), "--port", "0", "--grpc-port", "0"]
    began = time.monotonic()
    with subprocess.Popen([*command, "--log-level", "warning"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = re.match(r"READY http=(\S+) grpc=(\S+)", process.stdout.readline())
            if ready is None:
                process.wait(_START_LIMIT_S)
                sys.exit(process.returncode or 1)
            yield ready[1], ready[2], time.monotonic() - began
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(_STOP_LIMIT_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def chat(address: str, max_tokens: int) -> list[tuple[str, str]]:
    """One streamed chat completion, printed as it comes. Returns its figures."""
    body: dict[str, Any] = {
        "messages": MESSAGES,
        "stream": True,
        "max_tokens": max_tokens,
        "temperature": TEMPERATURE,
        "seed": SEED,
    }
    body["stream_options"] = {"include_usage": True}
    began = time.monotonic()
    times: list[float] = []
    num_tokens = 0
    for event in _events(address, "/v1/chat/completions", body):
        num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
        text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        if text:
            times.append(time.monotonic())
            click.echo(text, nl=False)
    click.echo()
    if len(times) < 2 or num_tokens < 2:
        return [("tokens", str(num_tokens))]
    tpot_s = (times[-1] - times[0]) / (num_tokens - 1)
    return [
        ("TTFT", f"{(times[0] - began) * 1e3:.1f} ms"),
        ("TPOT", f"{tpot_s * 1e3:.2f} ms"),
        ("decode", f"{1 / tpot_s:.0f} tok/s"),
    ]


def complete(address: str, max_tokens: int) -> None:
    """One gRPC Generate call, printed as it comes."""
    click.echo(PROMPT, nl=False)
    with grpc.insecure_channel(address) as channel:
        request = xllm_pb2.GenerateRequest(
            text=PROMPT,
            sampling=xllm_pb2.SamplingParams(max_tokens=max_tokens, temperature=TEMPERATURE, seed=SEED),
        )
        for response in xllm_pb2_grpc.InferenceStub(channel).Generate(request, timeout=_START_LIMIT_S):
            click.echo("".join(choice.text for choice in response.choices), nl=False)
    click.echo()


def graph_cache(address: str) -> str:
    """Steps by how their graph was found, from /metrics."""
    connection = http.client.HTTPConnection(address, timeout=_START_LIMIT_S)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    pattern = r'^xllm_graph_cache_steps_total\{outcome="(\w+)",part="layers",reason="(\w+)"\} ([\d.e+]+)$'
    found = re.findall(pattern, text, re.MULTILINE)
    return ", ".join(f"{outcome} ({reason}) {float(count):.0f}" for outcome, reason, count in found) or "no steps"


def _events(address: str, path: str, body: dict[str, object]) -> Iterator[dict[str, Any]]:
    connection = http.client.HTTPConnection(address, timeout=_START_LIMIT_S)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{path} answered {response.status}: {response.read().decode(errors='replace')}")
    for line in response:
        data = line.decode().strip().removeprefix("data: ")
        if data and data != "[DONE]":
            yield json.loads(data)


if __name__ == "__main__":
    main()
