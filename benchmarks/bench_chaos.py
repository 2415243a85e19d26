"""A service whose processes are killed, stopped, drained and cut off from each other while hundreds of requests run:
every answer must come, and be the one that an undisturbed server gives."""

import asyncio
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from xllm_compile.benchmarks.artifacts import compile_model
from xllm_compile.benchmarks.chaos_faults import Fault, Parts, plan_faults
from xllm_compile.benchmarks.chaos_report import Answer, Disturbance, Prompt, Tally, bars_of, raw_of
from xllm_compile.benchmarks.cluster_processes import ClusterProcesses, Part
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.etcd_process import EtcdProcess
from xllm_compile.benchmarks.host_network import Host, HostNetwork, missing_for_network
from xllm_compile.benchmarks.openai_client import stream_completion
from xllm_compile.benchmarks.parity import DEMO_MODEL
from xllm_compile.benchmarks.record import make_record
from xllm_compile.benchmarks.server_process import ServerProcess
from xllm_compile.scheduler.tasks import cancel_all

_ROLES = {"M": "mix", "P": "prefill", "D": "decode"}
_NUM_GATEWAYS = 2
_NUM_ETCD = 3
_NUM_PROMPTS = 48
_PROMPT_TOKENS = (8, 160)
_OUTPUT_TOKENS = (16, 160)
_MAX_MODEL_LEN = 512
_OPTIONS = (
    *("--threads", "1", "--max-num-seqs", "64", "--kv-memory", "96MiB", "--no-graph-promotion"),
    # Shorter than what is under way takes: a drained instance hands over what it does not finish.
    *("--drain-timeout", "2"),
)
_GATEWAY_OPTIONS = ("--max-streams", "4096", "--routing", "load")
_GIVES_UP_S = 120.0
"""How long a client goes on trying after the last fault."""
_REST_S = 90.0
"""Reservations that nobody comes for end by themselves within a minute."""
_HELD = (
    "xllm_kv_cache_tokens_used",
    'xllm_kv_pages{state="mapped"}',
    "xllm_kv_reservations_open",
    "xllm_kv_hand_overs_open",
    "xllm_num_requests_running",
    "xllm_num_requests_waiting",
    "xllm_open_streams",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    cluster: ClusterProcesses
    etcd: dict[str, EtcdProcess]
    network: HostNetwork | None
    hosts: dict[str, Host]

    @property
    def parts(self) -> Parts:
        names = {name: part.role == "gateway" for name, part in self.cluster.parts.items()}
        return Parts(
            instances=[name for name, is_gateway in names.items() if not is_gateway],
            gateways=[name for name, is_gateway in names.items() if is_gateway],
            etcd=list(self.etcd),
        )


def run_chaos(
    work_dir: Path, results: Path, command: Sequence[str], *, seed: int, minutes: float, in_flight: int, instances: str
) -> None:
    """instances: roles by their first letter, such as MMMM or PPDD. Writes chaos.json. Raises ValueError on others."""
    if not instances or any(letter not in _ROLES for letter in instances):
        raise ValueError(f"--instances {instances} must be letters of {', '.join(_ROLES)}, such as MMMM or PPDD")
    artifact = work_dir / "artifacts" / "demo-code-chaos.xllm"
    logs = work_dir / "chaos-logs"
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("*.log"):
        old.unlink()
    say("compiling demo-code")
    # In float32 tokens are the same however a step is put together.
    compile_model(DEMO_MODEL, artifact, ["--dtype", "float32", "--max-model-len", str(_MAX_MODEL_LEN)])
    say("what an undisturbed server answers")
    prompts = right_answers(artifact, seed)
    if missing := missing_for_network():
        say(f"nothing is cut off: {missing}")
    with ExitStack() as stack:
        service = start_service(stack, artifact, logs, instances, with_network=not missing)
        plan = plan_faults(random.Random(seed), minutes * 60, service.parts, with_network=not missing)
        say(f"{len(plan)} faults in {minutes:g} minutes, {in_flight} requests in flight; logs in {logs}")
        tally, at_rest = asyncio.run(disturb(service, prompts, plan, seed=seed, in_flight=in_flight))
    raw = {
        "minutes": minutes,
        "in_flight": in_flight,
        "instances": instances,
        "instance_options": list(_OPTIONS),
        "num_gateways": _NUM_GATEWAYS,
        "num_etcd_members": _NUM_ETCD,
        "has_network": not missing,
        **raw_of(tally, at_rest),
    }
    show_table("faults", ("what", "times"), [(kind, str(count)) for kind, count in raw["num_faults"].items()])
    finish(make_record("chaos", command, seed=seed, raw=raw, bars=bars_of(tally, at_rest)), results)


def right_answers(artifact: Path, seed: int) -> list[Prompt]:
    """Prompts, and what a server of its own makes of each."""
    rng = random.Random(f"{seed} prompts")
    with ServerProcess(artifact, ["--no-graph-promotion"]) as server:
        server.wait_ready()
        return asyncio.run(_right_answers(server, rng))


async def _right_answers(server: ServerProcess, rng: random.Random) -> list[Prompt]:
    prompts = []
    for _ in range(_NUM_PROMPTS):
        token_ids = [rng.randrange(100, 1000) for _ in range(rng.randint(*_PROMPT_TOKENS))]
        num_tokens = rng.randint(*_OUTPUT_TOKENS)
        result = await stream_completion(server.host, server.port, token_ids, num_tokens)
        if result.error is not None:
            raise RuntimeError(f"the undisturbed server failed: {result.error}")
        prompts.append(Prompt(token_ids=token_ids, num_tokens=num_tokens, text=result.text))
    return prompts


def start_service(stack: ExitStack, artifact: Path, logs: Path, instances: str, *, with_network: bool) -> Service:
    """Each process on a host of its own where there is a network. It ends with the stack.

    instances: roles by their first letter.
    """
    network = stack.enter_context(HostNetwork()) if with_network else None
    hosts: dict[str, Host] = {}

    def host(name: str) -> Host | None:
        if network is None:
            return None
        hosts[name] = network.add(name)
        return hosts[name]

    names = [f"etcd-{index}" for index in range(_NUM_ETCD)]
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    members = EtcdProcess.cluster(folder, _NUM_ETCD, [found for name in names if (found := host(name)) is not None])
    for member in members:
        member.heartbeat_ms = 100
        stack.callback(member.kill)
        member.launch()
    for member in members:
        member.wait_ready()
    registry = f"etcd://{','.join(member.endpoint for member in members)}"
    cluster = stack.enter_context(ClusterProcesses(artifact, registry, logs=logs))
    for index in range(_NUM_GATEWAYS):
        name = f"gateway-{index}"
        cluster.add(name, "gateway", _GATEWAY_OPTIONS, host=host(name))
    for index, letter in enumerate(instances):
        role = _ROLES[letter]
        place = host(name := f"{role}-{index}")
        options = list(_OPTIONS)
        if place is not None:
            # Over the network, which can be cut, and on the ports it had when it comes back.
            options += ["--port", "8000", "--grpc-port", "8001"]
            options += ["--transfer", "tcp", "--transfer-host", place.address, "--transfer-secret", "chaos"]
        cluster.add(name, role, options, host=place)
    return Service(cluster=cluster, etcd=dict(zip(names, members, strict=True)), network=network, hosts=hosts)


async def disturb(
    service: Service, prompts: Sequence[Prompt], plan: Sequence[Fault], *, seed: int, in_flight: int
) -> tuple[Tally, dict[str, dict[str, float]]]:
    """Carry the plan out with so many requests open. Also returns what each part holds once all are answered."""
    tally = Tally()
    is_over = asyncio.Event()
    clients = [
        asyncio.create_task(_client(service, prompts, random.Random(f"{seed} client {index}"), is_over, tally))
        for index in range(in_flight)
    ]
    faults = asyncio.create_task(_carry_out(service, plan, tally))
    try:
        await faults
        is_over.set()
        say("the last requests")
        done, pending = await asyncio.wait(clients, timeout=_GIVES_UP_S)
        tally.num_unanswered = len(pending)
        for client in done:
            client.result()
    finally:
        await cancel_all([faults, *clients])
    return tally, await _at_rest(service)


async def _client(
    service: Service, prompts: Sequence[Prompt], rng: random.Random, is_over: asyncio.Event, tally: Tally
) -> None:
    """One request after the other, each until it has its answer: at another gateway where one fails."""
    while not is_over.is_set():
        prompt = rng.choice(prompts)
        gateways = [service.cluster.parts[name] for name in service.parts.gateways]
        rng.shuffle(gateways)
        while not await _try(gateways[0], prompt, tally):
            gateways.append(gateways.pop(0))


async def _try(gateway: Part, prompt: Prompt, tally: Tally) -> bool:
    server = gateway.process
    result = await stream_completion(server.host, server.port, prompt.token_ids, prompt.num_tokens)
    tally.answers.append(Answer(prompt=prompt, gateway=gateway.name, result=result))
    if result.error is not None:
        await asyncio.sleep(result.retry_after_s or 0.2)
    return result.error is None


async def _carry_out(service: Service, plan: Sequence[Fault], tally: Tally) -> None:
    for number, fault in enumerate(plan, 1):
        await asyncio.sleep(fault.pause_s)
        num_good = sum(answer.result.error is None for answer in tally.answers)
        so_far = f"{num_good} requests answered, {len(tally.answers) - num_good} tried again"
        say(f"{number}/{len(plan)} {fault.kind}: {', '.join(fault.targets)}, {fault.lasts_s:.1f} s; {so_far}")
        disturbance = Disturbance(fault=fault, at_s=time.monotonic())
        tally.disturbances.append(disturbance)
        await _apply(service, fault)
        disturbance.over_s = time.monotonic()


async def _apply(service: Service, fault: Fault) -> None:
    """Until it is over and everybody is back."""
    parts = [service.cluster.parts[name] for name in fault.targets if name in service.cluster.parts]
    members = [service.etcd[name] for name in fault.targets if name in service.etcd]
    match fault.action:
        case "cut":
            assert service.network is not None, "only planned where there is one"
            for source, target in fault.cuts:
                service.network.cut(service.hosts[source], service.hosts[target])
            await asyncio.sleep(fault.lasts_s)
            service.network.heal()
        case "stop":
            for part in parts:
                part.send(signal.SIGSTOP)
            await asyncio.sleep(fault.lasts_s)
            for part in parts:
                part.send(signal.SIGCONT)
        case "kill" | "drain":
            for member in members:
                member.kill()
            for part in parts:
                part.send(signal.SIGKILL if fault.action == "kill" else signal.SIGTERM)
                await asyncio.to_thread(part.process.wait)
            await asyncio.sleep(fault.lasts_s)
            # Here and not in a thread: processes on hosts end with the thread that started them.
            for member in members:
                member.launch()
            for part in parts:
                service.cluster.restart(part)
            for member in members:
                await asyncio.to_thread(member.wait_ready)
            for part in parts:
                await asyncio.to_thread(part.process.wait_ready)


async def _at_rest(service: Service) -> dict[str, dict[str, float]]:
    """Metrics of every part once nothing runs: what is held then is held for nobody."""
    deadline = time.monotonic() + _REST_S
    while True:
        found = {name: await _metrics(part.process) for name, part in service.cluster.parts.items()}
        held = [value for metrics in found.values() for value in metrics.values()]
        if not any(held) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(1)


async def _metrics(server: ServerProcess) -> dict[str, float]:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(_HELD))
    return {name: float(value) for name, value in values.items()}
