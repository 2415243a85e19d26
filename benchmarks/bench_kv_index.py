"""The gateway's index of KV: its memory, its time, and what routing by it is worth on a trace that names blocks.

The replay is of prompts only, on instances that compute one after the other in predicted times and forget nothing. The
index and the routing are the gateway's, and so is the choice to fetch a prefix from another instance, over links of one
speed that it has to learn. An instance's blocks are in the index once they are computed, not before.
"""

import json
import os
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from xllm_compile.benchmarks.bench_prefix_cache import ideal_hits
from xllm_compile.benchmarks.bench_simulate import hardware_of
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.server_process import process_memory
from xllm_compile.runtime.kv_events import KVTier
from xllm_compile.runtime.memory.prefix_cache import BlockChain
from xllm_compile.scheduler.cluster.kv_index import KVHolder, KVIndex, block_keys
from xllm_compile.scheduler.cluster.state import (
    CachedTokens,
    Instance,
    InstanceInfo,
    InstanceLoad,
    Placement,
    Pool,
    RequestShape,
    Role,
    StepProfile,
)
from xllm_compile.scheduler.policies import predict
from xllm_compile.scheduler.policies.copy_times import CopyTimes
from xllm_compile.scheduler.policies.fetch import Fetching, FetchRules
from xllm_compile.scheduler.policies.routing import PolicyName, RoutingRules, route

BLOCK_TOKENS = 512
WAYS: dict[str, tuple[PolicyName, bool]] = {
    "round_robin": ("round_robin", False),
    "prefix": ("prefix", False),
    "fetch": ("prefix", True),
}
"""Routing policy, and whether prefixes are fetched."""
# Of the instances' time, were nothing cached.
OFFERED_LOAD = 0.8
NUM_BLOCKS = 1_000_000
_DIGEST_BYTES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    arrival_s: float
    num_tokens: int
    digests: tuple[bytes, ...]


@dataclass(kw_only=True, slots=True)
class _Server:
    """An instance that computes one prompt after the other."""

    info: InstanceInfo
    holder: KVHolder
    profile: StepProfile
    blocks: set[bytes] = field(default_factory=set)
    """Those that are there before the next prompt that comes is computed."""
    queue: deque[tuple[float, int, tuple[bytes, ...]]] = field(default_factory=deque)
    """Prompts under way: when each ends, its tokens to compute, its blocks."""
    num_computed_tokens: int = 0

    def at(self, now: float) -> Instance:
        """Tell the index what is done by now, and report the load."""
        while self.queue and self.queue[0][0] <= now:
            self.holder.store(KVTier.DEVICE, block_keys(b"".join(self.queue.popleft()[2])))
        load = InstanceLoad(
            num_waiting=len(self.queue), num_waiting_tokens=sum(each[1] for each in self.queue), profile=self.profile
        )
        return Instance(info=self.info, pool=Pool.MIX, load=load)

    def take(self, prompt: Prompt, now: float, num_fetched: int, copy_s: float) -> tuple[int, float]:
        """Blocks found, the first num_fetched of which arrive after copy_s, and seconds until the first token."""
        found = next((at for at, each in enumerate(prompt.digests) if each not in self.blocks), len(prompt.digests))
        found = max(found, num_fetched)
        spared = min(found * BLOCK_TOKENS, prompt.num_tokens - 1)
        own = prompt.num_tokens - spared
        idle = Instance(info=self.info, pool=Pool.MIX, load=InstanceLoad(profile=self.profile))
        begins_s = max(now + copy_s, self.queue[-1][0]) if self.queue else now + copy_s
        ends_s = begins_s + predict.prefill_s(idle, own, own * spared + own * own // 2, None)
        self.queue.append((ends_s, own, prompt.digests))
        self.blocks.update(prompt.digests)
        self.num_computed_tokens += own
        return found, ends_s - now


def run_kv_index(
    trace: Path, results: Path, command: Sequence[str], *, name: str, model: str, device: str, counts: Sequence[int]
) -> None:
    """Measure and replay on so many instances each, and write NAME.json."""
    prompts = read_prompts(trace)
    num_blocks = sum(len(prompt.digests) for prompt in prompts)
    ideal = ideal_hits([json.loads(line)["hash_ids"] for line in trace.read_text().splitlines()]) / num_blocks
    hardware = hardware_of(model, device)
    info = _info("i0", hardware.max_num_batched_tokens, hardware.kv_bytes_per_token)
    raw: dict[str, Any] = {"num_prompts": len(prompts), "num_blocks": num_blocks, "ideal": ideal, "replays": {}}
    bars = []
    for count in counts:
        speed = _speed(prompts, info, hardware.profile, count)
        found = {}
        for way, (policy, fetches) in WAYS.items():
            link_s = hardware.hand_over_s if fetches else None
            found[way] = replay(prompts, info, hardware.profile, count, policy, speed, link_s)
            say(f"{count} instances, {way}: {found[way]['hit_rate']:.4f} of blocks found")
        raw["replays"][count] = found
        ours, base, fetched = found["prefix"], found["round_robin"], found["fetch"]
        bars += [
            Bar(what=f"hits by prefix, {count} instances", value=ours["hit_rate"], unit="of blocks"),
            Bar(what=f"hits by round robin, {count} instances", value=base["hit_rate"], unit="of blocks"),
            Bar(
                what=f"hits by prefix against the ideal, {count} instances",
                value=ours["hit_rate"] / ideal,
                unit="x",
                bar=">= 1" if count == 1 else "",
            ),
            Bar(what=f"most over mean computed, by prefix, {count} instances", value=ours["imbalance"], unit="x"),
            Bar(
                what=f"p99 of TTFT by prefix over round robin, {count} instances",
                value=ours["ttft_p99_s"] / base["ttft_p99_s"],
                unit="x",
                bar="<= 1",
            ),
            Bar(
                what=f"hits with fetching against the ideal, {count} instances",
                value=fetched["hit_rate"] / ideal,
                unit="x",
                bar=">= 0.95",
            ),
            Bar(
                what=f"mean TTFT with fetching over without, {count} instances",
                value=fetched["ttft_mean_s"] / ours["ttft_mean_s"],
                unit="x",
                bar="<= 1",
            ),
        ]
    raw["state"] = {holders: measure_state(holders) for holders in (1, 4)}
    bars += [
        Bar(what=f"memory of a block that {holders} instances have", value=found["bytes_per_block"], unit="bytes")
        for holders, found in raw["state"].items()
    ]
    bars.append(Bar(what="look-up", value=raw["state"][4]["match_us"], unit="us per block"))
    show_table(
        f"{trace.name}: ideal {ideal:.4f}",
        ("instances", "way", "hits", "most over mean", "TTFT mean", "TTFT p99"),
        [
            (
                str(count),
                way,
                f"{one['hit_rate']:.4f}",
                f"{one['imbalance']:.2f}",
                f"{one['ttft_mean_s']:.2f} s",
                f"{one['ttft_p99_s']:.2f} s",
            )
            for count, found in raw["replays"].items()
            for way, one in found.items()
        ],
    )
    finish(make_record(name, command, seed=0, raw=raw, bars=bars), results)


def read_prompts(trace: Path) -> list[Prompt]:
    prompts = []
    for line in trace.read_text().splitlines():
        values = json.loads(line)
        # A hash of the trace stands for its whole prefix, as a digest does.
        chain = BlockChain(1)
        chain.update(values["hash_ids"])
        prompts.append(
            Prompt(
                arrival_s=values["timestamp"] / 1e3,
                num_tokens=max(values["input_length"], 1),
                digests=tuple(chain.digests),
            )
        )
    return prompts


def replay(
    prompts: Sequence[Prompt],
    info: InstanceInfo,
    profile: StepProfile,
    num_instances: int,
    policy: PolicyName,
    speed: float,
    link_s: Callable[[int], float] | None = None,
) -> dict[str, float]:
    """Hit rate, imbalance and times with the trace's arrivals sped up so.

    link_s: what a copy of so many tokens takes from one instance to another; None has none made.
    """
    index, copies, rules_of_fetch = KVIndex(BLOCK_TOKENS), CopyTimes(), FetchRules()
    servers = {}
    for number in range(num_instances):
        own = replace(info, name=f"i{number}", address=f"i{number}")
        servers[own.name] = _Server(info=own, holder=index.add(own.name), profile=profile)
    rules = RoutingRules(policy=policy, max_wait_s=1e9)
    hits, num_fetches, ttfts_s = 0, 0, []
    for turn, prompt in enumerate(prompts):
        now = prompt.arrival_s / speed
        instances = [server.at(now) for server in servers.values()]
        shape = RequestShape(num_prompt_tokens=prompt.num_tokens, max_output_tokens=1, digests=prompt.digests)
        cached, fetching, num_fetched, copy_s = index.match(prompt.digests), None, 0, 0.0
        if link_s is not None:
            fetching = Fetching(shape, instances, cached, copies, rules_of_fetch, now)
        placed = route(shape, instances, rules=rules, cached=cached, turn=turn, fetching=fetching)
        assert isinstance(placed, Placement), placed
        if placed.fetch is not None and link_s is not None:
            num_fetches += 1
            num_fetched = placed.fetch.num_tokens // BLOCK_TOKENS
            own_tokens = cached.get(placed.prefill, CachedTokens()).device
            copy_s = link_s(num_copied := placed.fetch.num_tokens - own_tokens)
            copies.observe(servers[placed.fetch.source].info, servers[placed.prefill].info, num_copied, copy_s, now)
        found, ttft_s = servers[placed.prefill].take(prompt, now, num_fetched, copy_s)
        hits += found
        ttfts_s.append(ttft_s)
    computed = [server.num_computed_tokens for server in servers.values()]
    return {
        "hit_rate": hits / sum(len(prompt.digests) for prompt in prompts),
        "num_fetches": num_fetches,
        "imbalance": max(computed) / fmean(computed),
        "ttft_mean_s": fmean(ttfts_s),
        "ttft_p99_s": quantiles(ttfts_s, n=100)[-1],
    }


def measure_state(num_holders: int, num_blocks: int = NUM_BLOCKS) -> dict[str, float]:
    """Of an index with so many blocks, all of which so many instances have."""
    rng = random.Random(0)
    digests = rng.randbytes(_DIGEST_BYTES * num_blocks)
    before = process_memory(os.getpid())["rss"]
    index = KVIndex()
    holders = [index.add(str(number)) for number in range(num_holders)]
    began_s = time.perf_counter()
    step = _DIGEST_BYTES << 12
    for holder in holders:
        for begin in range(0, len(digests), step):
            holder.store(KVTier.DEVICE, block_keys(digests[begin : begin + step]))
    stored_s = time.perf_counter() - began_s
    num_bytes = process_memory(os.getpid())["rss"] - before
    prompt = [digests[begin : begin + _DIGEST_BYTES] for begin in range(0, _DIGEST_BYTES * 2000, _DIGEST_BYTES)]
    began_s = time.perf_counter()
    found = index.match(prompt)
    match_s = time.perf_counter() - began_s
    assert len(found) == num_holders and found["0"].device == 16 * len(prompt)
    began_s = time.perf_counter()
    holders[0].close()
    return {
        "bytes_per_block": num_bytes / num_blocks,
        "store_us": stored_s / num_holders / num_blocks * 1e6,
        "match_us": match_s / len(prompt) * 1e6,
        "close_us": (time.perf_counter() - began_s) / num_blocks * 1e6,
    }


def _speed(prompts: Sequence[Prompt], info: InstanceInfo, profile: StepProfile, num_instances: int) -> float:
    """By which arrivals come faster, so that all instances together are offered their share of load."""
    idle = Instance(info=info, pool=Pool.MIX, load=InstanceLoad(profile=profile))
    work_s = sum(predict.prefill_s(idle, each.num_tokens, each.num_tokens**2 // 2, None) for each in prompts)
    return OFFERED_LOAD * num_instances * prompts[-1].arrival_s / work_s


def _info(name: str, max_num_batched_tokens: int, kv_bytes_per_token: int) -> InstanceInfo:
    return InstanceInfo(
        name=name,
        incarnation="1",
        role=Role.MIX,
        address=name,
        transfers=("simulated",),
        kv_bytes_per_token=kv_bytes_per_token,
        block_tokens=BLOCK_TOKENS,
        max_model_len=1 << 20,
        max_num_seqs=1 << 20,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_tokens_total=1 << 40,
    )
