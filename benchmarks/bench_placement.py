"""What it takes a gateway to choose instances for one request, among more and more of them."""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.timing import percentile
from xllm_compile.runtime.kv_events import KVTier
from xllm_compile.runtime.memory.prefix_cache import BlockChain
from xllm_compile.scheduler.cluster.kv_index import KVIndex, block_keys
from xllm_compile.scheduler.cluster.placer import Placer
from xllm_compile.scheduler.cluster.state import (
    Instance,
    InstanceInfo,
    InstanceLoad,
    Pool,
    RequestShape,
    Role,
    StepProfile,
)
from xllm_compile.scheduler.policies.routing import RoutingRules

NUM_INSTANCES = (16, 64, 65, 250, 1000, 4000)
_BARRED = 1000
_PROMPT_TOKENS, _SHARED_TOKENS = 2048, 1024
_PROFILE = StepProfile(num_tokens=(1, 2048), seconds=(0.01, 0.2), sequence_s=1e-5, key_s=1e-8, pair_s=0.0)


class _Fleet:
    """Half prefill, half decode, each with some work."""

    def __init__(self, num_instances: int, rng: random.Random) -> None:
        self._instances: dict[str, Instance] = {}
        self._pools: dict[Pool, list[str]] = {}
        for number in range(num_instances):
            pool = Pool.DECODE if number % 2 else Pool.PREFILL
            self._instances[f"i{number}"] = _instance(f"i{number}", pool, rng)
            self._pools.setdefault(pool, []).append(f"i{number}")

    def usable(self) -> Mapping[Pool, Sequence[str]]:
        return self._pools

    def find(self, name: str) -> Instance | None:
        # As new as a gateway's.
        return replace(self._instances[name])


def run_placement(results: Path, command: Sequence[str], *, num_requests: int) -> None:
    """Every prompt begins with what half of the instances have. Writes placement.json."""
    figures: dict[str, Any] = {}
    for num_instances in NUM_INSTANCES:
        seconds = _measure(num_instances, num_requests)
        figures[str(num_instances)] = {
            part: {str(percent): percentile(sorted(times), percent) * 1e6 for percent in (50, 99)}
            for part, times in seconds.items()
        }
        say(f"{num_instances} instances: done")
    show_table(
        "microseconds of the gateway for each request",
        ("instances", "prefixes, median", "choice, median", "choice, p99"),
        [
            (name, f"{found['prefixes']['50']:.0f}", f"{found['choice']['50']:.0f}", f"{found['choice']['99']:.0f}")
            for name, found in figures.items()
        ],
    )
    many = figures[str(_BARRED)]
    bars = [
        Bar(what=f"choosing among {_BARRED} instances, median", value=many["choice"]["50"], unit="us", bar="<= 1000"),
        Bar(what=f"finding prefixes on {_BARRED} instances, median", value=many["prefixes"]["50"], unit="us"),
        Bar(
            what=f"choosing among {_BARRED} instances over choosing among 64",
            value=many["choice"]["50"] / figures["64"]["choice"]["50"],
            unit="x",
            bar="<= 1",
        ),
    ]
    rules = RoutingRules()
    raw = {
        "num_requests": num_requests,
        "prompt_tokens": _PROMPT_TOKENS,
        "shared_tokens": _SHARED_TOKENS,
        "many_instances": rules.many_instances,
        "num_candidates_each": rules.num_candidates_each,
        "microseconds": figures,
    }
    finish(make_record("placement", command, seed=0, raw=raw, bars=bars), results)


def _measure(num_instances: int, num_requests: int) -> dict[str, list[float]]:
    """Seconds of each request: to look its prefix up, and to choose."""
    rng = random.Random(0)
    fleet, placer, index = _Fleet(num_instances, rng), Placer(pick=rng.randrange), KVIndex()
    shared = [rng.randrange(50_000) for _ in range(_SHARED_TOKENS)]
    keys = block_keys(b"".join(_digests(index, shared)))
    for number in range(num_instances):
        holder = index.add(f"i{number}")
        if number % 4 < 2:
            holder.store(KVTier.DEVICE, keys)
    times: dict[str, list[float]] = {"prefixes": [], "choice": []}
    for number in range(num_requests):
        own = [rng.randrange(50_000) for _ in range(_PROMPT_TOKENS - _SHARED_TOKENS)]
        digests = _digests(index, shared + own)
        request = RequestShape(
            num_prompt_tokens=_PROMPT_TOKENS,
            max_output_tokens=256,
            digests=tuple(digests),
            ttft_slo_s=2.0,
            tpot_slo_s=0.1,
        )
        began = time.perf_counter()
        cached = index.match(request.digests)
        found = time.perf_counter()
        placer.place(str(number), request, fleet, cached)
        times["choice"].append(time.perf_counter() - found)
        times["prefixes"].append(found - began)
        placer.finished(str(number - num_instances))
    return times


def _digests(index: KVIndex, tokens: Sequence[int]) -> Sequence[bytes]:
    chain = BlockChain(index.block_tokens)
    chain.update(tokens)
    return chain.digests


def _instance(name: str, pool: Pool, rng: random.Random) -> Instance:
    num_decoding = rng.randrange(64)
    return Instance(
        info=InstanceInfo(
            name=name,
            incarnation="1",
            role=Role.MIX,
            address=name,
            max_model_len=32_768,
            max_num_seqs=256,
            max_num_batched_tokens=2048,
            kv_tokens_total=1_000_000,
        ),
        pool=pool,
        load=InstanceLoad(
            num_running=num_decoding,
            num_decoding=num_decoding,
            num_context_tokens=1000 * num_decoding,
            kv_tokens_used=1000 * num_decoding,
            num_waiting_tokens=rng.randrange(8192),
            profile=_PROFILE,
        ),
    )
