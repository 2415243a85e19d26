"""vLLM on the CPU for comparisons: MODEL_DIR. Runs in vLLM's environment.

Its engine in this process, stepped: no process or socket lies between it and the clock.
"""

import argparse
import os

from xllm_compile.benchmarks.engine_process import SteppedAdapter, TokenIds, serve_engine

# Its ahead-of-time cache does not load with every torch, and then makes starts longer.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_AOT_COMPILE": "0",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class VllmAdapter(SteppedAdapter):
    def __init__(self, model_dir: str, *, kv_gib: int) -> None:
        # Read when vllm is imported.
        threads = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        os.environ |= _ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": str(kv_gib), "VLLM_CPU_OMP_THREADS_BIND": threads}
        from vllm import LLM

        # Prompts are repeated, and each time is to be computed.
        self._engine = LLM(
            model=model_dir,
            dtype="bfloat16",
            max_model_len=4096,
            max_num_seqs=64,
            enable_prefix_caching=False,
            disable_log_stats=True,
        ).llm_engine
        self._num_prompts = 0

    def begin(self, prompts: list[TokenIds], lengths: list[int]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._num_prompts = len(prompts)
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            params = SamplingParams(
                temperature=0,
                max_tokens=length,
                min_tokens=length,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            self._engine.add_request(str(index), {"prompt_token_ids": prompt}, params)

    def step(self) -> list[tuple[int, TokenIds]]:
        return [
            (int(output.request_id), list(completion.token_ids))
            for output in self._engine.step()
            for completion in output.outputs
        ]

    def end(self) -> None:
        self._engine.abort_request([str(index) for index in range(self._num_prompts)])
        while self._engine.has_unfinished_requests():
            self._engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir")
    parser.add_argument("--kv-gib", type=int, required=True)
    options = parser.parse_args()
    serve_engine(lambda: VllmAdapter(options.model_dir, kv_gib=options.kv_gib))


if __name__ == "__main__":
    main()
