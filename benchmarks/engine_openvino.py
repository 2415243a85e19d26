"""OpenVINO GenAI for comparisons: MODEL_DIR as optimum-cli exports it. Runs in OpenVINO's environment.

Its ContinuousBatchingPipeline, stepped: the same scheduler and paged attention as behind its server.
"""

import argparse
import itertools
import os

import numpy as np
import openvino
import openvino_genai

from xllm_compile.benchmarks.engine_process import SteppedAdapter, TokenIds, serve_engine


class OpenVinoAdapter(SteppedAdapter):
    def __init__(self, model_dir: str, *, kv_precision: str | None, kv_gib: int) -> None:
        """kv_precision: None leaves the choice to OpenVINO."""
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = kv_gib
        scheduler.max_num_batched_tokens = 2048
        scheduler.max_num_seqs = 64
        # Prompts are repeated, and each time is to be computed.
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = True
        properties = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
            "PERFORMANCE_HINT": "LATENCY",
        }
        if kv_precision is not None:
            properties["KV_CACHE_PRECISION"] = kv_precision
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            model_dir, scheduler_config=scheduler, device="CPU", properties=properties
        )
        self._ids = itertools.count()
        self._open: dict[int, openvino_genai.GenerationHandle] = {}
        """By the prompt's index."""

    def begin(self, prompts: list[TokenIds], lengths: list[int]) -> None:
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            config = openvino_genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = length
            config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
            ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
            self._open[index] = self._pipeline.add_request(next(self._ids), ids, config)

    def step(self) -> list[tuple[int, TokenIds]]:
        self._pipeline.step()
        return [
            (index, list(output.generated_ids))
            for index, handle in self._open.items()
            if handle.can_read()
            for output in handle.read().values()
        ]

    def end(self) -> None:
        for handle in self._open.values():
            handle.cancel()
        self._open.clear()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir")
    parser.add_argument("--kv-precision")
    parser.add_argument("--kv-gib", type=int, required=True)
    options = parser.parse_args()
    serve_engine(lambda: OpenVinoAdapter(options.model_dir, kv_precision=options.kv_precision, kv_gib=options.kv_gib))
    # Its threads would outlive what Python takes apart on the way out, and abort.
    os._exit(0)


if __name__ == "__main__":
    main()
