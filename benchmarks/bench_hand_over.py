"""What prefill on one instance and decode on another costs a request on one host, beside one instance doing both."""

import asyncio
import random
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from xllm_compile.benchmarks.artifacts import artifact_of_shape
from xllm_compile.benchmarks.checkpoints import Shape
from xllm_compile.benchmarks.cluster_processes import ClusterProcesses
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.load import ForeignLoad, wait_quiet
from xllm_compile.benchmarks.openai_client import StreamResult, stream_completion
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.server_process import ServerProcess
from xllm_compile.benchmarks.timing import measure_in_turns, summarise

_OUTPUT_TOKENS = 8
ONE, SPLIT = "one instance", "prefill and decode"
_ROLES = {ONE: ("mix",), SPLIT: ("prefill", "decode")}
_OPTIONS = (
    "--threads",
    "1",
    "--max-num-seqs",
    "4",
    "--max-model-len",
    "2048",
    "--kv-memory",
    "1GiB",
    "--no-prefix-cache",
    "--no-graph-promotion",
)


def run_hand_over(
    shape: Shape, work_dir: Path, results: Path, command: Sequence[str], *, seed: int, prompt_tokens: int, rounds: int
) -> None:
    """One request at a time, to each service in turn. Writes hand_over.json."""
    say(f"compiling {shape.name}")
    artifact, _ = artifact_of_shape(shape, work_dir, seed=seed)
    rng = random.Random(seed)
    found: dict[str, list[StreamResult]] = {name: [] for name in _ROLES}
    with ExitStack() as stack:
        gateways = {name: _start(stack, artifact, roles) for name, roles in _ROLES.items()}

        def ask(name: str) -> None:
            prompt = [rng.randrange(100, 1000) for _ in range(prompt_tokens)]
            gateway = gateways[name]
            result = asyncio.run(stream_completion(gateway.host, gateway.port, prompt, _OUTPUT_TOKENS))
            if result.error is not None or len(result.token_times) < 2:
                raise RuntimeError(f"{name}: {result.error or 'fewer than two pieces of text'}")
            found[name].append(result)

        wait_quiet()
        with ForeignLoad() as foreign:
            measure_in_turns({name: partial(ask, name) for name in _ROLES}, warmup=1, repeats=rounds)
    # The first of each is the warm-up.
    ttft = {name: summarise([each.ttft_s for each in results[1:]]) for name, results in found.items()}
    second = {name: summarise([each.itl_s[0] for each in results[1:]]) for name, results in found.items()}
    rows = [(name, f"{ttft[name].median * 1e3:.1f}", f"{second[name].median * 1e3:.1f}") for name in _ROLES]
    show_table(f"{prompt_tokens} prompt tokens", ("service", "TTFT, ms", "first to second token, ms"), rows)
    added = ttft[SPLIT].median / ttft[ONE].median - 1
    bars = [
        Bar(what="TTFT added by the hand-over", value=added * 100, unit="%", bar="<= 5"),
        Bar(
            what="first to second token, added",
            value=(second[SPLIT].median - second[ONE].median) * 1e3,
            unit="ms",
        ),
    ]
    raw = {
        "shape": shape.name,
        "prompt_tokens": prompt_tokens,
        "options": list(_OPTIONS),
        "ttft_s": {name: [each.ttft_s for each in results[1:]] for name, results in found.items()},
        "second_token_s": {name: [each.itl_s[0] for each in results[1:]] for name, results in found.items()},
        "foreign_cores": foreign.cores,
    }
    finish(make_record("hand_over", command, seed=seed, raw=raw, bars=bars), results)


def _start(stack: ExitStack, artifact: Path, roles: Sequence[str]) -> ServerProcess:
    """The gateway of a service of these instances."""
    options = ["--role", "gateway", "--registry-port", "0", "--routing", "load"]
    gateway = stack.enter_context(ServerProcess(artifact, options))
    gateway.wait_ready()
    cluster = stack.enter_context(ClusterProcesses(artifact, gateway.registry))
    for index, role in enumerate(roles):
        cluster.add(f"{role}-{index}", role, _OPTIONS)
    return gateway
