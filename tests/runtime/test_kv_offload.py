"""The engine with tiers below its pages, on a runner that reads every token back from the pages."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fakes import EngineFactory, train_byte_level
from tests.runtime.test_engine import run
from xllm_compile.runtime.async_engine import AsyncEngine
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.memory.kv_tiers import DiskTier, KVTiers
from xllm_compile.runtime.outputs import RequestOutput
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams
from xllm_compile.runtime.tokenizer import Tokenizer

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
# Room for two prompts of fifty tokens: the third takes the pages of the first. A block of 4 lies on pages of 3.
SMALL: dict[str, Any] = {"max_model_len": 64, "total_tokens": 130, "block_tokens": 4}
PROMPTS = [[100 + 10 * index + at % 7 for at in range(50)] for index in range(4)]


def tiers_with(disk: DiskTier | None = None, host_bytes: int = 1 << 24) -> KVTiers:
    return KVTiers(host_bytes=host_bytes, disk=disk)


def generate(engine: Engine, prompt: list[int], **params: Any) -> RequestOutput:
    engine.add_request("one", prompt, SamplingParams(**{"max_tokens": 5, **GREEDY, **params}))
    return run(engine)["one"]


def test_what_lost_its_pages_comes_back_from_host_memory(make_engine: EngineFactory) -> None:
    tiers = tiers_with()
    engine, runner = make_engine(**SMALL, tiers=tiers)
    for prompt in PROMPTS:
        assert generate(engine, prompt).num_cached_tokens == 0
    assert tiers.stats.num_offloaded > 0
    before = sum(len(step.token_ids) for step in runner.steps)
    again = generate(engine, PROMPTS[0])
    assert again.num_cached_tokens == 48 and tiers.stats.num_restored > 0
    assert again.outputs[0].token_ids == runner.greedy(PROMPTS[0], 5)
    assert sum(len(step.token_ids) for step in runner.steps) - before == 2 + 4
    engine.close()


def test_restored_blocks_are_shared_like_computed_ones(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(**SMALL, tiers=tiers_with())
    for prompt in PROMPTS:
        generate(engine, prompt)
    engine.add_request("n", PROMPTS[0], SamplingParams(n=3, max_tokens=4, **GREEDY))
    output = run(engine)["n"]
    assert [each.token_ids for each in output.outputs] == [runner.greedy(PROMPTS[0], 4)] * 3
    engine.close()


def test_a_prefix_that_lies_partly_in_pages_and_partly_in_a_tier(make_engine: EngineFactory) -> None:
    tiers = tiers_with()
    engine, runner = make_engine(**SMALL, tiers=tiers)
    long = PROMPTS[0]
    generate(engine, long)
    generate(engine, PROMPTS[1])
    # Takes the pages of the first prompt that it needs, the last ones first.
    generate(engine, PROMPTS[2][:30], max_tokens=2)
    assert 0 < tiers.stats.num_offloaded < 12
    again = generate(engine, long)
    assert again.num_cached_tokens == 48
    assert again.outputs[0].token_ids == runner.greedy(long, 5)
    engine.close()


async def test_the_next_start_finds_on_disk_what_the_last_one_left(make_engine: EngineFactory, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=5, output_kind=RequestOutputKind.FINAL_ONLY, **GREEDY)
    cached = []
    for _ in range(2):
        tiers = tiers_with(DiskTier(tmp_path, max_bytes=1 << 24, layout="test"), host_bytes=1 << 18)
        engine, runner = make_engine(**SMALL, tiers=tiers)
        serving = AsyncEngine(engine)
        for index, prompt in enumerate(PROMPTS):
            (output,) = [output async for output in serving.generate(str(index), prompt, params)]
            assert output.outputs[0].token_ids == runner.greedy(prompt, 5)
            cached.append(output.num_cached_tokens)
        serving.shutdown()
        engine.close()
        assert tiers.stats.num_damaged == 0
    assert cached[:4] == [0] * 4 and max(cached[4:]) == 48


def test_a_torn_file_costs_its_computation_and_nothing_else(make_engine: EngineFactory, tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, max_bytes=1 << 24, layout="test")
    engine, runner = make_engine(**SMALL, tiers=tiers_with(disk, host_bytes=1))
    for prompt in PROMPTS:
        generate(engine, prompt)
    engine.close()
    for path in disk.folder.iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    tiers = tiers_with(DiskTier(tmp_path, max_bytes=1 << 24, layout="test"))
    engine, runner = make_engine(**SMALL, tiers=tiers)
    request = engine.make_request("one", PROMPTS[0], SamplingParams(max_tokens=5, **GREEDY))
    reading = engine.prefetch(request)
    assert reading is not None
    reading.result()
    engine.add(request)
    output = run(engine)["one"]
    assert output.num_cached_tokens == 0 and tiers.stats.num_damaged == 1
    assert output.outputs[0].token_ids == runner.greedy(PROMPTS[0], 5)
    engine.close()


TOKENIZER = Tokenizer(train_byte_level(), eos_token_ids=[2])


@settings(max_examples=40)
@given(
    asked=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50), st.integers(1, 12)), min_size=1, max_size=14),
    host_blocks=st.integers(1, 40),
    total_tokens=st.integers(80, 200),
    is_async=st.booleans(),
)
def test_no_mix_of_prefixes_ever_reads_wrong_kv(
    asked: list[tuple[int, int, int]], host_blocks: int, total_tokens: int, is_async: bool
) -> None:
    options = {**SMALL, "total_tokens": total_tokens}
    block_bytes = 4 * 2 * 2 * 256 * 4
    tiers = tiers_with(host_bytes=host_blocks * block_bytes)
    engine, runner = EngineFactory(TOKENIZER, is_async=is_async)(**options, tiers=tiers)
    final: dict[str, RequestOutput] = {}
    for index, (which, length, count) in enumerate(asked):
        prompt = PROMPTS[which][:length]
        engine.add_request(str(index), prompt, SamplingParams(max_tokens=count, **GREEDY))
        if index % 3 == 2:
            final |= {output.request_id: output for output in engine.step()}
    final |= run(engine)
    for index, (which, length, count) in enumerate(asked):
        assert final[str(index)].outputs[0].token_ids == runner.greedy(PROMPTS[which][:length], min(count, 64 - length))
    assert tiers.stats.host_bytes <= host_blocks * block_bytes
    engine.close()


def test_options_that_do_not_go_together_say_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kv_host_bytes=0 must be at least 1"):
        InstanceConfig(kv_host_bytes=0)
    with pytest.raises(ValueError, match="lies below host memory; give kv_host_bytes"):
        InstanceConfig(kv_disk=tmp_path)
    with pytest.raises(ValueError, match="needs prefix_cache"):
        InstanceConfig(kv_host_bytes=1 << 20, prefix_cache=False)
