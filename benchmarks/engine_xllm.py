"""Our engine for comparisons: ARTIFACT. Steps it directly, so no HTTP and no asyncio is in the figures."""

import sys
import time
from pathlib import Path

from xllm_compile.benchmarks.engine_process import Generation, TokenIds, serve_engine
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.instance import InstanceConfig, open_instance
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams

# Room for the longest prompt measured and what is generated after it.
_MAX_MODEL_LEN = 4096


class XllmAdapter:
    def __init__(self, artifact: Path, *, enforce_eager: bool = False) -> None:
        # Prompts are repeated, and each time is to be computed.
        config = InstanceConfig(
            max_model_len=_MAX_MODEL_LEN, max_num_seqs=32, enforce_eager=enforce_eager, prefix_cache=False
        )
        self._engine = open_instance(artifact, config).engine

    def generate(self, prompts: list[TokenIds], num_tokens: int) -> Generation:
        engine = self._engine
        # One that prefills late still has to reach num_tokens decodes beside all the others.
        longest = num_tokens + sum(map(len, prompts)) // 512 + 1 if len(prompts) > 1 else num_tokens
        params = SamplingParams(
            temperature=0.0, max_tokens=longest, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        token_ids: list[TokenIds] = [[] for _ in prompts]
        began = time.perf_counter()
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), prompt, params)
        while not all(token_ids):
            _step(engine, token_ids)
        first = time.perf_counter()
        num_before = sum(map(len, token_ids))
        for _ in range(num_tokens - 1):
            _step(engine, token_ids)
        ended = time.perf_counter()
        num_after = sum(map(len, token_ids))
        for index in range(len(prompts)):
            engine.abort(str(index))
        while engine.has_work:
            engine.step()
        return Generation(
            first_s=first - began,
            decode_s=ended - first,
            num_decode_tokens=num_after - num_before,
            token_ids=[ids[:num_tokens] for ids in token_ids],
        )


def _step(engine: Engine, token_ids: list[TokenIds]) -> None:
    """One step; what it generated goes to the sequence named by the request's id."""
    for output in engine.step():
        for completion in output.outputs:
            token_ids[int(output.request_id)] += completion.token_ids


if __name__ == "__main__":
    serve_engine(XllmAdapter(Path(sys.argv[1])))
