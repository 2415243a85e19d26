import json
import random

from xllm_compile.benchmarks.bench_kv_index import BLOCK_TOKENS, measure_state, read_prompts, replay
from xllm_compile.benchmarks.bench_prefix_cache import ideal_hits
from xllm_compile.scheduler.cluster.state import InstanceInfo, Role, StepProfile

PROFILE = StepProfile(num_tokens=(1, 2048), seconds=(0.001, 0.1), sequence_s=0.0, key_s=0.0, pair_s=0.0)
INFO = InstanceInfo(
    name="i0",
    incarnation="1",
    role=Role.MIX,
    address="i0",
    transfers=("simulated",),
    kv_bytes_per_token=100_000,
    block_tokens=BLOCK_TOKENS,
    max_model_len=1 << 20,
    max_num_seqs=256,
    max_num_batched_tokens=2048,
    kv_tokens_total=1 << 30,
)


def conversations(folder, num_turns=40, num_users=12):
    """Users who come back with one block more, in any order."""
    rng = random.Random(0)
    blocks = {user: [1000 * user] for user in range(num_users)}
    lines = []
    for turn in range(num_turns * num_users):
        user = rng.randrange(num_users)
        blocks[user].append(1000 * user + len(blocks[user]))
        line = {"timestamp": 500 * turn, "input_length": BLOCK_TOKENS * len(blocks[user]), "hash_ids": blocks[user]}
        lines.append(json.dumps(line))
    trace = folder / "trace.jsonl"
    trace.write_text("\n".join(lines))
    return trace, [json.loads(line)["hash_ids"] for line in lines]


def test_one_instance_has_the_ideal_and_routing_by_prefix_keeps_most_of_it(tmp_path):
    trace, hash_ids = conversations(tmp_path)
    prompts = read_prompts(trace)
    ideal = ideal_hits(hash_ids) / sum(map(len, hash_ids))
    alone = replay(prompts, INFO, PROFILE, 1, "prefix", 1.0)
    assert alone["hit_rate"] == ideal
    ours = replay(prompts, INFO, PROFILE, 4, "prefix", 4.0)
    base = replay(prompts, INFO, PROFILE, 4, "round_robin", 4.0)
    assert ours["hit_rate"] > 0.95 * ideal > base["hit_rate"]
    assert ours["imbalance"] < 1.5
    assert ours["ttft_p99_s"] < base["ttft_p99_s"]


def test_fetching_finds_what_any_instance_has(tmp_path):
    trace, hash_ids = conversations(tmp_path)
    prompts = read_prompts(trace)
    ideal = ideal_hits(hash_ids) / sum(map(len, hash_ids))
    # In turns, so slow that whoever comes back finds the prompt before computed.
    without = replay(prompts, INFO, PROFILE, 4, "round_robin", 0.1)
    ours = replay(prompts, INFO, PROFILE, 4, "round_robin", 0.1, link_s=lambda num_tokens: 0.001 + 1e-6 * num_tokens)
    assert ours["hit_rate"] > 0.98 * ideal > without["hit_rate"] and ours["num_fetches"] > 0
    assert ours["ttft_mean_s"] < without["ttft_mean_s"]
    # Slower than computing, as is learnt from the first copies.
    slow = replay(prompts, INFO, PROFILE, 4, "round_robin", 0.1, link_s=lambda num_tokens: 0.01 * num_tokens)
    assert slow["num_fetches"] < 0.2 * ours["num_fetches"]


def test_one_prefix_that_all_want_does_not_stay_on_one_instance(tmp_path):
    trace = tmp_path / "trace.jsonl"
    popular = list(range(4))
    lines = (
        {"timestamp": 10 * number, "input_length": 5 * BLOCK_TOKENS, "hash_ids": [*popular, 100 + number]}
        for number in range(400)
    )
    trace.write_text("\n".join(map(json.dumps, lines)))
    ours = replay(read_prompts(trace), INFO, PROFILE, 8, "prefix", 1.0)
    assert ours["imbalance"] < 1.2 and ours["hit_rate"] > 0.7


def test_a_block_takes_little(tmp_path):
    found = measure_state(2, num_blocks=20_000)
    assert set(found) == {"bytes_per_block", "store_us", "match_us", "close_us"}
