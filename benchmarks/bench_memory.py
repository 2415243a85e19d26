"""Memory of a serving process: weights once, the KV cache it touched, and little else."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

from xllm_compile.benchmarks.artifacts import artifact_of_shape
from xllm_compile.benchmarks.checkpoints import Shape
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.openai_client import stream_completion
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.server_process import ServerProcess

_SAMPLE_S = 0.1
_MIB = 1 << 20


def run_memory(
    shape: Shape,
    work_dir: Path,
    results: Path,
    command: Sequence[str],
    *,
    seed: int,
    num_streams: int,
    prompt_tokens: int,
    output_tokens: int,
) -> None:
    """Measure and write memory.json."""
    artifact, manifest = artifact_of_shape(shape, work_dir, seed=seed)
    rng = random.Random(seed)
    prompts = [[rng.randrange(shape.num_words) for _ in range(prompt_tokens)] for _ in range(num_streams)]
    with ServerProcess(artifact) as server:
        server.wait_ready()
        idle = server.memory()
        say(f"serving {num_streams} streams of {prompt_tokens} + {output_tokens} tokens")
        samples = asyncio.run(_serve(server, prompts, output_tokens))
        after = server.memory()
    peak = max(samples, key=lambda sample: sample["rss"])
    weights = manifest.memory_plan["weights_bytes"]
    # The last token of a stream is never written: nothing comes after it.
    kv_touched = num_streams * (prompt_tokens + output_tokens - 1) * manifest.memory_plan["kv_bytes_per_token"]
    rest = peak["rss"] - weights - kv_touched
    rows = [
        (name, *(f"{sample[key] / _MIB:.0f}" for key in ("rss", "pss", "rss_anon", "rss_file", "rss_shmem")))
        for name, sample in (("ready", idle), ("peak while serving", peak), ("after", after))
    ]
    show_table(f"xllm-serve, {shape.name}, MiB", ("", "RSS", "PSS", "anonymous", "files", "shared"), rows)
    raw = {
        "shape": shape.hf_config(),
        "num_streams": num_streams,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "weights_bytes": weights,
        "kv_touched_bytes": kv_touched,
        "bytes": {"ready": idle, "peak": peak, "after": after},
        "num_samples": len(samples),
    }
    bars = [
        Bar(what="RSS beyond weights and touched KV", value=rest / _MIB, unit="MiB", bar="<= 600"),
        # Weights that were copied, converted or packed while loading would be here a second time.
        Bar(
            what=f"anonymous memory, which KV is no part of (weights: {weights / _MIB:.0f} MiB)",
            value=peak["rss_anon"] / _MIB,
            unit="MiB",
            bar="<= 400",
        ),
        Bar(what="RSS at its peak", value=peak["rss"] / _MIB, unit="MiB"),
        Bar(what="PSS at its peak", value=peak["pss"] / _MIB, unit="MiB"),
    ]
    finish(make_record("memory", command, seed=seed, raw=raw, bars=bars), results)


async def _serve(server: ServerProcess, prompts: Sequence[list[int]], output_tokens: int) -> list[dict[str, int]]:
    """Run all streams at once; memory sampled until the last one ends."""
    samples: list[dict[str, int]] = []

    async def sample() -> None:
        while True:
            samples.append(server.memory())
            await asyncio.sleep(_SAMPLE_S)

    sampler = asyncio.create_task(sample())
    streams = [stream_completion(server.host, server.port, prompt, output_tokens) for prompt in prompts]
    done = await asyncio.gather(*streams)
    sampler.cancel()
    samples.append(server.memory())
    if errors := [result.error for result in done if result.error is not None]:
        raise RuntimeError(f"{len(errors)} of {len(done)} streams failed: {errors[0]}")
    return samples
