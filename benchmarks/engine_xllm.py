"""Our engine for comparisons: ARTIFACT. Steps it directly, so no HTTP and no asyncio is in the figures."""

import argparse
from pathlib import Path

from xllm_compile.benchmarks.engine_process import SteppedAdapter, TokenIds, serve_engine
from xllm_compile.runtime.instance import open_instance
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams

# Room for the longest prompt measured and what is generated after it.
_MAX_MODEL_LEN = 4096


class XllmAdapter(SteppedAdapter):
    def __init__(
        self,
        artifact: Path,
        *,
        enforce_eager: bool = False,
        max_num_seqs: int = 32,
        kv_memory_bytes: int | None = None,
    ) -> None:
        # Prompts are repeated, and each time is to be computed.
        config = InstanceConfig(
            max_model_len=_MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            kv_memory_bytes=kv_memory_bytes,
            enforce_eager=enforce_eager,
            prefix_cache=False,
        )
        self._engine = open_instance(artifact, config).engine
        self._num_prompts = 0

    def begin(self, prompts: list[TokenIds], lengths: list[int]) -> None:
        self._num_prompts = len(prompts)
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            params = SamplingParams(
                temperature=0.0, max_tokens=length, ignore_eos=True, output_kind=RequestOutputKind.DELTA
            )
            self._engine.add_request(str(index), prompt, params)

    def step(self) -> list[tuple[int, TokenIds]]:
        return [
            (int(output.request_id), list(completion.token_ids))
            for output in self._engine.step()
            for completion in output.outputs
        ]

    def end(self) -> None:
        for index in range(self._num_prompts):
            self._engine.abort(str(index))
        while self._engine.has_work:
            self._engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--kv-memory-bytes", type=int)
    options = parser.parse_args()
    limits = {"max_num_seqs": options.max_num_seqs, "kv_memory_bytes": options.kv_memory_bytes}
    serve_engine(lambda: XllmAdapter(options.artifact, **limits))


if __name__ == "__main__":
    main()
